"""The equation NZ + ZN = C for an N with all eigenvalues in the right half-plane, by Newton's iteration for the sign.

sign([[N, C], [0, −N]]) = [[I, 2Z], [0, −I]], and Newton's iteration for it needs only inverses of size n (Roberts, Int.
J. Control 32 (1980); Higham, Functions of Matrices (2008), §5.2 and problem 5.19). The inverses do not depend on C, so
further right-hand sides cost products only. The equation is the derivative of the square root and of the sign, and so
tells how far a computed one is from the exact one. torch has no Schur form, by which LAPACK solves it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gramian.linalg.engine import lapack
from gramian.linalg.engine.exponential import two_norm
from gramian.linalg.engine.probes import FAILURE, GAINS, SEED
from gramian.linalg.engine.rounding import U, norm

STEPS = 60
"""Newton's steps at most. With scaling 8 to 12 are usual, and an eigenvalue 1e-16 from the imaginary axis takes 50."""

EXPLICIT = 12
"""Up to this side the inverse operator is formed, n² × n²; beyond that a few random matrices bound its norm."""

PROBES = 8


class Directions(NamedTuple):
    """Matrices (k, 1, n, n) by whose images the norm of a linear map of matrices is known, as in `probes`."""

    basis: Tensor
    factor: float
    failure: float


def directions(like: Tensor) -> Directions:
    """All n² unit matrices, or a few random ones."""
    n = like.shape[-1]
    if n <= EXPLICIT:
        basis = torch.eye(n * n, dtype=like.dtype, device=like.device).reshape(n * n, 1, n, n)
        return Directions(basis, 1.0, 0.0)
    generator = torch.Generator().manual_seed(SEED + n)
    basis = torch.randn(PROBES, 1, n, n, generator=generator, dtype=like.dtype, device="cpu")
    return Directions(basis.to(like.device), GAINS[PROBES] / math.sqrt(PROBES), FAILURE)


def frobenius(images: Tensor, d: Directions) -> Tensor:
    """A bound on the Frobenius norm (B,) of the map that takes the directions to these images (k, B, n, n)."""
    return d.factor * images.square().sum((0, 2, 3)).sqrt()


def operator_norm(images: Tensor, d: Directions) -> Tensor:
    """A bound on the norm (B,) of the map that takes the directions to these images."""
    whole = frobenius(images, d)
    if d.failure:
        return whole
    operator = images.movedim(0, 1).flatten(2)
    top = operator.abs().amax((-2, -1)).clamp_min(2.0**-1000)
    return whole.minimum(top * two_norm(operator / top[:, None, None]))


class Steps(NamedTuple):
    """Newton's steps X ← (μX + (μX)⁻¹)/2: the limit, the μ (B, 1, 1) and X⁻¹ (B, n, n) of each, and who converged."""

    limit: Tensor
    factors: list[Tensor]
    inverses: list[Tensor]
    converged: Tensor


def newton(x: Tensor) -> Steps:
    """Newton's iteration for the sign of each matrix (B, n, n), scaled by norms while it is far from the limit."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    bad = ~x.isfinite().flatten(1).all(1)
    x = torch.where(bad[:, None, None], eye, x)
    factors: list[Tensor] = []
    inverses: list[Tensor] = []
    near = torch.zeros_like(bad)
    done = torch.zeros_like(bad)
    for _ in range(STEPS):
        y, failed = inverse(x)
        if bool(failed.any()):
            bad = bad | failed
            x, y = (torch.where(bad[:, None, None], eye, z) for z in (x, y))
        mu = (norm(y) / norm(x)).sqrt() if x.shape[-1] else torch.ones_like(bad, dtype=x.dtype)
        mu = torch.where(near | bad, 1.0, mu)[:, None, None]
        factors.append(mu)
        inverses.append(y)
        new = (mu * x + y / mu) / 2
        change = norm(new - x) / norm(new).clamp_min(2.0**-1000)
        x, finished = new, done.all()
        done = done | bad | (change < 1e-7)
        near = near | (change < 1e-2)
        if bool(finished):
            break
    return Steps(x, factors, inverses, done & ~bad)


def inverse(x: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse, and where there is none."""
    y, info = lapack.inverse(x)
    return y, (info != 0) | ~y.isfinite().flatten(1).all(1)


class Stable(NamedTuple):
    """N (B, n, n), how to solve with it, whether its eigenvalues are in the right half-plane, and β ≥ ‖C ↦ Z‖.

    β is inf where it is not known, and fails with the probability `failure`. `whole` is that of all C: no matrix within
    1/(2 whole) of N has eigenvalues on the imaginary axis.
    """

    n: Tensor
    steps: Steps
    ok: Tensor
    beta: Tensor
    failure: float
    whole: Tensor


def stable(n: Tensor, sign: Tensor | None = None, *, bounded: bool = True) -> Stable:
    """What solves NZ + ZN = C for any C; with a `sign` X that commutes with N, for any C with XCX = −C.

    Such a C has parts only between eigenvalues of opposite sign of A = NX, and β may be far smaller for them. If not
    `bounded`, β is inf, and eigenvalues that rounding may have taken across the axis are not noticed.
    """
    if not n[0:1].numel():
        nothing = torch.zeros(n.shape[0], dtype=n.dtype, device=n.device)
        return Stable(n, Steps(n, [], [], nothing == 0), nothing == 0, nothing, 0.0, nothing)
    steps, d = newton(n), directions(n)
    eye = torch.eye(n.shape[-1], dtype=n.dtype, device=n.device)
    if not bounded:
        ok = steps.converged & (norm(steps.limit - eye) < 1e-3)
        unknown = torch.full_like(norm(n), math.inf)
        return Stable(n, steps, ok, unknown, d.failure, unknown)
    whole = _beta(n, steps, d, None)
    # The iteration tells the half-plane of each eigenvalue but for a rounding of N, which must leave the operator
    # invertible: an eigenvalue on the axis makes it singular.
    certain = 16 * n.shape[-1] * U * norm(n) * whole < 0.5
    ok = steps.converged & (norm(steps.limit - eye) < 1e-3) & certain
    beta = whole if sign is None else _beta(n, steps, d, sign)
    return Stable(n, steps, ok, torch.where(ok, beta, math.inf), d.failure, whole)


def odd(c: Tensor, sign: Tensor | None) -> Tensor:
    """The part of C with XCX = −C; C itself without a sign X."""
    return c if sign is None else (c - sign @ c @ sign) / 2


def _beta(n: Tensor, steps: Steps, d: Directions, sign: Tensor | None) -> Tensor:
    """A bound on the norm of C ↦ Z, from its own images and from how far they solve the equation."""
    basis = odd(d.basis.expand(-1, n.shape[0], -1, -1), sign)
    z = odd(_solve(steps, basis), sign)
    z = odd(z + _solve(steps, basis - n @ z - z @ n), sign)
    left = frobenius(basis - n @ z - z @ n, d)
    return torch.where(left < 0.25, 1.5 * operator_norm(z, d), math.inf)


def _solve(steps: Steps, c: Tensor) -> Tensor:
    """Z with NZ + ZN = C, for C (..., B, n, n), by the recorded steps."""
    for mu, y in zip(steps.factors, steps.inverses, strict=True):
        c = (mu * c + (y @ c @ y) / mu) / 2
    return c / 2


def refined(s: Stable, c: Tensor, sign: Tensor | None = None) -> Tensor:
    """Z with NZ + ZN = C for C (..., B, n, n), after one refinement."""
    z = odd(_solve(s.steps, c), sign)
    return odd(z + _solve(s.steps, c - s.n @ z - z @ s.n), sign)


def transposed(s: Stable) -> Stable:
    """The equation NᵀZ + ZNᵀ = C, which is the adjoint of that of N."""
    inverses = [y.mT for y in s.steps.inverses]
    return s._replace(n=s.n.mT, steps=s.steps._replace(limit=s.steps.limit.mT, inverses=inverses))


def solve(s: Stable, c: Tensor, sign: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Z with NZ + ZN = C, and a bound on ‖C − NZ − ZN‖_F."""
    z = refined(s, c, sign)
    left = c - s.n @ z - z @ s.n
    blur = 4 * (s.n.shape[-1] + 3) * U * (norm(s.n) * norm(z) + norm(c))
    return z, norm(left) + blur


class _Solved(torch.autograd.Function):
    @staticmethod
    def forward(n: Tensor, c: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        flat = n.reshape(-1, *n.shape[-2:])
        steps = newton(flat)
        shape = c.shape
        c = c.reshape(-1, *c.shape[-2:])
        z = _solve(steps, c)
        z = z + _solve(steps, c - flat @ z - z @ flat)
        return torch.where(steps.converged[:, None, None], z, torch.nan).reshape(shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        n, z = ctx.saved_tensors
        y = solved(n.mT, grad)
        return -(y @ z.mT + z.mT @ y), y

    @staticmethod
    def jvp(ctx: Any, dn: Tensor | None, dc: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        n, z = ctx.saved_tensors
        right = torch.zeros_like(z) if dc is None else dc
        return solved(n, right if dn is None else right - dn @ z - z @ dn)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, n: Tensor, c: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        n, c = (
            x.expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
            for x, d in zip((n, c), in_dims, strict=True)
        )
        return _Solved.apply(n, c), 0


def solved(n: Tensor, c: Tensor) -> Tensor:
    """Z with NZ + ZN = C of matrices (..., n, n), differentiable any number of times; NaN where N is not stable."""
    out = _Solved.apply(n, c)
    assert isinstance(out, Tensor)
    return out
