"""The matrices that an adapter adds to a model: they start as zero and have a low rank by design."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from gramian.checkpoint import Checkpoint, Entry
from gramian.checkpoint.composed import ADAPTER_CONFIG
from gramian.inspection.matching import some
from gramian.report import Layer

__all__ = ["ADAPTER", "adapted_in", "adapter_of", "untrained"]

ADAPTER = "adapter"
"""The kind of such a matrix. Zero weights, a low rank and a dominant direction are no findings there."""

_PREFIXES = {"LOHA": "hada_", "ADALORA": "lora_"}


def adapter_of(entry: Entry, checkpoint: Checkpoint) -> str:
    """The module that a tensor of a file adapts, by the names of its parts; empty where it is of no adapter.

    PEFT names the parameters of a method by its name and `_`, but for two older ones.

    Args:
        entry: of the tensor; not a weight to which the adapter was added.
        checkpoint: that holds it, with `adapter_config.json` beside it or not.
    """
    if entry.made and "base" in entry.made.parts:
        return ""
    method = str(checkpoint.settings.get(ADAPTER_CONFIG, {}).get("peft_type", "LORA"))
    names = [part.name for part in entry.made.parts.values()] if entry.made else [entry.name]
    return next((module for name in names if (module := _by_name(name, method))), "")


def _by_name(name: str, method: str) -> str:
    prefix = _PREFIXES.get(method.upper(), f"{method.lower()}_")
    found = re.search(rf"(^|[._])({re.escape(prefix)})\w*(\.[^.]+){{0,2}}$", name)
    return (name[: found.start()] or name) if found else ""


def adapted_in(model: nn.Module, name: str) -> str:
    """The module that a parameter adapts: PEFT's modules list the names of their adapters, others are LoRA by name."""
    parts = name.split(".")
    for count in range(len(parts) - 1, -1, -1):
        owner = ".".join(parts[:count])
        if parts[count] in getattr(model.get_submodule(owner), "adapter_layer_names", ()):
            return owner or name
    return _by_name(name, "LORA")


def untrained(layers: Sequence[Layer], adapted: Mapping[str, str]) -> list[str]:
    """A note on the adapters that are zero, as they are before training: one of their factors is.

    Args:
        layers: all rows.
        adapted: the module that each adapter's matrix adapts, by the matrix's name.
    """
    zero = {adapted[layer.name] for layer in layers if layer.name in adapted and layer.spectral_norm == 0.0}
    modules = list(dict.fromkeys(adapted.values()))
    if not zero:
        return []
    if len(zero) == len(modules):
        where = "its one module" if len(modules) == 1 else f"all {len(modules):,} modules"
        return [f"The adapter has not been trained yet: it is zero in {where}."]
    names = some([module for module in modules if module in zero])
    return [f"The adapter is zero, as before training, in some of its {len(modules):,} modules: {names}"]
