"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from gramian.linalg.engine import lapack as factor
from gramian.optim.batches import State
from gramian.optim.muon import average, look_ahead
from gramian.optim.scaling import rescale_
from gramian.optim.shell import MatrixOptimizer, Recipe, Shared, Turn
from gramian.optim.sides import REFRESH, Sides, check_sides, sides_of

__all__ = ["SOAP"]

DAMPING = 1e-3
"""Of Adam's denominator, times the root mean square of the matrix's own: below it an entry is noise of rounding."""


def init(m: Tensor, options: Mapping[str, Any]) -> State:
    """Per side with a basis Q: Q and QᵀMQ of the gradients' second moment M; Adam's two moments in that basis."""
    num = m.shape[0]
    state = {
        "momentum": m.new_zeros(m.shape),
        "variance": m.new_zeros(m.shape),
        "weight": m.new_zeros(num, 1, 1),
        "unit": m.new_zeros(num, 1, 1),
    }
    for side, size in sides_of(m.shape, options["sides"]):
        state[f"{side}_basis"] = torch.eye(size, dtype=m.dtype, device=m.device).repeat(num, 1, 1)
        state[f"{side}_moment"] = m.new_zeros(num, size, size)
    return state


def update(g: Tensor, state: State, turn: Turn) -> Tensor:
    """Q_L D Q_Rᵀ, with D Adam's direction of Q_Lᵀ g Q_R."""
    options = turn.options
    rescale_(g, state, {"momentum": 1, "variance": 2, "left_moment": 2, "right_moment": 2})
    sides = [side for side, _ in sides_of(g.shape, options["sides"])]
    for side in sides:
        g = _into(g, state[f"{side}_basis"], side)
    for side in sides:
        second = g @ g.mT if side == "left" else g.mT @ g
        average(state[f"{side}_moment"], second, options["moment_beta"], turn)
    if turn.due is None or len(turn.due):
        for side in sides:
            g = _turn_basis(g, state, side, turn.due)
    average(state["momentum"], g, options["momentum"], turn)
    average(state["variance"], g.square(), options["variance_beta"], turn)
    average(state["weight"], torch.ones_like(state["weight"]), options["variance_beta"], turn)
    root = state["variance"].sqrt()
    floor = state["variance"].mean((-2, -1), keepdim=True).sqrt() * DAMPING
    # Not in place: without Nesterov what is looked at is the momentum itself.
    d = look_ahead(g, state["momentum"], turn) / root.add_(floor.clamp_min_(torch.finfo(g.dtype).tiny))
    # Entries of Adam's direction are ±1 at most, as a rule; so its norm is at most that of a polar factor.
    d *= state["weight"].sqrt() / max(d.shape[-2:]) ** 0.5
    for side in sides:
        d = _out_of(d, state[f"{side}_basis"], side)
    return d


def _into(x: Tensor, basis: Tensor, side: str) -> Tensor:
    return basis.mT @ x if side == "left" else x @ basis


def _out_of(x: Tensor, basis: Tensor, side: str) -> Tensor:
    return basis @ x if side == "left" else x @ basis.mT


def _turn_basis(g: Tensor, state: State, side: str, due: Tensor | None) -> Tensor:
    """Turns a basis to the eigenvectors of its second moment, and all that is told in it; returns `g` so turned.

    With R the eigenvectors of QᵀMQ: Q ← QR, momentum ← Rᵀ·momentum, and the variance, which is of squares,
    ← (R∘R)ᵀ·variance: right where the entries in the old basis are uncorrelated, and never changing their sum.
    """
    at = slice(None) if due is None else due
    moment = state[f"{side}_moment"][at]
    size = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    scaled = moment / size.clamp_min(torch.finfo(g.dtype).tiny)
    values, turn, ok = factor.eigh(scaled)
    good = ok & turn.isfinite().all(-1).all(-1) & (size[:, 0, 0] > 0)
    turn = torch.where(good[:, None, None], turn, torch.eye(turn.shape[-1], dtype=turn.dtype, device=turn.device))
    diagonal = torch.diag_embed(values * size[:, :, 0])
    state[f"{side}_moment"][at] = torch.where(good[:, None, None], diagonal, moment)
    basis = state[f"{side}_basis"][at] @ turn
    # One step of Newton–Schulz: rounding would otherwise add up over thousands of turns.
    state[f"{side}_basis"][at] = 1.5 * basis - 0.5 * basis @ (basis.mT @ basis)
    state["momentum"][at] = _into(state["momentum"][at], turn, side)
    state["variance"][at] = _into(state["variance"][at], turn.square(), side)
    if due is None:
        return _into(g, turn, side)
    g[due] = _into(g[due], turn, side)
    return g


class SOAP(MatrixOptimizer):
    """Adam in the eigenbasis of the gradients' second moments: `W ← W − lr · s · Q_L D Q_Rᵀ`.

    `Q_L` and `Q_R` are the eigenvectors of the running means of `g gᵀ` and `gᵀ g`, and `D` is Adam's direction of
    `Q_Lᵀ g Q_R`. The moments are kept in the basis and turn with it.

    Args:
        params: the model, or its parameters.
        lr: length of a step of the matrices, in the unit that `scale` sets.
        momentum, nesterov: of the first moment; whether it looks ahead by one update.
        variance_beta, moment_beta: of Adam's second moment and of the second moments whose eigenvectors make the basis.
        sides: `"both"`; `"small"`, the smaller one only; `"auto"`: both where the longer side is less than twice the
            shorter one.
        shared: see `MatrixOptimizer`; `refresh`, the steps between two turns of a basis, is 10 by default.

    Cost: per step and side of size k, `6 m n k` operations; at a turn, an eigendecomposition and `6 k³` more.
    Source: Vyas et al., SOAP (2409.11321), algorithm 3; one side: §7.1 there.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> optimizer = SOAP(net, lr=0.05, refresh=5)
    >>> sorted(group["refresh"] for group in optimizer.param_groups if group["direction"] == "matrix")
    [5]
    """

    recipe = Recipe(init, update)

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 0.05,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        variance_beta: float = 0.95,
        moment_beta: float = 0.95,
        sides: Sides = "auto",
        **shared: Unpack[Shared],
    ) -> None:
        check_sides(type(self).__name__, sides)
        shared.setdefault("refresh", REFRESH)
        options = {
            "momentum": momentum,
            "nesterov": nesterov,
            "variance_beta": variance_beta,
            "moment_beta": moment_beta,
            "sides": sides,
        }
        super().__init__(params, lr, options, **shared)
