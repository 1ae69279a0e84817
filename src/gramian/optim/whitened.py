"""Muon in the metric of the gradients' leading second moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn

from gramian import random
from gramian.optim.muon import average, look_ahead, orthogonal
from gramian.optim.options import FLAG, Shared, interval, whole
from gramian.optim.recipe import Recipe, StepContext
from gramian.optim.scaling import as_long_as_polar, rescale_
from gramian.optim.shell import MatrixOptimizer
from gramian.optim.stacks import State

__all__ = ["WhitenedMuon"]

SIDES = ("left", "right")

SHIFT = 0.1
"""Added to the second moments in the orthogonal iteration, in units of λ: above rounding, and below what matters."""

LEAST_SHIFT = 1e-7
"""The least shift, in units of the trace: its inverse bounds the condition number in the iteration."""


def init(m: Tensor, options: Mapping[str, Any]) -> State:
    """The momentum; the trace, leading eigenvectors and eigenvalues of g gᵀ and gᵀg; all stored in `unit`s."""
    num = m.shape[0]
    state = {
        "momentum": torch.zeros_like(m, memory_format=torch.contiguous_format),
        "trace": m.new_zeros(num, 1, 1),
        "unit": m.new_zeros(num, 1, 1),
        "fallbacks": m.new_zeros(num, 1, 1),
    }
    for side, size in zip(SIDES, m.shape[-2:], strict=True):
        rank = min(options["rank"], size)
        start = random.orthogonal(size, rank, generator=torch.Generator().manual_seed(size), dtype=m.dtype)
        state[f"{side}_basis"] = start.to(m.device).repeat(num, 1, 1)
        state[f"{side}_values"] = m.new_zeros(num, 1, rank)
    return state


def update(g: Tensor, state: State, context: StepContext) -> Tensor:
    """P polar(P B Q) Q, at the norm of a polar factor."""
    options = context.options
    rescale_(g, state, {"momentum": 1, "trace": 2, "left_values": 2, "right_values": 2})
    average(state["momentum"], g, options["momentum"], context)
    if context.due is None or len(context.due):
        _follow(g, state, context)
    d = look_ahead(g, state["momentum"], context)
    metric = _metric(state, options["damping"])
    return as_long_as_polar(metric.whiten(orthogonal(metric.whiten(d), context)))


def _follow(g: Tensor, state: State, context: StepContext) -> None:
    """A step of orthogonal iteration on the running mean of each second moment, of which the leading part is kept.

    With M ← β V diag(v) Vᵀ + (1 − β) g gᵀ: V R = (M + ε) V with VᵀV = I, v ← diag R − ε. There is no eigenvalue
    problem, which would synchronize with the device. ε keeps rounding out of vectors that no gradient has filled yet.
    """
    at, beta = slice(None) if context.due is None else context.due, context.options["moment_beta"]
    g, before, alive = g[at], state["trace"][at], context.alive[at] > 0
    square = torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True).square()
    trace = state["trace"][at] = torch.where(alive, torch.lerp(square, before, beta), before)
    for side in SIDES:
        basis, values = state[f"{side}_basis"][at], state[f"{side}_values"][at]
        x = g if side == "left" else g.mT
        shift = max(SHIFT * context.options["damping"] / x.shape[-2], LEAST_SHIFT) * trace
        q, lengths, full = _orthonormal(torch.lerp(x @ (x.mT @ basis), basis * values, beta) + basis * shift)
        learned = alive & full
        state[f"{side}_basis"][at] = torch.where(learned, q, basis)
        state[f"{side}_values"][at] = torch.where(learned, (lengths - shift).clamp_min_(0), values)
        state["fallbacks"][at] += (alive & (trace > 0) & ~full).to(trace.dtype)


def _orthonormal(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q of y = Q R (K, n, r), R's diagonal (K, 1, r), and whether y had full rank (K, 1, 1).

    By Cholesky of yᵀy in float64, for all matrices at once: torch's QR takes them one by one on a GPU.
    """
    wide = y.double()
    r, info = torch.linalg.cholesky_ex(wide.mT @ wide, upper=True)
    q = torch.linalg.solve_triangular(r, wide, upper=True, left=False)
    return q.to(y.dtype), r.diagonal(dim1=-2, dim2=-1)[:, None].to(y.dtype), (info == 0)[:, None, None]


class Metric(NamedTuple):
    """P = I − V diag(left) Vᵀ and Q = I − U diag(right) Uᵀ: V (K, m, r), U (K, n, r), cuts (K, 1, r)."""

    v: Tensor
    u: Tensor
    left: Tensor
    right: Tensor

    def whiten(self, d: Tensor) -> Tensor:
        """P d Q, in three passes."""
        du, vd = (d @ self.u) * self.right, self.v.mT @ d
        rest = self.left.mT * torch.baddbmm(vd, self.v.mT @ du, self.u.mT, alpha=-1)
        return torch.baddbmm(d, torch.cat([du, self.v], -1), torch.cat([self.u.mT, rest], -2), alpha=-1)


def _metric(state: State, damping: float) -> Metric:
    """P ∝ (L + λ)^(-1/2) and Q ∝ (R + λ)^(-1/2), scaled to one on the eigenvectors that are not kept.

    Their eigenvalues are taken to be equal. Before the first gradient, both are the identity.
    """
    trace, cuts = state["trace"], []
    bases = [state[f"{side}_basis"] for side in SIDES]
    known = trace > torch.finfo(trace.dtype).tiny / torch.finfo(trace.dtype).eps
    for side, basis in zip(SIDES, bases, strict=True):
        values, (size, rank) = state[f"{side}_values"], basis.shape[-2:]
        extra = damping / size * trace
        rest = (trace - values.sum(-1, keepdim=True)).clamp_min(0) / max(size - rank, 1)
        cuts.append(torch.where(known, 1 - ((rest + extra) / (values + extra)).sqrt(), 0.0))
    return Metric(*bases, *cuts)


class WhitenedMuon(MatrixOptimizer):
    """Steps as Muon in the metric of the gradients' second moments: `W ← W − lr · s · c · P polar(P B Q) Q`.

    `P = (L + λ)^(-1/2)` and `Q = (R + λ)^(-1/2)`, with L and R the running means of `g gᵀ` and `gᵀ g`, each represented
    by its `rank` leading eigenvectors and the rest of its trace, spread evenly; `λ = damping · trace / size`. Of all
    steps D with `‖P⁻¹ D Q⁻¹‖₂ ≤ 1` this one descends fastest; with `P = Q = I` it is Muon. Along directions in which
    the gradient is always large, such as the mean of the inputs, it goes less far. The constant c gives the step the
    norm of a polar factor. It pays where inputs are badly scaled; `gramian bench optim` compares it with the others.

    Args:
        params: the model (best), or its parameters; see `gramian.optim.shell.MatrixOptimizer`.
        lr: length of a step of the matrices, in the unit that `scale` sets.
        momentum: the weight of the past in B, the running mean of the gradients.
        nesterov: whether the step looks ahead by one update of the momentum.
        rank: number of eigenvectors on each side, updated by one step of orthogonal iteration per step. It sets a shape
            of the state, and cannot be changed once a step has been taken.
        moment_beta: the weight of the past in L and R.
        damping: share of the mean eigenvalue that is added to each.
        rtol: root mean square of σ − 1 over the singular values of the polar factor, as for `Muon`.
        shared: options of all matrix optimizers, see `gramian.optim.shell.MatrixOptimizer`; the eigenvectors are
            updated every `refresh` steps, 1 by default.

    Raises:
        InputError: as `gramian.optim.shell.MatrixOptimizer`.
    Cost: per step and matrix, about `24 m n · rank` operations more than Muon, and `(m + n) · rank` numbers of state.
    Source: steepest descent under the spectral norm: Bernstein and Newhouse (2409.20325); here in the metric that
    Shampoo's second moments make (Gupta et al., 1802.09568); orthogonal iteration: Golub and Van Loan, §8.2.4.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> WhitenedMuon(net, lr=0.3).param_groups[0]["rank"]
    16
    """

    recipe = Recipe(
        init=init,
        update=update,
        options={
            "momentum": interval("[0, 1)"),
            "nesterov": FLAG,
            "rank": whole(1),
            "moment_beta": interval("[0, 1)"),
            "damping": interval("(0, ∞)"),
            "rtol": interval("(0, 1)"),
        },
        adamw={"momentum": "exp_avg"},
        momentum="momentum",
        fallbacks="fallbacks",
    )

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.3,
        *,
        momentum: float = 0.9,
        nesterov: bool = True,
        rank: int = 16,
        moment_beta: float = 0.9,
        damping: float = 0.1,
        rtol: float = 0.125,
        **shared: Unpack[Shared],
    ) -> None:
        options = {
            "momentum": momentum,
            "nesterov": nesterov,
            "rank": rank,
            "moment_beta": moment_beta,
            "damping": damping,
            "rtol": rtol,
        }
        super().__init__(params, lr, options, **shared)
