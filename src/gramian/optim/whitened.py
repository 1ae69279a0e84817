"""Muon in the metric of what enters a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from gramian import random
from gramian.errors import InputError
from gramian.optim.batches import State
from gramian.optim.muon import average, look_ahead, orthogonal
from gramian.optim.scaling import rescale_
from gramian.optim.shell import MatrixOptimizer, Recipe, Shared, Turn

__all__ = ["WhitenedMuon"]

SIDES = ("right", "left")


def init(m: Tensor, options: Mapping[str, Any]) -> State:
    """The momentum; of each second moment of the gradients, gᵀg and g gᵀ, leading eigenvectors and their values."""
    num = m.shape[0]
    state = {
        "momentum": torch.zeros_like(m, memory_format=torch.contiguous_format),
        "trace": m.new_zeros(num, 1, 1),
        "unit": m.new_zeros(num, 1, 1),
    }
    for side, size in zip(SIDES, (m.shape[-1], m.shape[-2]), strict=True):
        rank = min(options["rank"], size)
        generator = torch.Generator().manual_seed(size)
        start = random.orthogonal(size, rank, generator=generator, dtype=m.dtype, device=m.device)
        state[f"{side}_basis"] = start.repeat(num, 1, 1)
        state[f"{side}_values"] = m.new_zeros(num, 1, rank)
    return state


def update(g: Tensor, state: State, turn: Turn) -> Tensor:
    """P polar(P B Q) Q, scaled to the norm of a polar factor, with P ∝ (L + λ)^(-1/2) and Q ∝ (R + λ)^(-1/2)."""
    options = turn.options
    rescale_(g, state, {"momentum": 1, "trace": 2, "left_values": 2, "right_values": 2})
    average(state["momentum"], g, options["momentum"], turn)
    if turn.due is None or len(turn.due):
        _follow(g, state, turn)
    d = look_ahead(g, state["momentum"], turn)
    cuts = {side: _cut(state, side, options["damping"]) for side in SIDES}
    d = _whiten(orthogonal(_whiten(d, state, cuts), turn).to(g.dtype), state, cuts)
    norm = torch.linalg.vector_norm(d, dim=(-2, -1), keepdim=True)
    return d.mul_(min(d.shape[-2:]) ** 0.5 / norm.clamp_min_(torch.finfo(d.dtype).tiny))


def _follow(g: Tensor, state: State, turn: Turn) -> None:
    """One step of orthogonal iteration on the running mean of each second moment, of which the leading part is kept."""
    at, beta = slice(None) if turn.due is None else turn.due, turn.options["moment_beta"]
    g, trace = g[at], state["trace"][at]
    square = torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True).square()
    seen = square > 0
    state["trace"][at] = torch.where(seen, torch.lerp(square, trace, beta), trace)
    for side in SIDES:
        basis, values = state[f"{side}_basis"][at], state[f"{side}_values"][at]
        x = g if side == "right" else g.mT
        sketch = x.mT @ (x @ basis)
        q, r = torch.linalg.qr(torch.lerp(sketch, basis * values, beta))
        state[f"{side}_basis"][at] = torch.where(seen, q, basis)
        state[f"{side}_values"][at] = torch.where(seen, r.diagonal(dim1=-2, dim2=-1).abs()[:, None, :], values)


def _cut(state: State, side: str, damping: float) -> Tensor:
    """By how much P is below one along each vector of the basis, in units of what it is elsewhere: (K, 1, r)."""
    values, trace, (size, rank) = state[f"{side}_values"], state["trace"], state[f"{side}_basis"].shape[-2:]
    extra = damping / size * trace
    rest = (trace - values.sum(-1, keepdim=True)).clamp_min(0) / max(size - rank, 1)
    return 1 - ((rest + extra) / (values + extra).clamp_min(torch.finfo(values.dtype).tiny)).sqrt()


def _whiten(d: Tensor, state: State, cuts: Mapping[str, Tensor]) -> Tensor:
    """(I − V diag(left) Vᵀ) d (I − U diag(right) Uᵀ)."""
    u, v = state["right_basis"], state["left_basis"]
    d = torch.baddbmm(d, (d @ u) * cuts["right"], u.mT, alpha=-1)
    return torch.baddbmm(d, v, (v.mT @ d) * cuts["left"].mT, alpha=-1)


class WhitenedMuon(MatrixOptimizer):
    """dev"""

    recipe = Recipe(init, update)

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 0.3,
        *,
        momentum: float = 0.9,
        nesterov: bool = True,
        rank: int = 16,
        moment_beta: float = 0.9,
        damping: float = 0.1,
        rtol: float = 0.1,
        **shared: Unpack[Shared],
    ) -> None:
        if not damping > 0:
            raise InputError(f"WhitenedMuon: damping must be positive, got {damping}")
        options = {
            "momentum": momentum,
            "nesterov": nesterov,
            "rank": rank,
            "moment_beta": moment_beta,
            "damping": damping,
            "rtol": rtol,
        }
        super().__init__(params, lr, options, **shared)
