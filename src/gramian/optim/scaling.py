"""Gradients of any size: squares of theirs that neither overflow nor vanish."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gramian.optim.batches import State

__all__ = ["as_long_as_polar", "peak", "rescale_"]

SPAN = 24  # powers of two by which gradients may grow or shrink before their unit moves
LARGEST = {torch.float32: 126, torch.float64: 1022}  # the exponent of a power of two that is normal, as its inverse is


def peak(x: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """The largest size of an entry, NaN if there is one; over `dim`, kept, or over all.

    >>> peak(torch.tensor([[1.0, -3.0]]))
    tensor(3.)
    """
    if dim is None:
        return torch.maximum(x.amax(), -x.amin())
    return torch.maximum(x.amax(dim, keepdim=True), -x.amin(dim, keepdim=True))


def rescale_(g: Tensor, state: State, powers: Mapping[str, int]) -> None:
    """Divides each matrix's gradient by the power of two in which its state is told, in place.

    The unit, `2 ** state["unit"]` (K, 1, 1), is one at first. It moves to the largest entry of a gradient that is 2²⁴
    times larger, or 2²⁴ times smaller with a momentum that is so too, and the state with it: each tensor named in
    `powers` by that power of the unit; exact but for underflow. Where one of them, or its squares, would overflow in
    the new unit, all that was told in the old one is forgotten.
    """
    unit = state["unit"]
    largest = peak(g, (-2, -1))
    wanted = torch.frexp(largest)[1].to(g.dtype).clamp_(-LARGEST[g.dtype], LARGEST[g.dtype])
    moves = (largest > 0) & ((wanted - unit).abs() > SPAN)
    if g.device.type != "cpu" or bool(moves.any()):
        known = peak(state["momentum"], (-2, -1))
        moves &= (wanted > unit) | (known == 0) | (torch.frexp(known)[1] < -SPAN)
        shift = torch.where(moves, unit - wanted, 0.0)
        told = {name: power for name, power in powers.items() if name in state}
        lost = torch.zeros_like(moves)
        for name, power in told.items():
            top = peak(state[name], (-2, -1))
            lost |= (shift > 0) & (top > 0) & (torch.frexp(top)[1] + shift * power > LARGEST[g.dtype] // 2)
        for name, power in told.items():
            _ldexp_(state[name].masked_fill_(lost, 0.0), shift * power)
    unit.copy_(torch.where(moves, wanted, unit))
    if g.device.type != "cpu" or bool(unit.any()):
        _ldexp_(g, -unit)


def as_long_as_polar(d: Tensor) -> Tensor:
    """Each matrix (K, m, n) at the Frobenius norm of a polar factor, √min(m, n); zeros stay zeros.

    >>> as_long_as_polar(torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]])).tolist()
    [[[0.6000000238418579, 0.800000011920929]], [[0.0, 0.0]]]
    """
    norm = torch.linalg.vector_norm(d, dim=(-2, -1), keepdim=True)
    return d * torch.where(norm > 0, min(d.shape[-2:]) ** 0.5 / norm, 0.0)


def _ldexp_(x: Tensor, exponent: Tensor) -> None:
    x.mul_(torch.exp2(exponent.clamp(-LARGEST[x.dtype], LARGEST[x.dtype])))
