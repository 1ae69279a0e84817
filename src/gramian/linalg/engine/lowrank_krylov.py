"""Block Krylov for the leading singular triples, and a bound on the error of the low-rank approximation they form.

Matrices are used only through products with rows, so dense and sparse ones and linear maps are treated alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg.engine import lapack, probes
from gramian.linalg.engine.krylov import (
    FAILURE,
    Krylov,
    by,
    default_generator,
    exclusion_ratio,
    gaussian,
    lanczos,
    next_check,
    random_rows,
    ritz,
    ritz_pairs,
    top_bound,
    two_norm,
)
from gramian.linalg.engine.lowrank_excess import (
    SHADOW,
    Triple,
    excess,
    excess_of_unknown,
    expected_loss,
    leading_sum_bound,
)
from gramian.linalg.engine.rounding import U, gamma, norm
from gramian.linalg.engine.scaling import scale

OUTSIDE = 16
"""Random vectors for the norm outside the Krylov space."""
SEEN = 16, 8
"""Random vectors that measure the rounding of the Krylov run, and of the deflated run, which needs less accuracy."""
ALLOWED = 0.6, 0.7, 0.8, 0.9
"""Shares of the k-th eigenvalue that may serve as the limit on the norm of AᵀA outside the space."""
CLUSTERED = 0.95
"""The share of the k-th eigenvalue above which the norm outside the space gives a poor bound on the leading ones."""
LONGEST = 1024
"""Rows of the Krylov space of a map, beyond those that every run has."""

Apply = Callable[[Tensor], Tensor]


class Products(NamedTuple):
    """The products that block Krylov needs of matrices A (B, m, n): rows y Aᵀ, and y Aᵀ with y AᵀA, in the dtype of
    `like`; in float64, rows z AᵀA and z Aᵀ with ‖A‖_F² (B,), None where it is not known, to within `unit` of ‖A‖_F
    each; and A, if dense.
    """

    forth: Apply
    both: Callable[[Tensor], tuple[Tensor, Tensor]]
    twice: Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]
    like: Tensor
    shape: tuple[int, int, int]
    unit: float
    dense: Tensor | None = None


class Caller(NamedTuple):
    """The caller's dtype, and the power of two that x was divided by."""

    dtype: torch.dtype
    exponent: Tensor

    def rounded(self, u: Tensor, s: Tensor, v: Tensor) -> tuple[Triple, Triple]:
        """The factors as the caller gets them, and the same in float64 on the scale of x."""
        value = u.to(self.dtype), scale(s.to(torch.float64), self.exponent).to(self.dtype), v.to(self.dtype)
        wide = value[1].to(torch.float64)
        return value, (value[0].to(torch.float64), scale(wide, -self.exponent), value[2].to(torch.float64))


class Found(NamedTuple):
    """The factors U (B, m, k), S (B, k), V (B, n, k) as rounded for the caller; a bound on the excess;
    ‖A − USVᵀ‖_F / ‖A‖_F; why they failed; steps; the probability that the bound does not hold.
    """

    value: Triple
    excess: Tensor
    residual: Tensor
    reason: Tensor
    steps: int = 0
    failure: float = 0.0

    @staticmethod
    def bare(value: Triple, reason: Tensor, steps: int = 0) -> Found:
        """Factors without a bound."""
        unknown = torch.full(reason.shape, math.inf, dtype=torch.float64, device=reason.device)
        return Found(value, unknown, unknown * math.nan, reason, steps, math.nan)


class Space(NamedTuple):
    """A Krylov space of AᵀA with good approximations of the leading k vectors; the images W Aᵀ; which matrices (B,) the
    rounding of the dtype makes too inaccurate; the limits on the norm of AᵀA outside the space (B,): `floor`, or the
    k-th Ritz value and `slack`; and what `leading_sum_bound` is at `floor`, where that is known.
    """

    found: Krylov
    images: Tensor
    hopeless: Tensor
    floor: Tensor
    slack: Tensor
    sum: Tensor | None


def _stacked(images: list[Tensor]) -> Tensor:
    """The images one below the other, stored by columns as `forth_and_back` leaves them, which is faster."""
    return torch.cat([image.mT for image in images], -1).mT


def _coupling(found: Krylov) -> Tensor:
    """RᵀR (B, p, p), R = F E_qᵀ being what couples the space to the rest."""
    f, coupling = found.residual.to(torch.float64), torch.zeros_like(found.t)
    coupling[:, -found.block :, -found.block :] = by(f, f.mT)
    return coupling


def _columns(z: Tensor) -> tuple[Tensor, Tensor]:
    """Q with orthonormal columns and R in float64, z = QR, of z (B, m, k) whose columns are nearly orthogonal.

    As the images of Ritz vectors are. Then Cholesky's QR is as accurate as Householder's, which waits for all threads
    at each column. Where they are not, a zero column for one, it is Householder's.
    """
    size = z.norm(dim=-2, keepdim=True)
    unit = z / size.clamp_min(torch.finfo(z.dtype).tiny)
    wide = unit.to(torch.float64)
    factor, info = torch.linalg.cholesky_ex(wide.mT @ wide)
    if bool((info != 0).any()) or not bool((factor.diagonal(dim1=-2, dim2=-1) > 0.9).all()):
        q, r = torch.linalg.qr(z)
        return q, r.to(torch.float64)
    eye = torch.eye(z.shape[-1], dtype=wide.dtype, device=z.device)
    turn = torch.linalg.solve_triangular(factor.mT, eye, upper=True)
    return unit @ turn.to(z.dtype), factor.mT * size.to(torch.float64)


def _space(ops: Products, k: int, rtol: float, generator: torch.Generator, *, wide: bool) -> Space:
    b, _, n = ops.shape
    r = min(k + 8 if wide else max(8, -(-k // 2)), n)
    images: list[Tensor] = []
    eps = torch.finfo(ops.like.dtype).eps
    x = ops.dense
    square = torch.linalg.vector_norm(x, dim=(1, 2)).double() ** 2 if x is not None else None
    hopeless, floor = torch.zeros(b, dtype=torch.bool, device=ops.like.device), ops.like.new_zeros(b).double()
    slack = floor
    total: Tensor | None = None
    before: tuple[int, Tensor] | None = None
    sample = gaussian(generator, ops.like, b, 8, n).to(ops.like.dtype) if square is None else None
    cast = None if sample is None else ops.forth(sample)

    def apply(y: Tensor) -> Tensor:
        image, back = ops.both(y)
        images.append(image)
        return back

    def stop(found: Krylov) -> int:
        nonlocal hopeless, floor, slack, total, before
        w, _, residuals = ritz_pairs(found)
        whole = w.sum(-1)
        if square is not None:
            whole = square
        elif sample is not None and cast is not None:
            # About ‖AW‖² + ‖A(I − WWᵀ)‖².
            shadow = cast - by(by(sample, found.rows.mT), _stacked(images))
            whole = whole + norm(shadow) ** 2 / sample.shape[-2]
        captured = w[:, -k:].clamp_min(0).sum(-1)
        left = (whole - captured).clamp_min(0)
        allowed, size = rtol * whole.sqrt(), left.sqrt()

        def worse(by: Tensor) -> Tensor:
            return size - (left - by).clamp_min(0).sqrt()

        blur = 8 * math.sqrt(k * w.shape[-1]) * eps * w[:, -1]
        hopeless = (size > 0.5 * allowed) & (worse(blur) > 0.4 * allowed)
        squares = residuals[:, -k:] ** 2
        floor = ALLOWED[0] * w[:, -k].clamp_min(0)
        missed = worse(expected_loss(squares, w, k, floor))
        enough = missed <= 0.5 * allowed
        for share in ALLOWED[1:]:
            wider = share * w[:, -k].clamp_min(0)
            floor = torch.where(worse(expected_loss(squares, w, k, wider)) <= 0.5 * allowed, wider, floor)
        slack = torch.where(size > 0.3 * allowed, 0.6 * allowed * size - 0.09 * allowed**2, 0.09 * allowed**2) / k
        if wide:
            # The norm outside may be as large as the k-th eigenvalue.
            enough = enough & (worse(2 * squares.sqrt().sum(-1)) <= 0.3 * allowed)
        lost = (norm(found.residual) <= 1e2 * eps * w[:, -1]) | (hopeless & (eps > 1e-12))
        if not bool((enough | lost).all()):
            now = torch.where(lost, -math.inf, (missed / (0.5 * allowed)).log())
            more = next_check(found, before, now)
            before = found.t.shape[-1] // found.block, now
            return more
        if wide:
            return 0
        # The loss is that of the leading vectors alone. Others, not found yet, may pass them.
        for share in ALLOWED[::-1]:
            lower = torch.where(enough, floor, floor.minimum(share * w[:, -k].clamp_min(0)))
            if total is not None and bool((lower == floor).all()):
                continue
            floor = lower
            total = leading_sum_bound(found.t, _coupling(found), floor, torch.full_like(floor, math.inf), k)
            enough = worse((total - captured).clamp_min(0)) <= 0.8 * allowed
            if bool((enough | lost).all()):
                return 0
        total = None
        return 1

    limit = max(k + 2 * r, n if wide else n // 2)
    if ops.dense is None:
        limit = min(limit, k + 2 * r + LONGEST)
    start = random_rows(generator, ops.like, b, r, n)
    found = lanczos(apply, start, -(-limit // r), stop=stop, first=-(-k // r) + 1)
    return Space(found, _stacked(images), hopeless, floor, slack, total)


def _beyond(ops: Products, space: Space, kth: Tensor, generator: torch.Generator) -> tuple[Krylov, Tensor]:
    """Lanczos on (I − WWᵀ)AᵀA(I − WWᵀ) until its norm is shown to be within the limits or beyond them; and the limit.

    `kth` (B,) is the k-th Ritz value inside the space.
    """
    rows, near = space.found.rows, space.floor

    def project(y: Tensor) -> Tensor:
        return y - by(by(y, rows.mT), rows)

    def outside(y: Tensor) -> Tensor:
        return project(ops.both(y)[1])  # y is outside, as the start and all that is projected

    def stop(seen: Krylov) -> int:
        nonlocal near
        theta = ritz(seen)
        # Rounding leaves the bound a little above this, and within the floor.
        below = space.floor * (1 - 2.0**-20)
        near = torch.where(theta < below, below, theta + space.slack)
        small = exclusion_ratio(seen, near[:, None], torch.zeros_like(near)[:, None])[:, 0] < 0.6
        return int(not bool(((theta > kth + 2 * space.slack) | small).all()))

    b, _, n = ops.shape
    start = project(random_rows(generator, ops.like, b, min(OUTSIDE, n), n))
    return lanczos(outside, start, 24, stop=stop, first=3), near


def by_products(
    ops: Products,
    k: int,
    caller: Caller,
    *,
    rtol: float,
    generator: torch.Generator | None,
    wide: bool = False,
    certify: bool = True,
) -> Found:
    """Block Krylov on AᵀA from about k/2 random vectors, or k + 8 of them if `wide`, until the rank-k part's excess is
    below rtol.

    Slow decay takes many small blocks, fast decay few: the Ritz values decide when to stop. The bound needs the norm of
    AᵀA outside the space, which a second, deflated Lanczos run from other random vectors bounds, and the rounding of
    both runs, measured in float64 by products with a few more random vectors. With AᵀAW = WT + FE_qᵀ + D and
    orthonormal W there is a symmetric Δ, ‖Δ‖_F ≤ √2 ‖D‖_F, for which (AᵀA − Δ)W = WT + FE_qᵀ, and the k largest
    eigenvalues of Δ sum to at most √k ‖Δ‖_F.
    """
    n = ops.shape[-1]
    source = default_generator(generator)
    space = _space(ops, k, rtol, source, wide=wide)
    found, images, hopeless = space.found, space.images, space.hopeless
    p, r = found.t.shape[-1], found.block
    dtype = ops.like.dtype
    w, s = lapack.small_eigh(found.t)
    chosen = s[:, :, -k:].flip(-1).mT.to(dtype)
    q, upper = _columns(by(chosen, images).mT)
    left, sigma, right, ok = lapack.svd(upper)
    turn = by(right.mT.to(dtype), chosen)
    value, factors = caller.rounded(q @ left.to(dtype), sigma, by(turn, found.rows).mT)
    reason = torch.where(ok & ~(hopeless & (dtype != torch.float64)), cert.NONE, cert.INACCURATE)
    if not certify or bool((reason != cert.NONE).all()):
        return Found.bare(value, reason, p // r)

    basis = found.rows.to(torch.float64)
    own = probes.probes(p, basis.device, SEEN[0])
    z = own.omega.mT @ basis

    def project(y: Tensor) -> Tensor:
        return y - by(by(y, basis.mT), basis)

    f, unit = found.residual.to(torch.float64), ops.unit + gamma(p)
    # Where the space is invariant some rows are zero, and its dimension is below n.
    short = p < n or bool((basis.norm(dim=-1) < 0.5).any())
    rest = None
    if short:
        rest, near = _beyond(ops, space, w[:, -k], source)
        other = probes.probes(rest.t.shape[-1], basis.device, SEEN[1])
        beyond = other.omega.mT @ rest.rows.to(torch.float64)
        back, forth, square = ops.twice(torch.cat([z, project(beyond)], -2))
        size = 1.1 * (w[:, -1].abs() + two_norm(f) + ritz(rest).abs()) if square is None else square
        ours = by(other.omega.mT @ rest.t, rest.rows.to(torch.float64))
        ours = ours + other.omega.mT[:, -rest.block :] @ rest.residual.to(torch.float64)
        gap = project(back[:, z.shape[-2] :]) - ours
        noise = probes.two_norm_bound(gap, other, 4 * unit * size * norm(beyond))
        outside = top_bound(rest, ritz(rest), near, noise=noise).clamp_min(0)
    else:
        back, forth, square = ops.twice(z)
        outside = torch.zeros_like(w[:, 0])
    above = 1.1 * (w[:, -1].abs() + two_norm(f) + outside)
    size = above if square is None else square
    if ops.dense is not None:
        # A V from the run's own images, whose distance from A W is bounded.
        combined, shown = turn.to(torch.float64), images.to(torch.float64)
        gap = forth[:, : z.shape[-2]] - own.omega.mT @ shown
        off = 1.01 * probes.of_norm(gap, own, 4 * unit * size.sqrt() * norm(z))
        off = off + size.sqrt() * norm(factors[2] - by(combined, basis).mT)
        reached = by(combined, shown).mT
    else:
        reached = ops.forth(factors[2].mT).mT
        off = 4 * unit * size.sqrt() * norm(factors[2])
    gap = back[:, : z.shape[-2]] - by(own.omega.mT @ found.t, basis) - own.omega.mT[:, -r:] @ f
    blur = probes.of_norm(gap, own, 4 * unit * size * norm(z))
    # W is orthonormal but for rounding and zero rows, and F orthogonal to it.
    inner = by(basis, basis.mT)
    kept = torch.diag_embed((inner.diagonal(dim1=-2, dim2=-1) > 0.5).to(inner.dtype))
    blur = blur + 2 * above * norm(inner - kept) + norm(by(basis, f.mT))
    total = space.sum
    if total is None or bool((outside > space.floor).any()):
        highest = torch.full_like(outside, math.inf)
        if bool((outside > CLUSTERED * w[:, -k]).any()):
            # Where the space holds only a part of a cluster, the bound on the largest eigenvalue is the best for each.
            highest = top_bound(found, w[:, -1], w[:, -1] + space.slack, noise=blur)
        total = leading_sum_bound(found.t, _coupling(found), outside, highest, k)
    top = total + math.sqrt(2 * k) * blur + 8 * (k + 1) * p * U * above
    if square is not None:
        optimum = (square * (1 - 8 * ops.unit) - top).clamp_min(0).sqrt()
        bound, missed = excess(factors, reached, off, square, optimum, ops.unit, ops.dense)
        if ops.dense is not None:
            least, _ = excess(factors, reached, 0.0, square, optimum, ops.unit, ops.dense)
            if bool((bound > 2 * least).any()):
                # The error of A V is most of the bound: one more pass removes it.
                reached = probes.apply(ops.dense, factors[2])
                off = 4 * unit * size.sqrt() * norm(factors[2])
                bound, missed = excess(factors, reached, off, square, optimum, ops.unit, ops.dense)
    else:
        inside = (w.sum(-1) - math.sqrt(p) * blur).clamp_min(0)
        shadow = torch.zeros_like(inside)
        if rest is not None:
            _, cast, _ = ops.twice(project(gaussian(source, basis, len(basis), SHADOW, n)))
            shadow = norm(cast) ** 2 / SHADOW
        bound, missed = excess_of_unknown(factors, reached, off, top, inside, shadow, unit)
    return Found(value, bound, missed, reason, p // r, (5 + (square is None)) * FAILURE)
