"""What gates are made with, and what moves their values and changes none: tables of torch's functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ADDCMUL",
    "ADDITIONS",
    "DIFFERENCES",
    "FUNCTIONS",
    "LERP",
    "MOVES",
    "NEGATIONS",
    "PRODUCTS",
    "QUOTIENTS",
    "REVERSED",
    "SELF_GATED",
    "SUMS",
]

ADDITIONS = {torch.add, Tensor.add, Tensor.__add__, Tensor.add_, Tensor.__iadd__, Tensor.__radd__}

# What a gate is made with: name, and the ends of its values. Of softplus and exp, sizes and step widths are made, which
# begin small on purpose.
FUNCTIONS: dict[Callable, tuple[str, float, float]] = {
    torch.sigmoid: ("sigmoid", 0.0, 1.0), Tensor.sigmoid: ("sigmoid", 0.0, 1.0), F.sigmoid: ("sigmoid", 0.0, 1.0),
    torch.sigmoid_: ("sigmoid", 0.0, 1.0), Tensor.sigmoid_: ("sigmoid", 0.0, 1.0),
    F.hardsigmoid: ("hardsigmoid", 0.0, 1.0),
    torch.tanh: ("tanh", -1.0, 1.0), Tensor.tanh: ("tanh", -1.0, 1.0), F.tanh: ("tanh", -1.0, 1.0),
}  # fmt: skip
# Units that are their own input times a gate: the gate, as a function of the input.
SELF_GATED: dict[Callable, tuple[str, Callable[[Tensor], Tensor]]] = {
    F.silu: ("SiLU", torch.sigmoid),
    F.gelu: ("GELU", torch.special.ndtr),
}
PRODUCTS = {
    torch.mul, Tensor.mul, Tensor.__mul__, Tensor.mul_, Tensor.__imul__, Tensor.__rmul__,
    torch.multiply, Tensor.multiply,
}  # fmt: skip
QUOTIENTS = {torch.div, Tensor.div, Tensor.__truediv__, Tensor.div_, Tensor.__itruediv__}
DIFFERENCES = {torch.sub, Tensor.sub, Tensor.__sub__, Tensor.sub_, Tensor.__isub__}
REVERSED = {Tensor.__rsub__, torch.rsub}
NEGATIONS = {torch.neg, Tensor.neg, Tensor.__neg__}
SUMS = {torch.sum, Tensor.sum}
LERP = {torch.lerp, Tensor.lerp}
ADDCMUL = {torch.addcmul, Tensor.addcmul}
# What moves values and changes none, dropout among them.
MOVES = {
    Tensor.view, Tensor.reshape, torch.reshape, Tensor.unsqueeze, torch.unsqueeze, Tensor.squeeze, torch.squeeze,
    Tensor.expand, Tensor.expand_as, Tensor.permute, torch.permute, Tensor.transpose, torch.transpose, Tensor.flatten,
    torch.flatten, Tensor.unflatten, torch.unflatten, Tensor.contiguous, Tensor.clone, torch.clone, Tensor.to,
    Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.type_as, Tensor.chunk, torch.chunk, Tensor.split, torch.split,
    Tensor.unbind, torch.unbind, Tensor.narrow, torch.narrow, Tensor.select, torch.select, Tensor.__getitem__,
    Tensor.movedim, torch.movedim, Tensor.repeat, Tensor.repeat_interleave, torch.repeat_interleave,
    torch.broadcast_to, Tensor.broadcast_to, F.dropout, F.dropout2d, F.interpolate,
}  # fmt: skip
