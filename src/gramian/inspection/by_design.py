"""What is zero or of low rank on purpose: the factors of adapters, and the ends of branches that start at zero."""

from __future__ import annotations

import re
from collections.abc import Iterable

from gramian.report import Layer

__all__ = ["PRODUCT", "is_change", "is_factor", "is_product", "name_pattern", "starts_at_zero", "untrained_adapter"]

PRODUCT = "LoRA product"  # the kind of B A alone, without the weight that it changes

# B of LoRA, by the names of PEFT, loralib, diffusers and kohya: it starts at zero.
_B = re.compile(r"(^|[._])lora([._]embedding)?[._](B|up)([._]|$)")
_FACTOR = re.compile(r"(^|[._])lora([._]embedding)?[._](A|B|up|down)([._]|$)")


def is_product(layer: Layer) -> bool:
    """Whether a row is the product B A of an adapter, whose rank is that of its factors."""
    return layer.kind == PRODUCT


def is_factor(name: str) -> bool:
    """Whether a parameter is a factor of LoRA by its name, which has a scale and a rank of its own."""
    return bool(_FACTOR.search(name))


def is_change(layer: Layer) -> bool:
    """Whether a row is zero until an adapter is trained: its B, or the product."""
    return is_product(layer) or bool(_B.search(layer.name))


def untrained_adapter(layers: Iterable[Layer]) -> str:
    """A note where every B of an adapter is zero, or empty."""
    changes = [layer for layer in layers if is_change(layer)]
    if not changes or any(layer.spectral_norm != 0.0 for layer in changes):
        return ""
    return "The adapter has not been trained yet: every B is zero, so the model is its base"


def starts_at_zero(layers: Iterable[Layer]) -> set[str]:
    """The names of zero matrices that may have started at zero on purpose, in a model of which others are not zero.

    Heads, tables, an adapter's B, and the ends of residual branches start at zero in some models; the last in every
    block alike. So a zero matrix that is not zero in another block was more likely never loaded.
    """
    layers = [layer for layer in layers if layer.spectral_norm is not None]
    live = [layer for layer in layers if layer.spectral_norm]
    others = {name_pattern(layer.name) for layer in live if layer.role == "hidden"}
    return {
        layer.name
        for layer in layers
        if live and not layer.spectral_norm and (layer.role != "hidden" or name_pattern(layer.name) not in others)
    }


def name_pattern(name: str) -> str:
    """The name with `*` for the numbers of layers and experts, which groups layers of one kind."""
    return ".".join("*" if word.isdigit() else word for word in name.split("."))
