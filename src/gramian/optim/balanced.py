"""Balanced Muon: the momentum between damped inverse roots of the gradients' second moments, orthogonalized.

The roots are never formed. Whatever C has CᵀC = (L + δ)⁻¹ is U (L + δ)^(-1/2) for an orthogonal U, which the polar
factor lets through: Cᵀ polar(C B) = P Uᵀ polar(U P B) = P polar(P B). So the inverse of a Cholesky factor does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from gramian.linalg.engine import lapack
from gramian.linalg.engine.scaling import peak
from gramian.linalg.engine.workspace import scratch
from gramian.optim.health import sine
from gramian.optim.muon import average, choose, mixed, weight_of_past
from gramian.optim.options import Shared, interval, whole
from gramian.optim.polar import dtype_of_products, polar
from gramian.optim.polar import pads as polar_pads
from gramian.optim.preconditioned import REFRESH
from gramian.optim.recipe import Recipe, StepContext
from gramian.optim.shell import MatrixOptimizer
from gramian.optim.stacks import State

__all__ = ["BalancedMuon"]

SIDES = ("left", "right")

SMALL = 1 << 13
"""Entries of a matrix up to which a side four times as long as `longest` has a root too: what is done for each call of
torch's costs as much as its products there, and kernels of convolutions gain by it most."""

PRODUCTS = 1 / 3
"""What `mnk` multiplications for a side of k, of three products, are of those in a Gram matrix of as many."""

SHARE = 1 / 4
"""Of all that counts where stacks are joined, since a stack takes more calls here than under Muon."""


def init(m: Tensor, options: Mapping[str, Any]) -> State:
    """The momentum, and of each side that is not too long the gradients' second moment and the C of `_factor`."""
    num, rows, columns = m.shape
    state = {"momentum": m.new_zeros(m.shape), "fallbacks": m.new_zeros(num, 1, 1)}
    for side, size in _rooted((rows, columns), options).items():
        state[f"{side}_moment"] = m.new_zeros(num, size, size)
        state[f"{side}_factor"] = torch.eye(size, dtype=m.dtype, device=m.device).repeat(num, 1, 1)
    return state


def _rooted(shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, int]:
    """The sides that have a root, and their sizes."""
    longest = options["longest"] * (4 if math.prod(shape) <= SMALL else 1)
    return {side: size for side, size in zip(SIDES, shape, strict=True) if size <= longest}


def pads(
    shapes: Sequence[tuple[int, int]], room: tuple[int, int], device: torch.device, options: Mapping[str, Any]
) -> int | None:
    """As Muon's, for matrices whose roots are on the same sides, as they lie.

    What is left of a moment beside a matrix is zero, and of the damped one a multiple of the identity, so that a factor
    has blocks, and the padding stays zero.
    """
    work, roots = polar_pads(shapes, room, device, options), _rooted(room, options)
    lying = ((n, m) if m > room[0] else (m, n) for m, n in shapes)
    if work is None or any(_rooted(shape, options).keys() != roots.keys() for shape in lying):
        return None
    return round(SHARE * (work + PRODUCTS * math.prod(room) * sum(roots.values()))) if roots else work


def update(g: Tensor, state: State, context: StepContext) -> Tensor:
    """Cᵀ polar(C B Eᵀ) E, scaled to the norm of the polar factor, with CᵀC = (L + δ)⁻¹ and EᵀE = (R + δ)⁻¹."""
    options = context.options
    sides = [side for side in SIDES if f"{side}_factor" in state]
    beta = weight_of_past(options)
    if not sides:
        return polar(mixed(g, state["momentum"], beta, beta, context), options, out=g, shape=context.shape)
    dtype = dtype_of_products(g, options, context.shape)
    here, there = (scratch(f"balanced: {k}", tuple(g.shape), dtype, g) for k in range(2))
    unit = _unit(g, here)
    for side in sides:
        _follow(state, side, unit, context)
    if context.due is None or len(context.due):
        _renew(state, sides, context)
    x = mixed(g, state["momentum"], beta, 1 - options["present"], context)
    x = x if dtype == g.dtype else here.copy_(x)
    factors = [state[f"{side}_factor"].to(dtype) for side in sides]
    for side, factor in zip(sides, factors, strict=True):
        x, here, there = _times(side, x, factor, there), there, here
    x = polar(x, options, out=x, shape=context.shape)
    length = _norm(x)
    for side, factor in zip(sides, factors, strict=True):
        x, here, there = _times(side, x, factor.mT, there), there, here
    return torch.mul(x, length.div_(_norm(x).clamp_min_(_tiny(x))), out=g)


def _unit(g: Tensor, out: Tensor) -> Tensor:
    """Each matrix over its norm, in `out`; first over its largest entry where a square may overflow or vanish."""
    norm = _norm(g)
    least, most = _tiny(g) ** 0.25, torch.finfo(g.dtype).max ** 0.25
    if not g.is_cpu or not all(least < value < most for value in norm.view(-1).tolist()):
        is_normal = (norm > least) & (norm < most)  # a matrix stays as it is, whatever its neighbors are
        g = g / torch.where(is_normal, 1.0, peak(g, (-2, -1)).clamp_min_(_tiny(g)))
        norm = _norm(g).clamp_min_(_tiny(g))
    return torch.div(g, norm, out=out)


def _times(side: str, x: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """C x on the left, x Cᵀ on the right."""
    return torch.bmm(factor, x, out=out) if side == "left" else torch.bmm(x, factor.mT, out=out)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


def _follow(state: State, side: str, unit: Tensor, context: StepContext) -> None:
    """The second moment with that of the present gradients."""
    moment, beta = state[f"{side}_moment"], context.options["moment_beta"]
    pair = (unit, unit.mT) if side == "left" else (unit.mT, unit)
    if unit.dtype != moment.dtype:
        average(moment, torch.bmm(*pair).to(moment.dtype), beta, context)
    elif context.all_alive:
        moment.baddbmm_(*pair, beta=beta, alpha=1 - beta)
    else:  # by the same product, so that neighbors do not differ
        moment.copy_(torch.where(context.alive > 0, torch.baddbmm(moment, *pair, beta=beta, alpha=1 - beta), moment))


def _renew(state: State, sides: Sequence[str], context: StepContext) -> None:
    """The factors of the matrices that are due, of both sides at once where they are of one length."""
    if len(sides) == 2 and state["left_moment"].shape != state["right_moment"].shape:
        for side in sides:
            _renew(state, [side], context)
        return
    at = slice(None) if context.due is None else context.due
    moments = [state[f"{side}_moment"][at] for side in sides]
    sizes = None if context.sizes is None else torch.cat([context.sizes[SIDES.index(side)][at] for side in sides])
    factors, info = _factor(torch.cat(moments), context.options["damping"], sizes)
    good = None if not bool(info.any()) else (info == 0)[:, None, None].chunk(len(sides))
    for i, (side, moment, factor) in enumerate(zip(sides, moments, factors.chunk(len(sides)), strict=True)):
        if good is not None:  # where there is none, the old one stays
            seen = moment.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] > 0
            factor = torch.where(good[i], factor, state[f"{side}_factor"][at])
            state["fallbacks"][at] += (seen & ~good[i]).to(moment.dtype)
        state[f"{side}_factor"][at] = factor


def _factor(moment: Tensor, damping: float, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """C with CᵀC = (M/m + δ)⁻¹, m the mean eigenvalue of M, and LAPACK's info (K,), 0 where there is one.

    The mean is over so many eigenvalues as `size` (K, 1, 1) says, the others being of padding; over all without it.

    It is the inverse of the Cholesky factor of M/m + δ, and needs no certificate: with the damping, the eigenvalues of
    what is factored lie within a factor of 1 + n/δ. There is none before the first gradient, where m is zero.
    """
    trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    damped = moment / (trace / (moment.shape[-1] if size is None else size))
    damped.diagonal(dim1=-2, dim2=-1).add_(damping)
    lower, info = lapack.cholesky(damped)
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    # As the transpose, from the right: LAPACK takes 0.4 of the time that it takes for the factor as it lies.
    return torch.linalg.solve_triangular(lower.mT, eye.expand_as(lower), upper=True, left=False).mT, info


def staleness(state: State, options: Mapping[str, Any]) -> Tensor | None:
    """The sine of the angle between (L + δ)⁻¹ as it is kept and of the present moment; the larger of the sides."""
    angles = []
    for side in SIDES:
        if f"{side}_factor" not in state:
            continue
        now, _ = _factor(state[f"{side}_moment"].double(), options["damping"])
        kept = state[f"{side}_factor"].double()
        angles.append(sine(kept.mT @ kept, now.mT @ now))
    return torch.stack(angles).amax(0) if angles else None


class BalancedMuon(MatrixOptimizer):
    """Steps along `P polar(P B Q) Q`, with `P = (L + δ)^(-1/2)`, `Q = (R + δ)^(-1/2)`, and B half momentum.

    The other half of B is the present gradient. L and R are the running means of `g gᵀ` and `gᵀ g`, in units of their
    mean eigenvalue. Of all steps D with `‖(L + δ)^(1/2) D (R + δ)^(1/2)‖₂ ≤ 1` it is the one along which the loss falls
    fastest; Muon is that for ‖D‖₂. A unit of a step counts for more in those directions of inputs and outputs in which
    the gradients are larger than on average, as where an input has a large unit or a mean far from zero; the damping δ
    leaves the others alike, whether they hold a weak signal or noise.

    Args:
        params: the model (best), or its parameters; see `gramian.optim.shell.MatrixOptimizer`.
        lr, momentum, rtol: as of `Muon`.
        present: the weight in B of the present gradient, beside Muon's momentum. Nesterov's is 1 − μ, and the least.
        damping: δ. The larger, the nearer to Muon.
        moment_beta: the weight of the past in L and R.
        longest: a side of more rows or columns has no moment and no root: there they cost more than they gain. It is
            four times as many for matrices of at most 8,192 entries. A matrix without any root steps as under Muon.
        shared: options of all matrix optimizers, see `gramian.optim.shell.MatrixOptimizer`; `refresh`, the steps
            between two factors of a matrix, is 10 by default.

    Raises:
        InputError: as `gramian.optim.shell.MatrixOptimizer`.
    Cost: that of `Muon`, and per step and side of size k `6 m n k` operations, in bfloat16 where the polar factor is;
        every `refresh` steps a Cholesky factor and its inverse.
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
            "present": interval("(0, 1]"),
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
        pads=pads,
        sides={"left_moment": "right_moment", "left_factor": "right_factor"},
    )

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | None = None,
        *,
        momentum: float = 0.9,
        present: float = 0.5,
        rtol: float = 0.125,
        damping: float = 1.0,
        moment_beta: float = 0.95,
        longest: int = 64,
        **shared: Unpack[Shared],
    ) -> None:
        shared.setdefault("refresh", REFRESH)
        options = {
            "momentum": momentum,
            "present": present,
            "rtol": rtol,
            "damping": damping,
            "moment_beta": moment_beta,
            "longest": longest,
        }
        super().__init__(params, lr, options, **shared)
