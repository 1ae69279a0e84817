"""Factored models in files: one safetensors file, or a folder that transformers' `from_pretrained` loads."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gramian.block import blocks
from gramian.calls import as_model, as_module, unwrapped
from gramian.checkpoint import Checkpoint, clean_name, open_checkpoint, save_tensors
from gramian.checkpoint.names import as_path
from gramian.checkpoint.packing import RANKS
from gramian.compression.calibration.experts import dense_weight
from gramian.compression.storage.hooks import warn_of_hooks
from gramian.compression.storage.ranks import factor, ranks_of, restore
from gramian.errors import CheckpointError, some

if TYPE_CHECKING:
    from gramian.compression.budget.plan import Plan

__all__ = ["has_ranks", "load_compressed", "pretrained_support", "save_compressed"]


def save_compressed(model: nn.Module | Plan, path: str | Path) -> None:
    """Writes a factored model at its small size: one safetensors file, or for a model of transformers a folder.

    A path that ends in `.safetensors` is a file, with the ranks of the layers in its metadata; a model of transformers
    with any other path becomes a folder, as by `model.save_pretrained`. `from_pretrained` loads it after
    `import gramian.integrations.compressed`, and raises without. A warning names modules with forward hooks, which no
    file holds.

    Args:
        model: from `Plan.apply()`, trained further or not; or the plan itself of a model in shards, which is written
            part by part.
        path: the file to write or replace, or the folder.

    Raises:
        InputError: the first is no model, as the plan itself; the folder of the file is missing, a tensor is of a kind
            that safetensors lacks, or the path is a folder and the model is none of transformers'.
        CheckpointError: the file cannot be written.

    Cost: one write.
    Source: this library's own.

    >>> import tempfile
    >>> from gramian.compression import LowRank
    >>> dense, path = nn.Sequential(nn.Linear(9, 9)), tempfile.mkdtemp() + "/small.safetensors"
    >>> save_compressed(nn.Sequential(LowRank(dense[0], 2)), path)
    >>> load_compressed(dense, path)[0].rank
    2
    """
    write = getattr(model, "write", None)
    if write is not None and not isinstance(model, nn.Module):  # a plan of a folder, whose model is not in memory
        write(as_path(path, "save_compressed"))
        return
    model, path = unwrapped(as_model(model, "save_compressed")), as_path(path, "save_compressed")
    warn_of_hooks(model, "save_compressed")
    support = pretrained_support()
    if support is not None and support.is_pretrained(model) and path.suffix != ".safetensors":
        support.save_folder(model, path)
        return
    save_tensors(path, model.state_dict(), {RANKS: json.dumps(ranks_of(model))} | blocks(model).metadata())


def load_compressed(model: nn.Module, path: str | Path) -> nn.Module:
    """The factored model from a file of `save_compressed`, or from a folder that `save_pretrained` wrote.

    Args:
        model: dense, as it was before compression, or on the meta device; its layers are replaced by factored ones in
            place, and what is on the meta device becomes the file's tensors. Of a model of transformers that is
            loaded from a folder, all submodules are replaced.
        path: the file or the folder.

    Returns:
        The model, or the factored layer where the model is a single layer.

    Raises:
        InputError: the first is no model, or the second no path.
        CheckpointError: the file holds no ranks or does not fit the model, which is then as it was.

    Cost: one read.
    Source: this library's own.

    >>> import tempfile
    >>> from gramian.compression import LowRank
    >>> path = tempfile.mkdtemp() + "/small.safetensors"
    >>> save_compressed(LowRank(nn.Linear(9, 9), 2), path)
    >>> load_compressed(nn.Linear(9, 9), path).rank
    2
    """
    model, path = as_module(model, "load_compressed"), as_path(path, "load_compressed")
    support = pretrained_support()
    if support is not None and support.is_pretrained(model):
        folder = path if path.is_dir() else path.parent
        if (path.is_dir() or path.name == "model.safetensors") and (folder / "config.json").is_file():
            return support.load_folder(model, folder)
    checkpoint = open_checkpoint(path, stored=True)
    ranks = _ranks_in(checkpoint)
    # An empty tensor under the name of the dense weight is for readers who would take the layer for a dense one.
    marks = {dense_weight(name) for name in ranks}
    names = [n for n, entry in checkpoint.entries.items() if not (n in marks and entry.shape == (0,))]
    dense: dict[str, nn.Module] = {}
    try:
        model, dense = factor(model, ranks)
        own = {clean_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
        held = {name: checkpoint.entries[name].shape for name in names}
        _check_fit(held, {name: tuple(tensor.shape) for name, tensor in own.items()})
        lost = [n for n, b in model.named_buffers() if b.is_meta and clean_name(n) not in own]
        if lost:
            raise ValueError(
                f"the file does not hold the buffers {some(lost)}, which are on the meta device. Build the model with "
                "its buffers on a device, as by a constructor outside torch.device('meta')"
            )
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        model = restore(model, dense)
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {error}") from None
    _fill(model, {name: checkpoint.load(name) for name in names})
    if support is not None:
        support.attach(model)
    return model


def has_ranks(path: str | Path) -> bool:
    """Whether a file or folder is that of a factored model.

    Raises:
        CheckpointError: it cannot be read.
    """
    return RANKS in open_checkpoint(path, stored=True).metadata


def pretrained_support() -> ModuleType | None:
    """`pretrained` beside it, where transformers is loaded; a model of its kind cannot exist otherwise."""
    if "transformers.modeling_utils" not in sys.modules:
        return None
    from gramian.compression.storage import pretrained

    return pretrained


def _ranks_in(checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        ranks = json.loads(checkpoint.metadata[RANKS])
    except (KeyError, ValueError, RecursionError):
        raise CheckpointError(
            f"{checkpoint.path} was not written by save_compressed: it has no {RANKS!r} in its metadata. "
            "Of a model whose layers are whole, as `gramian train` writes it: gramian.checkpoint.load_into(model, path)"
        ) from None
    if not isinstance(ranks, dict):
        raise CheckpointError(f"{checkpoint.path} does not fit any model: {RANKS!r} is {ranks!r:.40}, wanted an object")
    return ranks


def _check_fit(held: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    wrong = sorted(name for name in held.keys() | wanted.keys() if held.get(name) != wanted.get(name))
    if wrong:
        was, want = held.get(wrong[0], "missing"), wanted.get(wrong[0], "not in the model")
        raise ValueError(f"{wrong[0]} is {was}, wanted {want}; {len(wrong)} tensors differ")


@torch.no_grad()
def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors into the model; one on the meta device becomes the file's, in all places where it is used."""
    made: dict[int, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for held in (module._parameters, module._buffers):
            for local, tensor in list(held.items()):
                name = clean_name(f"{prefix}.{local}" if prefix else local)
                if tensor is None or name not in tensors:
                    continue
                if not tensor.is_meta:
                    tensor.copy_(tensors[name])
                    continue
                if id(tensor) not in made:
                    value = tensors[name].clone()  # in memory of its own, not the file's
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
                held[local] = made[id(tensor)]  # type: ignore[assignment]
