"""Slicing: layers with fewer rows and columns stay what they are, and remember what a file has to say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian.compression.layers.narrow_attention import narrowed_

__all__ = ["SLICED", "SLICED_KEYS", "resized", "sliced_"]

SLICED = "_gramian_sliced"
"""The attribute of a module with what changed: shapes of parameters and buffers, and numbers among its attributes."""

SLICED_KEYS = {"shapes", "numbers"}
"""Its keys."""

FEATURES = {
    "rows": ("out_features", "out_channels", "nf", "num_features", "num_channels"),
    "columns": ("in_features", "in_channels", "nx"),
}
"""What layers call the number of their outputs and inputs."""


@torch.no_grad()
def sliced_(layer: nn.Module, kept: Mapping[str, tuple[int, Tensor]], numbers: Mapping[str, int]) -> None:
    """Takes entries of a layer's parameters and buffers along one dimension, in place.

    Args:
        layer: any module.
        kept: by the local name of a tensor, the dimension and the entries that stay, in their order.
        numbers: attributes that change with it.
    """
    shapes: dict[str, list[int]] = {}
    for name, (dim, at) in kept.items():
        tensor = layer._parameters.get(name) if name in layer._parameters else layer._buffers.get(name)
        assert tensor is not None
        smaller = tensor.index_select(dim, at.to(tensor.device)).contiguous()
        _put(layer, name, smaller)
        shapes[name] = list(smaller.shape)
    _remember(layer, shapes, numbers)


def _put(layer: nn.Module, name: str, tensor: Tensor) -> None:
    if name in layer._parameters:
        old = layer._parameters[name]
        assert old is not None
        layer._parameters[name] = nn.Parameter(tensor, old.requires_grad)
    else:
        layer._buffers[name] = tensor


def _remember(module: nn.Module, shapes: Mapping[str, Sequence[int]], numbers: Mapping[str, int]) -> None:
    known = getattr(module, SLICED, {"shapes": {}, "numbers": {}})
    for name, value in numbers.items():
        setattr(module, name, value)
    made = {"shapes": {**known["shapes"], **shapes}, "numbers": {**known["numbers"], **numbers}}
    setattr(module, SLICED, made)
    if type(module) is nn.MultiheadAttention:
        narrowed_(module)


def resized(layer: nn.Module, what: Mapping[str, Any]) -> nn.Module:
    """A layer of the sizes that a file tells, without values.

    Args:
        layer: as it was before; it stays.
        what: what `SLICED` held.

    Returns:
        A module that shares with the layer what did not change.

    Raises:
        ValueError: the layer has no such tensors or numbers, or they would grow.
    """
    shapes, numbers = what.get("shapes"), what.get("numbers")
    if not isinstance(shapes, dict) or not isinstance(numbers, dict):
        raise ValueError(f"a sliced layer has shapes and numbers, got {dict(what)!r:.60}")
    made = layer.__new__(type(layer))
    made.__dict__.update(layer.__dict__)
    for held in ("_parameters", "_buffers", "_modules"):
        made.__dict__[held] = dict(layer.__dict__[held])
    for name, shape in shapes.items():
        old = made._parameters.get(name) if name in made._parameters else made._buffers.get(name)
        known = () if old is None else old.shape
        fits = isinstance(shape, list) and len(shape) == len(known) > 0
        if old is None or not fits or not all(type(d) is int and 0 < d <= o for d, o in zip(shape, known, strict=True)):
            raise ValueError(f"{name} of a {type(layer).__name__} cannot have shape {shape!r:.60}")
        _put(made, name, old.detach()[tuple(slice(d) for d in shape)].clone())
    for name, value in numbers.items():
        if type(vars(layer).get(name)) is not int or type(value) is not int or not 0 < value <= vars(layer)[name]:
            raise ValueError(f"{name} of a {type(layer).__name__} cannot be {value!r:.60}")
    _remember(made, shapes, numbers)
    return made
