"""Gradients of any magnitude, scaled so that their squares neither overflow nor vanish."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gramian.linalg.engine.scaling import peak, pow2
from gramian.optim.stacks import State

__all__ = ["as_long_as_polar", "rescale_"]

SPAN = 24  # powers of two by which gradients may grow or shrink before their unit changes
LARGEST = {torch.float32: 126, torch.float64: 1022}  # largest k for which 2**k and 2**-k are both normal numbers


def rescale_(g: Tensor, state: State, powers: Mapping[str, int]) -> None:
    """Divides each matrix's gradient, in place, by the unit in which its state is stored, and keeps that unit suitable.

    The unit is a power of two for each matrix, `2 ** state["unit"]` (K, 1, 1), one at first. It changes to the size of
    the largest entry of a gradient that is 2²⁴ times larger; or of one 2²⁴ times smaller, once the buffers of power 1
    are that small too. `powers` says by which power of the unit each buffer scales; they are converted, exactly but for
    underflow. Where a buffer or its square would overflow in the new unit, the state of that matrix is reset to zero.
    """
    unit = state["unit"]
    largest = peak(g, (-2, -1))
    wanted = torch.frexp(largest)[1].to(g.dtype).clamp_(-LARGEST[g.dtype], LARGEST[g.dtype])
    moves = (largest > 0) & ((wanted - unit).abs() > SPAN)
    if g.device.type != "cpu" or bool(moves.any()):
        held = {name: power for name, power in powers.items() if name in state}
        small = torch.ones_like(moves)
        for name in (name for name, power in held.items() if power == 1):
            top = peak(state[name], (-2, -1))
            small &= (top == 0) | (torch.frexp(top)[1] < -SPAN)
        moves &= (wanted > unit) | small
        shift = torch.where(moves, unit - wanted, 0.0)
        lost = torch.zeros_like(moves)
        for name, power in held.items():
            top = peak(state[name], (-2, -1))
            lost |= (shift > 0) & (top > 0) & (torch.frexp(top)[1] + shift * power > LARGEST[g.dtype] // 2)
        for name, power in held.items():
            _ldexp_(state[name].masked_fill_(lost, 0.0), shift * power)
    unit.copy_(torch.where(moves, wanted, unit))
    if g.device.type != "cpu" or bool(unit.any()):
        _ldexp_(g, -unit)


def as_long_as_polar(d: Tensor) -> Tensor:
    """Each matrix (K, m, n), scaled to the Frobenius norm of a polar factor, √min(m, n); zeros stay zeros.

    >>> as_long_as_polar(torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]])).tolist()
    [[[0.6000000238418579, 0.800000011920929]], [[0.0, 0.0]]]
    """
    norm = torch.linalg.vector_norm(d, dim=(-2, -1), keepdim=True)
    return d * torch.where(norm > 0, min(d.shape[-2:]) ** 0.5 / norm, 0.0)


def _ldexp_(x: Tensor, exponent: Tensor) -> None:
    x.mul_(pow2(exponent.clamp(-LARGEST[x.dtype], LARGEST[x.dtype]).long()).to(x.dtype))
