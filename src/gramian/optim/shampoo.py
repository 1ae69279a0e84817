"""Shampoo: the gradient between inverse roots of its second moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from gramian import linalg
from gramian.optim.batches import State
from gramian.optim.muon import average, look_ahead
from gramian.optim.scaling import as_long_as_polar, rescale_
from gramian.optim.shell import MatrixOptimizer, Recipe, Shared, Turn
from gramian.optim.sides import REFRESH, Sides, check_sides, sides_of

__all__ = ["Shampoo"]


def init(m: Tensor, options: Mapping[str, Any]) -> State:
    """The momentum, and per side the second moment of the gradients and its inverse root."""
    num = m.shape[0]
    state = {
        "momentum": m.new_zeros(m.shape),
        "unit": m.new_zeros(num, 1, 1),
        "fallbacks": m.new_zeros(num, 1, 1),
    }
    for side, size in sides_of(m.shape, options["sides"]):
        state[f"{side}_moment"] = m.new_zeros(num, size, size)
        state[f"{side}_root"] = torch.eye(size, dtype=m.dtype, device=m.device).repeat(num, 1, 1)
    return state


def update(g: Tensor, state: State, turn: Turn) -> Tensor:
    """L^(-1/p) B R^(-1/p), scaled to the norm of a polar factor; p is twice the number of sides."""
    options = turn.options
    rescale_(g, state, {"momentum": 1, "left_moment": 2, "right_moment": 2})
    sides = [side for side, _ in sides_of(g.shape, options["sides"])]
    for side in sides:
        second = g @ g.mT if side == "left" else g.mT @ g
        average(state[f"{side}_moment"], second, options["moment_beta"], turn)
        if turn.due is None or len(turn.due):
            _renew(state, side, 2 * len(sides), turn)
    average(state["momentum"], g, options["momentum"], turn)
    d = look_ahead(g, state["momentum"], turn)
    for side in sides:
        d = state[f"{side}_root"] @ d if side == "left" else d @ state[f"{side}_root"]
    return as_long_as_polar(d)


def _renew(state: State, side: str, p: int, turn: Turn) -> None:
    """The inverse p-th roots of the matrices whose turn it is; where one is not certified, the old one stays."""
    at = slice(None) if turn.due is None else turn.due
    moment = state[f"{side}_moment"][at]
    size = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    ok = size > 0
    # In units of its mean eigenvalue, so that the root is of the order of one and `damping` is relative.
    scaled = moment / size.clamp_min(torch.finfo(moment.dtype).tiny)[:, None, None]
    root, certificate = linalg.inv_root_ex(scaled, p, damping=turn.options["damping"], rtol=turn.options["rtol"])
    ok &= certificate.converged & root.isfinite().all(-1).all(-1)
    state[f"{side}_root"][at] = torch.where(ok[:, None, None], root, state[f"{side}_root"][at])
    state["fallbacks"][at] += ((size > 0) & ~ok).to(moment.dtype)[:, None, None]


class Shampoo(MatrixOptimizer):
    """The gradient between inverse roots of its second moments: `W ← W − lr · s · c · L^(-1/4) B R^(-1/4)`.

    `L` and `R` are the running means of `g gᵀ` and `gᵀ g`, `B` that of g, and c gives the step the Frobenius norm of a
    polar factor, so that rates for Muon serve here. With one side the exponent is −1/2.

    Args:
        params: the model, or its parameters.
        lr: length of a step of the matrices, in the unit that `scale` sets.
        momentum, nesterov: of the first moment; whether it looks ahead by one update.
        moment_beta: of the second moments.
        sides: `"both"`; `"small"`, the smaller one only; `"auto"`: both where the longer side is less than twice the
            shorter one.
        damping: added to each second moment, times its mean eigenvalue.
        rtol: to which the inverse roots are certified. One that is not is not used: the one before stays, and the
            fall back is counted in `health()`.
        shared: see `MatrixOptimizer`; `refresh`, the steps between two inverse roots of a matrix, is 10 by default.

    Cost: per step and side of size k, `4 m n k` operations; at a renewal, an inverse root.
    Source: Gupta, Koren, Singer, Shampoo (1802.09568), algorithm 1; running means: Shi et al. (2309.06497).

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> optimizer = Shampoo(net, lr=0.05)
    >>> [row["direction"] for row in optimizer.explain()][:2]
    ['matrix', 'adamw']
    """

    recipe = Recipe(init, update)

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 0.05,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        moment_beta: float = 0.95,
        sides: Sides = "auto",
        damping: float = 1e-5,
        rtol: float = 1e-2,
        **shared: Unpack[Shared],
    ) -> None:
        check_sides("Shampoo", sides)
        shared.setdefault("refresh", REFRESH)
        options = {
            "momentum": momentum,
            "nesterov": nesterov,
            "moment_beta": moment_beta,
            "sides": sides,
            "damping": damping,
            "rtol": rtol,
        }
        super().__init__(params, lr, options, **shared)
