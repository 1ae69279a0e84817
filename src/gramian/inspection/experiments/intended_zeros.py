"""What is zero or of low rank on purpose: the factors of adapters, and the ends of branches that start at zero."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from gramian.report import Layer

__all__ = ["PRODUCT", "is_change", "is_factor", "is_product", "name_pattern", "starts_at_zero", "untrained_adapter"]

PRODUCT = "LoRA product"  # the kind of B A alone, without the weight that it changes

# What starts at zero: B of LoRA, by the names of PEFT, loralib, diffusers and kohya; and its like in other adapters of
# PEFT (LoHa, LoKr, OFT, BOFT, DeLoRA, RandLoRA).
_B = re.compile(
    r"(^|[._])(lora([._]embedding)?[._](B|up)|delora_B|hada_w2_b|lokr_w1(_b)?|b?oft_R|randlora_lambda)([._]|$)"
)
_FACTOR = re.compile(
    r"(^|[._])((de)?lora([._]embedding)?[._](A|B|up|down)|hada_[wt]\d(_[ab])?|lokr_[wt]\d(_[ab])?|b?oft_R|randlora_\w+)"
    r"([._]|$)"
)


def is_product(layer: Layer) -> bool:
    """Whether a row is the product B A of an adapter, whose rank is that of its factors."""
    return layer.kind == PRODUCT


def is_factor(name: str) -> bool:
    """Whether a parameter is a factor of an adapter by its name, which has a scale and a rank of its own."""
    return bool(_FACTOR.search(name))


def is_change(layer: Layer) -> bool:
    """Whether a row is zero until an adapter is trained: its B, or the product."""
    return is_product(layer) or bool(_B.search(layer.name))


def untrained_adapter(layers: Iterable[Layer]) -> str:
    """A note where every B of an adapter is zero, or empty."""
    changes = [layer for layer in layers if is_change(layer)]
    if not changes or any(layer.spectral_norm != 0.0 for layer in changes):
        return ""
    return "The adapter has not been trained yet: what starts at zero (B of LoRA) is zero, so the model is its base"


def starts_at_zero(layers: Iterable[Layer]) -> set[str]:
    """The names of zero matrices that may have started at zero on purpose, in a model of which others are not zero.

    Heads, tables, an adapter's B, and the ends of branches start at zero in some models; the last in every block alike.
    So of the layers whose names differ from a zero one's in one number, all of one kind are zero too (the same layer of
    all blocks), or none comes after it (the last layer of a chain). Another was more likely never loaded.
    """
    layers = [layer for layer in layers if layer.spectral_norm is not None]
    if not any(layer.spectral_norm for layer in layers):
        return set()
    hidden = [layer for layer in layers if layer.role == "hidden"]
    rows: dict[tuple[str, ...], list[tuple[int, bool]]] = {}
    for layer in hidden:
        for row, number in _rows(layer.name):
            rows.setdefault(row, []).append((number, layer.spectral_norm == 0.0))
    names = {layer.name for layer in layers if layer.spectral_norm == 0.0}
    return names - {layer.name for layer in hidden if layer.spectral_norm == 0.0 and _stands_out(layer.name, rows)}


def _rows(name: str) -> Iterator[tuple[tuple[str, ...], int]]:
    """The groups of layers whose names differ from this one in one number, and that number."""
    words = name.split(".")
    for i, word in enumerate(words):
        if word.isdigit():
            yield (*words[:i], "*", *words[i + 1 :]), int(word)


def _stands_out(name: str, rows: dict[tuple[str, ...], list[tuple[int, bool]]]) -> bool:
    """Whether a zero matrix has others in its place in other blocks or after it in its chain, and they are not zero."""
    others = [(row, number, rows[row]) for row, number in _rows(name) if len(rows[row]) > 1]
    alike = any(all(zero for _, zero in row) for _, _, row in others)
    ends = any(row[-2:-1] == ("*",) and number == max(n for n, _ in of) for row, number, of in others)
    return bool(others) and not alike and not (ends and len(others) == 1)


def name_pattern(name: str) -> str:
    """The name with `*` for the numbers of layers and experts, which groups layers of one kind."""
    return ".".join("*" if word.isdigit() else word for word in name.split("."))
