"""Elimination: units of a layer's input are removed one after the other, each where the loss notices least.

With A the second moment of the inputs and G that of the output gradients, removing column j of W and moving the others
to make up for it costs `½ wⱼᵀ G wⱼ / (A⁻¹)ⱼⱼ`. A is then conditioned on what is left, and the next is chosen. After any
number of steps the columns that are left are the least-squares ones: `W A_:K A_KK⁻¹`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gramian.compression.calibration.weighting import Weighting

__all__ = ["Elimination", "eliminated"]

SPARSE = 0.8
"""Below this share of what is kept in memory, what is gone is dropped from it."""


class Elimination(NamedTuple):
    """The order in which units go, and what each step takes.

    Attributes:
        order: of units, the first to go first.
        left, right: (m, n) and (n, n): the columns removed by the step for each column, and how the inputs make it up;
            in the order of `order`, the columns of a unit one after the other. The sum of the first steps' products is
            what W loses.
        values: (n,), the square root of twice the cost of each.
    """

    order: tuple[int, ...]
    left: Tensor
    right: Tensor
    values: Tensor


def eliminated(w: Tensor, weighting: Weighting, num: int) -> Elimination:
    """Removes all units of a matrix, one after the other.

    Args:
        w: (m, n), the matrix.
        weighting: of its two sides.
        num: units, each of n / num columns in a row.

    Cost: half of `n² (n + 2 m)` multiplications in float64, which go through memory: seconds at n = 1,536.
    Source: optimal brain surgeon (Hassibi & Stork 1992, eq. 5), of whole columns; of several at once: Kurtic et al.
    (ZipLM, 2302.04089, eq. 4).

    >>> one = torch.ones(2, dtype=torch.float64)
    >>> from gramian.compression.calibration.shrinkage import Roots
    >>> weights = Weighting(Roots(one, one), Roots(one, one), None, True)
    >>> eliminated(torch.tensor([[3.0, 1.0], [0.0, 1.0]]), weights, 2).order
    (1, 0)
    """
    w = w.double()
    n, size = w.shape[1], w.shape[1] // num
    inverse = weighting.columns.inverse.double()
    state = _State(
        w.clone(),
        weighting.rows.to(w.dtype).left(w),
        inverse.square().diag() if inverse.ndim == 1 else inverse @ inverse.mT,
        torch.arange(num, device=w.device),
    )
    left, right, values = torch.zeros_like(w), w.new_zeros(n, n), w.new_zeros(n)
    alive, order = torch.ones(num, dtype=torch.bool, device=w.device), []
    for step in range(num):
        if num - step < SPARSE * len(state.units):  # what is gone takes no more time
            state = state.without(alive, size)
            alive = alive[alive]
        unit = int(torch.where(alive, _costs(state.half, state.inverse, len(alive)), torch.inf).argmin())
        columns = (state.units[:, None] * size + torch.arange(size, device=w.device)).flatten()
        for i, j in enumerate(range(unit * size, (unit + 1) * size)):
            at = step * size + i
            pivot = state.inverse[j, j].clamp_min(1e-300)
            row = state.inverse[j] / pivot
            left[:, at], right[at, columns] = state.w[:, j], row
            values[at] = state.half[:, j].norm() / pivot.sqrt()
            state.take_(j, row)
        alive[unit] = False
        order.append(int(state.units[unit]))
    return Elimination(tuple(order), left, right, values)


class _State(NamedTuple):
    """What is left: W, `G^½ W` and the inverse of A conditioned on it, and which units the columns are."""

    w: Tensor
    half: Tensor
    inverse: Tensor
    units: Tensor

    def without(self, alive: Tensor, size: int) -> _State:
        at = alive.repeat_interleave(size)
        return _State(self.w[:, at], self.half[:, at], self.inverse[at][:, at], self.units[alive])

    def take_(self, j: int, row: Tensor) -> None:
        """Removes a column, and moves the others."""
        for one in (self.w, self.half, self.inverse):
            one.addr_(one[:, j].clone(), row, alpha=-1)
            one[:, j] = 0
        self.inverse[j] = 0


def _costs(half: Tensor, inverse: Tensor, num: int) -> Tensor:
    """(u,), twice what removing each unit costs, as things are."""
    size = len(inverse) // num
    if size == 1:
        return half.square().sum(0) / inverse.diagonal().clamp_min(1e-300)
    at = torch.arange(num, device=half.device)
    blocks = inverse.view(num, size, num, size)[at, :, at]
    parts = half.view(-1, num, size).permute(1, 2, 0)  # (u, size, m)
    eye = torch.eye(size, dtype=half.dtype, device=half.device)
    zero = blocks.diagonal(dim1=1, dim2=2).sum(1) <= 0  # gone
    solved = torch.linalg.solve(torch.where(zero[:, None, None], eye, blocks), parts)
    return (parts * solved).sum((1, 2))
