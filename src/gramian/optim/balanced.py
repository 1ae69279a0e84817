"""Balanced Muon: the momentum between damped inverse roots of the gradients' second moments, orthogonalized."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from gramian.linalg.engine import lapack
from gramian.optim.health import sine
from gramian.optim.muon import advanced, average, choose
from gramian.optim.options import FLAG, Shared, interval, whole
from gramian.optim.polar import polar
from gramian.optim.preconditioned import REFRESH
from gramian.optim.recipe import Recipe, StepContext
from gramian.optim.shell import MatrixOptimizer
from gramian.optim.stacks import State

__all__ = ["BalancedMuon"]


def init(m: Tensor, options: Mapping[str, Any]) -> State:
    """The momentum, and of each side that is not too long the gradients' second moment and its damped inverse root."""
    num, rows, columns = m.shape
    state = {"momentum": m.new_zeros(m.shape), "fallbacks": m.new_zeros(num, 1, 1)}
    for side, size in (("left", rows), ("right", columns)):
        if size <= options["longest"]:
            state[f"{side}_moment"] = m.new_zeros(num, size, size)
            state[f"{side}_root"] = torch.eye(size, dtype=m.dtype, device=m.device).repeat(num, 1, 1)
    return state


def update(g: Tensor, state: State, context: StepContext) -> Tensor:
    """P polar(P B Q) Q, scaled to the norm of the polar factor, with P = (L + δ)^(-1/2) and Q = (R + δ)^(-1/2)."""
    sides = _sides(state)
    if not sides:
        return polar(advanced(g, state["momentum"], context), context.options, out=g)
    unit = g / _norm(g, math.inf)  # so that no square overflows
    unit /= _norm(unit)
    for side in sides:
        second = unit @ unit.mT if side == "left" else unit.mT @ unit
        average(state[f"{side}_moment"], second, context.options["moment_beta"], context)
        if context.due is None or len(context.due):
            _renew(state, side, context)
    x = _between(advanced(g, state["momentum"], context), state)
    factor = polar(x, context.options, out=x)
    d = _between(factor, state)
    before, after = torch.linalg.vector_norm(factor, dim=(-2, -1), keepdim=True), _norm(d)
    return d.mul_(before.div_(after))


def _sides(state: State) -> list[str]:
    return [side for side in ("left", "right") if f"{side}_root" in state]


def _between(x: Tensor, state: State) -> Tensor:
    if "left_root" in state:
        x = state["left_root"] @ x
    return x @ state["right_root"] if "right_root" in state else x


def _norm(x: Tensor, order: float = 2) -> Tensor:
    return torch.linalg.vector_norm(x, order, dim=(-2, -1), keepdim=True).clamp_min_(torch.finfo(x.dtype).tiny)


def _renew(state: State, side: str, context: StepContext) -> None:
    """The inverse roots of the matrices that are due; where there is none, the old one stays."""
    at = slice(None) if context.due is None else context.due
    moment = state[f"{side}_moment"][at]
    root, good = _root(moment, context.options["damping"])
    if not bool(good.all()):
        seen = moment.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] > 0
        root = torch.where(good, root, state[f"{side}_root"][at])
        state["fallbacks"][at] += (seen & ~good).to(moment.dtype)
    state[f"{side}_root"][at] = root


def _root(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(M/m + δ)^(-1/2), with m the mean eigenvalue of M, and whether it is good (K, 1, 1).

    It needs no certificate: with the damping, the eigenvalues under the root lie within a factor of 1 + n/δ.
    """
    values, vectors, ok = lapack.eigh(moment)
    relative = (values / values.mean(-1, keepdim=True)).clamp_min_(0.0)
    root = vectors * relative.add_(damping).rsqrt_()[:, None] @ vectors.mT
    return root, (ok & root.isfinite().flatten(1).all(-1))[:, None, None]


def staleness(state: State, options: Mapping[str, Any]) -> Tensor | None:
    """The sine of the angle between a root that is kept and that of the present moment; the larger of the sides."""
    angles = []
    for side in _sides(state):
        now, _ = _root(state[f"{side}_moment"].double(), options["damping"])
        angles.append(sine(state[f"{side}_root"].double(), now))
    return torch.stack(angles).amax(0) if angles else None


class BalancedMuon(MatrixOptimizer):
    """Steps along `P polar(P B Q) Q`, with `P = (L + δ)^(-1/2)` and `Q = (R + δ)^(-1/2)`, and B Muon's momentum.

    L and R are the running means of `g gᵀ` and `gᵀ g`, in units of their mean eigenvalue. Of all steps D with
    `‖(L + δ)^(1/2) D (R + δ)^(1/2)‖₂ ≤ 1` it is the one along which the loss falls fastest; Muon is that for ‖D‖₂. A
    unit of a step counts for more in those directions of inputs and outputs in which the gradients are larger than on
    average, as where an input has a large unit or a mean far from zero; the damping δ leaves the others alike, whether
    they hold a weak signal or noise.

    Args:
        params: the model (best), or its parameters; see `gramian.optim.shell.MatrixOptimizer`.
        lr, momentum, nesterov, rtol: as of `Muon`.
        damping: δ. The larger, the nearer to Muon.
        moment_beta: the weight of the past in L and R.
        longest: a side of more rows or columns has no moment and no root, and a matrix without any steps as under Muon:
            there they cost more than they gain.
        shared: options of all matrix optimizers, see `gramian.optim.shell.MatrixOptimizer`; `refresh`, the steps
            between two inverse roots of a matrix, is 10 by default.

    Raises:
        InputError: as `gramian.optim.shell.MatrixOptimizer`.
    Cost: that of `Muon`, and per step and side of size k `6 m n k` operations; every `refresh` steps an
        eigendecomposition.
    Source: steepest descent under a norm: Bernstein and Newhouse (2409.20325); the moments: Gupta, Koren, Singer,
        Shampoo (1802.09568). The damping at the mean eigenvalue: this library's own measurements.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> optimizer = BalancedMuon(net, lr=0.05)
    >>> [(row["name"], row["direction"]) for row in optimizer.explain()][:2]
    [('0.weight', 'matrix'), ('2.weight', 'adamw')]
    """

    grows_with_depth = True

    recipe = Recipe(
        init=init,
        update=update,
        options={
            "momentum": interval("[0, 1)"),
            "nesterov": FLAG,
            "rtol": interval("(0, 1)"),
            "damping": interval("(0, ∞)"),
            "moment_beta": interval("[0, 1)"),
            "longest": whole(0),
        },
        adamw={"momentum": "exp_avg"},
        momentum="momentum",
        fallbacks="fallbacks",
        staleness=staleness,
        choose=choose,
    )

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | None = None,
        *,
        momentum: float = 0.9,
        nesterov: bool = True,
        rtol: float = 0.125,
        damping: float = 1.0,
        moment_beta: float = 0.95,
        longest: int = 64,
        **shared: Unpack[Shared],
    ) -> None:
        shared.setdefault("refresh", REFRESH)
        options = {
            "momentum": momentum,
            "nesterov": nesterov,
            "rtol": rtol,
            "damping": damping,
            "moment_beta": moment_beta,
            "longest": longest,
        }
        super().__init__(params, lr, options, **shared)
