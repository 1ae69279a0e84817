"""Multiplying out: the dense layers that factored ones compute like, to be calibrated and cut again as a whole.

What is seen of a factored layer is then what would be seen of any: attention and recurrent modules take its product,
and a table and its head share it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gramian.compression.layers.lowrank import HOOKS, LowRank
from gramian.compression.layers.modules import clean_module_name
from gramian.compression.layers.opening import close_, is_open
from gramian.compression.layers.quantized import Quantized

__all__ = ["factored", "multiply_out_"]


def factored(model: nn.Module) -> dict[str, LowRank]:
    """The factored layers inside a model by name, each once; without those whose factors are integers."""
    return {
        clean_module_name(name): one
        for name, one in model.named_modules()
        if name and isinstance(one, LowRank) and not any(isinstance(factor, Quantized) for factor in one)
    }


def multiply_out_(model: nn.Module) -> Callable[[], None]:
    """Puts, in place, a dense layer with the product in the place of each factored one inside the model.

    Args:
        model: any module.

    Returns:
        What puts the factored layers back; their parameters were not touched.
    """
    lows = {id(low): low for low in factored(model).values()}
    made: dict[int, nn.Module] = {}
    shared: dict[tuple[int, int, torch.Size], nn.Parameter] = {}
    before: list[tuple[Any, type, dict[str, Any], dict[str, Any], dict[str, Any]]] = []
    for parent in list(model.modules()):
        if not lows or not (is_open(parent) or any(id(child) in lows for child in parent._modules.values())):
            continue
        before.append((parent, type(parent), dict(vars(parent)), dict(parent._modules), dict(parent._parameters)))
        for name, child in parent._modules.items():
            if id(child) in lows:
                low = lows[id(child)]
                if id(low) not in made:
                    dense: Any = _dense(low)
                    left, right = (id(factor.weight) for factor in low.sides)
                    dense.weight = shared.setdefault((left, right, dense.weight.shape), dense.weight)
                    made[id(low)] = dense
                parent._modules[name] = made[id(low)]
    if before:
        close_(model)

    def put_back() -> None:
        for parent, cls, own, modules, parameters in before:
            parent.__class__ = cls
            vars(parent).update(own)
            parent._modules.clear()
            parent._modules.update(modules)
            parent._parameters.clear()
            parent._parameters.update(parameters)
            if is_open(parent):
                parent.__dict__.pop("_flat_weights", None)  # which an opened module reads anew

    return put_back


@torch.no_grad()
def _dense(low: LowRank) -> nn.Module:
    """The layer that computes like a factored one, with its options, attributes and hooks."""
    first: Any
    second: Any
    first, second = low
    left, right = (factor.weight for factor in low.sides)
    kind = {"device": left.device, "dtype": left.dtype}
    bias = getattr(second, "bias", None)
    made: Any
    if low.is_table:
        options = {name: getattr(first, name) for name in ("padding_idx", "scale_grad_by_freq", "sparse")}
        made = nn.utils.skip_init(nn.Embedding, len(left), right.shape[1], **options, **kind)
    elif isinstance(first, nn.Linear):
        made = nn.utils.skip_init(nn.Linear, first.in_features, len(left), bias=bias is not None, **kind)
    else:
        options = {name: getattr(first, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        sides = (first.in_channels, len(left), first.kernel_size)
        made = nn.utils.skip_init(type(first), *sides, bias=bias is not None, **options, **kind)
    product = (left.flatten(1).double() @ right.flatten(1).double()).to(left.dtype)
    made.weight.copy_(product.reshape(made.weight.shape))
    if bias is not None:
        made.bias = bias
    made.__dict__.update({name: value for name, value in vars(low).items() if name not in vars(made)})
    made.__dict__.update({name: value for name, value in vars(low).items() if name in HOOKS})
    made.train(low.training)
    made.weight.requires_grad_(left.requires_grad)
    return made
