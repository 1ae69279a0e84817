"""Shampoo: the gradient between inverse roots of its second moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from gramian import linalg
from gramian.linalg.engine import cost
from gramian.optim.health import sine
from gramian.optim.muon import average, look_ahead
from gramian.optim.options import FLAG, Shared, interval
from gramian.optim.preconditioned import REFRESH, SIDES, Sides, preconditioned_sides
from gramian.optim.recipe import Recipe, StepContext
from gramian.optim.scaling import as_long_as_polar, rescale_
from gramian.optim.shell import MatrixOptimizer
from gramian.optim.stacks import State

__all__ = ["Shampoo"]


def init(m: Tensor, options: Mapping[str, Any]) -> State:
    """The momentum, and per side the second moment of the gradients and its inverse root.

    On a CPU the moments are in float64. An eigenvalue is known to ε λ₁, and those that `damping` leaves to count are as
    small as 1e-6 λ₁: in float32 the roots, and then the weights, of two runs whose sums are in another order are 1e-3
    apart. A GPU may take 64 times as long in float64.
    """
    num = m.shape[0]
    wide = torch.float64 if m.device.type == "cpu" else m.dtype
    state = {
        "momentum": m.new_zeros(m.shape),
        "unit": m.new_zeros(num, 1, 1),
        "fallbacks": m.new_zeros(num, 1, 1),
    }
    for side, size in preconditioned_sides(m.shape, options["sides"]):
        state[f"{side}_moment"] = m.new_zeros(num, size, size, dtype=wide)
        state[f"{side}_root"] = torch.eye(size, dtype=m.dtype, device=m.device).repeat(num, 1, 1)
    return state


def update(g: Tensor, state: State, context: StepContext) -> Tensor:
    """L^(-1/p) B R^(-1/p), scaled to the norm of a polar factor; p is twice the number of sides."""
    options = context.options
    rescale_(g, state, {"momentum": 1, "left_moment": 2, "right_moment": 2})
    sides = _sides(state)
    for side in sides:
        moment = state[f"{side}_moment"]
        wide = g.to(moment.dtype)
        average(moment, linalg.syrk(wide.mT if side == "left" else wide), options["moment_beta"], context)
        if context.due is None or len(context.due):
            _renew(state, side, 2 * len(sides), context)
    average(state["momentum"], g, options["momentum"], context)
    d = look_ahead(g, state["momentum"], options["momentum"], context)
    for side in sides:
        d = state[f"{side}_root"] @ d if side == "left" else d @ state[f"{side}_root"]
    return as_long_as_polar(d)


def staleness(state: State, options: Mapping[str, Any]) -> Tensor:
    """The sine of the angle between a root that is kept and that of the present moment; the larger of the sides."""
    sides = _sides(state)
    angles = []
    for side in sides:
        scaled, _ = _relative(state[f"{side}_moment"].double())
        with cost.fixed():
            now = linalg.inv_root_ex(scaled, 2 * len(sides), damping=options["damping"])[0]
        angles.append(sine(state[f"{side}_root"].double(), now))
    return torch.stack(angles).amax(0)


def _sides(state: State) -> list[str]:
    return [side for side in ("left", "right") if f"{side}_root" in state]


def _relative(moment: Tensor) -> tuple[Tensor, Tensor]:
    """A moment in units of its mean eigenvalue, so that its root is near one and `damping` relative; and that unit."""
    size = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    return moment / size.clamp_min(torch.finfo(moment.dtype).tiny)[:, None, None], size


def _renew(state: State, side: str, p: int, context: StepContext) -> None:
    """The inverse p-th roots of the matrices that are due; where one is not certified, the old one stays."""
    at = slice(None) if context.due is None else context.due
    moment = state[f"{side}_moment"][at]
    scaled, size = _relative(moment)
    ok = size > 0
    with cost.fixed():  # a run repeats bit by bit, on every rank
        root, certificate = linalg.inv_root_ex(
            scaled, p, damping=context.options["damping"], rtol=context.options["rtol"]
        )
    ok &= certificate.converged & root.isfinite().all(-1).all(-1)
    kept = state[f"{side}_root"][at]
    state[f"{side}_root"][at] = torch.where(ok[:, None, None], root.to(kept.dtype), kept)
    state["fallbacks"][at] += ((size > 0) & ~ok)[:, None, None]


class Shampoo(MatrixOptimizer):
    """Steps along the gradient between inverse roots of its second moments: `W ← W − lr · s · c · L^(-1/4) B R^(-1/4)`.

    `L` and `R` are the running means of `g gᵀ` and `gᵀ g`, `B` that of g, and c gives the step the Frobenius norm of a
    polar factor, so that a rate means the same as for Muon. With one side the exponent is −1/2.

    Args:
        params: the model (best), or its parameters; see `gramian.optim.shell.MatrixOptimizer`.
        lr: length of a step of the matrices, in the unit that `scale` sets.
        momentum: the weight of the past in B.
        nesterov: whether the step looks ahead by one update of the momentum.
        moment_beta: the weight of the past in L and R.
        sides: `"both"`; `"small"`, the smaller one only; `"auto"`: both where the longer side is less than twice the
            shorter one.
        damping: added to L and R, times their mean eigenvalue.
        rtol: relative error to which the inverse roots are certified. A root that is not certified is not used: the one
            before stays, and the fallback is counted in `health()`.
        shared: options of all matrix optimizers, see `gramian.optim.shell.MatrixOptimizer`; `refresh`, the steps
            between two inverse roots of a matrix, is 10 by default.

    Raises:
        InputError: as `gramian.optim.shell.MatrixOptimizer`.
    Cost: per step and side of size k, `4 m n k` operations, on a CPU half of them in float64, as the moments are; every
        `refresh` steps an inverse root.
    Source: Gupta, Koren, Singer, Shampoo (1802.09568), algorithm 1; running means: Shi et al. (2309.06497).

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> optimizer = Shampoo(net, lr=0.05)
    >>> [row["direction"] for row in optimizer.explain()][:2]
    ['matrix', 'adamw']
    """

    recipe = Recipe(
        init=init,
        update=update,
        options={
            "momentum": interval("[0, 1)"),
            "nesterov": FLAG,
            "moment_beta": interval("[0, 1)"),
            "sides": SIDES,
            "damping": interval("(0, ∞)"),
            "rtol": interval("(0, 1)"),
        },
        adamw={"momentum": "exp_avg"},
        momentum="momentum",
        fallbacks="fallbacks",
        staleness=staleness,
    )

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.1,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        moment_beta: float = 0.95,
        sides: Sides = "auto",
        damping: float = 1e-5,
        rtol: float = 1e-2,
        **shared: Unpack[Shared],
    ) -> None:
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
