"""Factored models in files."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from gramian.block import blocks
from gramian.calls import unwrapped
from gramian.checkpoint import load_tensors, save_tensors
from gramian.compression.lowrank import LowRank, matrix_of
from gramian.compression.modules import clean_module_name, replaced, submodule
from gramian.errors import CheckpointError
from gramian.layers import is_affine, operation_of

__all__ = ["load_compressed", "save_compressed"]

RANKS = "gramian.ranks"


def save_compressed(model: nn.Module, path: str | Path) -> None:
    """Writes a factored model as safetensors, at its small size, with the ranks of its layers in the metadata.

    Args:
        model: from `Plan.apply()`, trained further or not.
        path: the file to write or replace.

    Raises:
        InputError: the folder is missing, or a tensor is of a kind that safetensors lacks.
        CheckpointError: the file cannot be written.

    Cost: one write.
    Source: this library's own.

    >>> import tempfile
    >>> dense, path = nn.Sequential(nn.Linear(9, 9)), tempfile.mkdtemp() + "/small.safetensors"
    >>> save_compressed(nn.Sequential(LowRank(dense[0], 2)), path)
    >>> load_compressed(dense, path)[0].rank
    2
    """
    model = unwrapped(model)
    ranks = {
        clean_module_name(name): module.rank for name, module in model.named_modules() if isinstance(module, LowRank)
    }
    save_tensors(path, model.state_dict(), {RANKS: json.dumps(ranks)} | blocks(model).metadata())


def load_compressed(model: nn.Module, path: str | Path) -> nn.Module:
    """The factored model from a file of `save_compressed`.

    Args:
        model: dense, as it was before compression; its layers are replaced by factored ones in place.
        path: the file.

    Returns:
        The model, or the factored layer where the model is a single layer.

    Raises:
        CheckpointError: the file holds no ranks or does not fit the model, which is then as it was.

    Cost: one read.
    Source: this library's own.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/small.safetensors"
    >>> save_compressed(LowRank(nn.Linear(9, 9), 2), path)
    >>> load_compressed(nn.Linear(9, 9), path).rank
    2
    """
    tensors, metadata = load_tensors(path)
    try:
        ranks = json.loads(metadata[RANKS])
    except (KeyError, ValueError, RecursionError):
        raise CheckpointError(
            f"{path} was not written by save_compressed: it has no {RANKS!r} in its metadata"
        ) from None
    dense = {}
    try:
        for name, rank in ranks.items():
            layer = dense[name] = submodule(model, name)
            fits = operation_of(layer).factors and is_affine(layer) and getattr(layer, "groups", 1) == 1
            if not fits or not 0 < rank <= min(matrix_of(layer).shape):
                raise ValueError(f"{name} cannot have rank {rank}")
            model = replaced(model, name, LowRank(layer, rank))
        held, wanted = ({k: tuple(t.shape) for k, t in state.items()} for state in (tensors, model.state_dict()))
        wrong = sorted(k for k in held.keys() | wanted.keys() if held.get(k) != wanted.get(k))
        if wrong:
            was, want = held.get(wrong[0], "missing"), wanted.get(wrong[0], "not in the model")
            raise ValueError(f"{wrong[0]} is {was}, wanted {want}; {len(wrong)} tensors differ")
    except (AttributeError, TypeError, ValueError) as error:
        for name, layer in reversed(dense.items()):
            model = replaced(model, name, layer)
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {error}") from None
    model.load_state_dict(tensors)
    return model
