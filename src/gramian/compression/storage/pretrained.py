"""Factored and quantized models of transformers: how `save_pretrained` writes them and `from_pretrained` reads them.

Importing this module imports transformers and registers the quantization method `gramian` with it. A folder's config
has the ranks and bits under `quantization_config`; its safetensors files hold the factors, or the integers and scales,
under the names of their modules, and an empty tensor under the name of each dense weight. transformers without this
module skips an unknown quantization method with a warning; the empty tensors, whose shape fits no weight, make it raise
in place of initializing those layers again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from gramian.checkpoint.packing import RANKS
from gramian.compression.calibration.experts import dense_weight, stack_of
from gramian.compression.layers.lowrank import LowRank
from gramian.compression.layers.opening import open_
from gramian.compression.storage.files import _check_fit
from gramian.compression.storage.ranks import factor, openable, ranks_of, restore
from gramian.compression.storage.slicing import SLICED_KEYS
from gramian.errors import CheckpointError, some
from gramian.texts import read_text

__all__ = [
    "METHOD",
    "FactoredConfig",
    "FactoredQuantizer",
    "attach",
    "is_pretrained",
    "load_folder",
    "put_ranks_",
    "save_folder",
]

METHOD = "gramian"
"""The name of the quantization method in a folder's config."""


class FactoredConfig(QuantizationConfigMixin):
    """The entry `quantization_config` of a folder's config.

    Args:
        ranks: of the factored layers, by the name of the module; of the quantized ones, their bits and group.
        quant_method: always `gramian`.
    """

    def __init__(self, ranks: Mapping[str, Any] | None = None, quant_method: str = METHOD, **_: Any) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.ranks = dict(ranks or {})


class FactoredQuantizer(HfQuantizer):
    """Puts factored layers into a model before its weights are loaded, and marks them when it is saved."""

    is_trainable = True  # type: ignore[assignment]
    is_qat_trainable = True  # type: ignore[assignment]
    is_compileable = True  # type: ignore[assignment]

    def is_serializable(self) -> bool:  # type: ignore[override]
        """A factored model can be saved."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        ranks = put_ranks_(model, self.quantization_config.ranks)  # type: ignore[attr-defined]
        named = {*ranks, *self.quantization_config.ranks}  # type: ignore[attr-defined]
        marks = {rf"(^|\.){re.escape(dense_weight(name))}$" for name in named}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | marks
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        attach(model)
        model.is_quantized = False  # its numbers are ordinary ones: it may be cast and trained
        return model

    def get_state_dict_and_metadata(  # type: ignore[override]
        self, model: Any
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """What `save_pretrained` writes; the config of the model gets the ranks that it has now.

        Args:
            model: the one that is saved, which may be a part of another.
        """
        ranks = ranks_of(model)
        model.config.quantization_config = FactoredConfig(ranks=ranks)
        sliced = {name for name, what in ranks.items() if isinstance(what, dict) and what.keys() == SLICED_KEYS}
        marks = {}
        for name in ranks.keys() - sliced:  # those have weights as before
            stack = stack_of(name)  # which transformers may take apart, so that its mark is a small stack
            num = len(model.get_submodule(name.rpartition(".")[0])) if stack else 0
            marks[dense_weight(name)] = torch.zeros(num, 2, 2) if stack else torch.empty(0)
        return model.state_dict() | marks, {RANKS: json.dumps(ranks)}


def put_ranks_(model: Any, ranks: Mapping[str, Any]) -> dict[str, Any]:
    """Puts a folder's factored layers, without values, into a dense model of transformers.

    Args:
        model: changed in place.
        ranks: of the folder's config.

    Returns: the ranks by the names that the layers have in this model.
    Raises:
        CheckpointError: they do not fit the model.
    """
    found = _resolved(model, ranks)
    try:
        factor(model, found)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the folder does not fit {type(model).__name__}: {error}") from None
    _tie_factors(model)  # transformers ties the weights once they are loaded
    return found


register_quantization_config(METHOD)(FactoredConfig)
register_quantizer(METHOD)(FactoredQuantizer)


def is_pretrained(model: nn.Module) -> bool:
    """Whether a model is one of transformers'."""
    return isinstance(model, PreTrainedModel)


def attach(model: nn.Module) -> None:
    """Lets `save_pretrained` of every model of transformers in this one write its factored layers."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            ranks = ranks_of(module)
            if ranks:
                module.config.quantization_config = FactoredConfig(ranks=ranks)
                module.hf_quantizer = FactoredQuantizer(FactoredConfig(ranks=ranks))  # type: ignore[assignment]
                _tie_factors(module)


def _tie_factors(model: Any) -> None:
    """Names, in what transformers knows of tied parameters, the factors in place of the weights that they replace."""
    low = {name: module for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, LowRank)}
    tied: dict[str, str] = {}
    for target, source in (model.all_tied_weights_keys or {}).items():
        mine, theirs = _factors(target, low), _factors(source, low)
        if len(mine) == len(theirs):  # a layer that was factored alone is tied no longer
            tied |= dict(zip(mine, theirs, strict=True))
    if tied != model.all_tied_weights_keys:
        model.all_tied_weights_keys = model._tied_weights_keys = tied


def _factors(name: str, low: Mapping[str, LowRank]) -> list[str]:
    """The parameters that a factored layer has in place of one: L and R of a weight; or the name as it is."""
    layer, _, local = name.rpartition(".")
    if layer not in low:
        return [name]
    return [f"{layer}.{one}" for one in (low[layer].names if local == "weight" else (f"1.{local}",))]


@contextmanager
def without_bars() -> Iterator[None]:
    """Without transformers' progress bars, which it shows also where the output is no terminal."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def save_folder(model: Any, folder: Path) -> None:
    """`save_pretrained`, with the ranks in the config.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    attach(model)
    try:
        with without_bars():
            model.save_pretrained(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: could not be written ({error.strerror}). Save elsewhere.") from error
    if not folder.is_dir():  # transformers logs, and writes nothing, where a file has that name
        raise CheckpointError(f"{folder}: is a file, wanted a folder. Save elsewhere.")


def load_folder(model: Any, folder: Path) -> Any:
    """`from_pretrained`, into a model that is there: its modules are replaced by those that were loaded.

    Raises:
        CheckpointError: the folder has no ranks, or does not fit the model, which is then as it was.
    """
    try:
        config = json.loads(read_text(folder / "config.json"))
        found = config.get("quantization_config") or {}
        ranks = found["ranks"] if found.get("quant_method") == METHOD else None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}: its config.json cannot be read ({error}). Save the model again.") from None
    if ranks is None:
        raise CheckpointError(f"{folder} was not written by save_compressed: its config.json names no ranks of gramian")
    dense: dict[str, nn.Module] = {}
    try:
        _, dense = factor(model, _resolved(model, ranks))
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    except (AttributeError, TypeError, ValueError, CheckpointError) as error:
        raise CheckpointError(f"{folder} does not fit {type(model).__name__}: {error}") from None
    finally:
        restore(model, dense)
    first = next(model.parameters())
    dtype = "auto" if first.is_meta else first.dtype
    try:
        with without_bars():
            loaded, info = type(model).from_pretrained(
                folder, dtype=dtype, output_loading_info=True, local_files_only=True
            )
        if info["missing_keys"]:
            raise ValueError(f"it holds no {some(sorted(info['missing_keys']))}")
        _check_fit({name: tuple(tensor.shape) for name, tensor in loaded.state_dict().items()}, wanted)
    except (CheckpointError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder} does not fit {type(model).__name__}: {_one_line(error)}") from None
    if not first.is_meta:
        loaded.to(first.device)
    loaded.train(model.training)
    for held in ("_modules", "_parameters", "_buffers"):
        setattr(model, held, getattr(loaded, held))
    model.config.quantization_config, model.hf_quantizer = loaded.config.quantization_config, loaded.hf_quantizer
    return model


def _resolved(model: Any, ranks: Mapping[str, Any]) -> dict[str, Any]:
    """The ranks and bits by the names that the layers have in this model.

    A folder may have been saved from a model with a head and be loaded without it, or the other way around.
    """
    base = f"{model.base_model_prefix}."
    open_(model, {one for name in openable(ranks) for one in (name, name.removeprefix(base), base + name)})
    names = {name for name, _ in model.named_modules()}
    found: dict[str, Any] = {}
    there: dict[str, str] = {}
    for name, rank in sorted(ranks.items()):  # a factored layer before its factors
        outer = name.rpartition(".")[0]
        if outer in ranks:  # one of the two factors, which the dense model does not have
            if outer in there:
                there[name] = there[outer] + name.removeprefix(outer)
                found[there[name]] = rank
            continue
        fitting = [n for n in (name, name.removeprefix(base), base + name) if n in names]
        if fitting:
            there[name] = fitting[0]
            found[fitting[0]] = rank
        elif model.base_model is model and name.partition(".")[0] not in model._modules:
            continue  # of a head, or another part that this model lacks as a whole
        elif name.startswith(base) or not any(n.startswith(base) for n in ranks):
            raise CheckpointError(f"the factored layer {name} is not in {type(model).__name__}")
    if ranks and not found:
        raise CheckpointError(f"none of the factored layers {some(ranks)} is in {type(model).__name__}")
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
