"""The best approximation of low rank, by block Krylov with a bound on what it misses, or by the SVD."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError
from gramian.linalg import certificate as cert
from gramian.linalg import factor, probes
from gramian.linalg.batch import check, choose, load, norm, scale, unscaled
from gramian.linalg.certificate import Certificate, default_rtol, require_converged
from gramian.linalg.krylov import (
    FAILURE,
    Krylov,
    by,
    default_generator,
    lanczos,
    random_rows,
    reach,
    ritz,
    top_bound,
    two_norm,
)
from gramian.linalg.twofold import U, eye_like, gamma, minus, pair, rough, transpose
from gramian.linalg.verdict import verdict

SMALL = 96
"""Up to this smaller side the SVD costs less than the Krylov method's calls."""
SHARE = 4
"""Past rank n/4 the Krylov space is so large a part of the whole that the SVD costs less."""
OUTSIDE = 16
"""Random vectors for the norm outside the Krylov space."""
SEEN = 8
"""Random vectors for the rounding of each of the two Krylov runs."""
ALLOWED = 0.6, 0.7, 0.8, 0.9
"""Shares of the k-th eigenvalue that the norm of AᵀA outside the space may be asked to stay below."""
NARROW = 5e-5
"""The rtol from which the factors are sought in float32."""
DIRECT = 1e-3
"""The share of ‖A‖_F² below which what is missed drowns in the difference of squares, and is formed instead."""

Triple = tuple[Tensor, Tensor, Tensor]


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
    ‖A − USVᵀ‖_F / ‖A‖_F; why they failed; steps; the probability that the bound is none.
    """

    value: Triple
    excess: Tensor
    residual: Tensor
    reason: Tensor
    steps: int = 0
    failure: float = 0.0


def svd_error(x: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """A bound on ‖σ(A) − s‖₂: ‖A − USVᵀ‖_F (Mirsky) and the defects of U and V."""
    gap, error = minus(pair(x), rough(pair(u * s[:, None, :]), transpose(pair(v))))
    error = error + norm(gap) + 2 * U * norm(s)
    for vectors in (u, v):
        f, f_error = minus(rough(transpose(pair(vectors)), pair(vectors)), eye_like(vectors))
        error = error + (norm(f) + f_error) * norm(s)
    return error


def _excess(
    x: Tensor, factors: Triple, forth: Tensor, off: Tensor | float, square: Tensor, optimum: Tensor
) -> tuple[Tensor, Tensor]:
    """An upper bound on (‖A − USVᵀ‖_F − optimum)/‖A‖_F, and ‖A − USVᵀ‖/‖A‖, from A V, known to within `off` in Frobenius
    norm, ‖A‖_F² and a lower bound on the optimum.
    """
    u, s, v = factors
    rounding = gamma(x.shape[-1] + x.shape[-2])
    inner = (forth * u).sum(-2) * s
    part = ((u.mT @ u) * (v.mT @ v) * s[:, :, None] * s[:, None, :]).flatten(1).sum(1)
    missed = (square - 2 * inner.sum(-1) + part).clamp_min(0)
    reached = (missed + 8 * rounding * (square + part) + 2 * norm(u * s[:, None, :]) * off).sqrt()
    size = square.sqrt()
    for i in ((missed < DIRECT * square) & (size > 0)).nonzero().flatten().tolist():
        scaled = u[i] * s[i]
        gap = torch.linalg.vector_norm(x[i].to(torch.float64) - scaled @ v[i].mT)
        missed[i] = gap**2
        reached[i] = gap + 2 * gamma(s.shape[-1] + 4) * (size[i] + scaled.norm() * v[i].norm())
    zero = (size == 0) & (s == 0).all(-1)
    bound = torch.where(zero, 0.0, ((reached - optimum).clamp_min(0) / size).nan_to_num(nan=math.inf))
    return bound, torch.where(size > 0, missed.sqrt() / size.clamp_min(2.0**-1000), 0.0)


def by_svd(x: Tensor, k: int, caller: Caller, *, rtol: float, generator: torch.Generator | None) -> Found:
    """The leading part of the full SVD."""
    x = x.to(torch.float64)
    u, s, v, ok = factor.svd(x)
    spread = svd_error(x, u, s, v)
    value, factors = caller.rounded(u[..., :k], s[:, :k], v[..., :k])
    # ‖σ̂ − σ‖₂ is at most `spread` (Mirsky).
    optimum = (norm(s[:, k:]) - spread).clamp_min(0)
    excess, left = _excess(x, factors, x @ factors[2], 0.0, norm(x) ** 2, optimum)
    return Found(value, excess, left, torch.where(ok, cert.NONE, cert.LAPACK))


def _most(t: Tensor, coupling: Tensor, outside: Tensor, k: int) -> Tensor:
    """An upper bound on the sum of the k largest eigenvalues λⱼ of [[T, Rᵀ], [R, C]], from RᵀR and ‖C‖₂ ≤ `outside`.

    For μ > ‖C‖ as many eigenvalues are above μ as T + Rᵀ(μ − C)⁻¹R has above it (Haynsworth), and so λⱼ is at most the
    larger of μ and the j-th of T + RᵀR/(μ − outside); the least over a few μ is taken, for each j.
    """
    w = torch.linalg.eigvalsh(t).flip(-1)
    room = (w[:, :k] - outside[:, None]).clamp_min(0)
    tiny = 1e-15 * w[:, :1].abs()
    size = norm(coupling).sqrt()[:, None]
    # Near the eigenvalues themselves, and closer to `outside` where it is as large as they are.
    taus = [(room[:, max(0, k * i // 8 - 1), None]).maximum(tiny + 1e-3 * size) for i in (0, 2, 4, 6, 7, 8)]
    taus += [(room[:, -1:] * share).maximum(tiny + 1e-3 * share * size) for share in (0.3, 1e-2, 1e-5, 1e-8)]
    tau = torch.cat(taus, -1)
    raised = t[:, None] + coupling[:, None] / tau.clamp_min(2.0**-900)[..., None, None]
    rounding = 8 * t.shape[-1] * U * torch.linalg.matrix_norm(raised)
    found = torch.linalg.eigvalsh(raised).flip(-1)[..., :k] + rounding[..., None]
    each = torch.maximum(found, (outside[:, None] + tau)[..., None])
    return each.nan_to_num(nan=math.inf).amin(1).sum(-1)


def _loss(found: Krylov, w: Tensor, s: Tensor, k: int, outside: Tensor) -> Tensor:
    """To second order how far the sum of the k largest eigenvalues is above that of T's, w with vectors s, if the norm
    outside the space is at most `outside` (B,): Σ ‖rⱼ‖² / (wⱼ − outside), rⱼ the residuals of the Ritz pairs.
    """
    f = found.residual.to(torch.float64)
    ends = s[:, -found.block :, -k:]
    squares = (ends * (by(f, f.mT) @ ends)).sum(-2)
    return (squares / (w[:, -k:] - outside[:, None]).clamp_min(2.0**-900)).sum(-1)


def _space(x: Tensor, k: int, rtol: float, generator: torch.Generator) -> tuple[Krylov, Tensor, Tensor, Tensor]:
    """A Krylov space of AᵀA that holds the leading k vectors well enough for rtol, the images W Aᵀ, which matrices (B,)
    lose too much to the rounding of x's dtype, and which norm outside the space (B,) is small enough.
    """
    b, _, n = x.shape
    r = min(max(8, -(-k // 2)), n)
    images: list[Tensor] = []
    square = torch.linalg.vector_norm(x, dim=(1, 2)).to(torch.float64) ** 2
    hopeless = torch.zeros(b, dtype=torch.bool, device=x.device)
    floor = torch.zeros_like(square)

    def apply(y: Tensor) -> Tensor:
        images.append(by(y, x.mT))
        return by(images[-1], x)

    def stop(found: Krylov) -> int:
        nonlocal hopeless, floor
        w, s = torch.linalg.eigh(found.t)
        left = (square - w[:, -k:].clamp_min(0).sum(-1)).clamp_min(0)
        fine, size = rtol * square.sqrt(), left.sqrt()

        def worse(by: Tensor) -> Tensor:
            return size - (left - by).clamp_min(0).sqrt()

        blur = 8 * math.sqrt(k * w.shape[-1]) * torch.finfo(x.dtype).eps * w[:, -1]
        hopeless = (size > 0.5 * fine) & (worse(blur) > 0.4 * fine)
        floor = ALLOWED[0] * w[:, -k].clamp_min(0)
        enough = worse(_loss(found, w, s, k, floor)) <= 0.5 * fine
        for share in ALLOWED[1:]:
            wider = share * w[:, -k].clamp_min(0)
            floor = torch.where(worse(_loss(found, w, s, k, wider)) <= 0.5 * fine, wider, floor)
        stuck = norm(found.residual) <= 1e2 * torch.finfo(x.dtype).eps * w[:, -1]
        return int(not bool((enough | stuck | (hopeless & (x.dtype != torch.float64))).all()))

    limit = max(k + 2 * r, n // 2) // r
    start = random_rows(generator, x, b, r, n)
    found = lanczos(apply, start, limit, stop=stop, first=-(-k // r) + 1)
    return found, torch.cat(images, -2), hopeless, floor


def _beyond(x: Tensor, found: Krylov, floor: Tensor, generator: torch.Generator) -> Krylov:
    """Lanczos on (I − WWᵀ)AᵀA(I − WWᵀ) until its norm is known to be below `floor` (B,), or not to be."""

    def outside(y: Tensor) -> Tensor:
        y = y - by(by(y, found.rows.mT), found.rows)
        y = by(by(y, x.mT), x)
        return y - by(by(y, found.rows.mT), found.rows)

    def stop(seen: Krylov) -> int:
        fine = reach(seen, floor[:, None], torch.zeros_like(floor)[:, None])[:, 0] < 0.6
        return int(not bool(((floor < ritz(seen)) | fine).all()))

    n = x.shape[-1]
    start = random_rows(generator, x, x.shape[0], min(OUTSIDE, n), n)
    return lanczos(outside, start, 24, stop=stop, first=3)


def by_block_krylov(x: Tensor, k: int, caller: Caller, *, rtol: float, generator: torch.Generator | None) -> Found:
    """Block Krylov on AᵀA from about k/2 random vectors, in x's dtype, until what the rank-k part misses is below rtol.

    Slow decay takes many small blocks, fast decay few: the Ritz values seen so far decide when to stop. The bound needs
    the norm of AᵀA outside the space, which a second, deflated Lanczos from other random vectors bounds, and what
    rounding did to both, seen in float64 from products with a few random vectors more. With AᵀAW = WT + FE_qᵀ + D and
    orthonormal W there is a symmetric Δ, ‖Δ‖_F ≤ √2 ‖D‖_F, for which (AᵀA − Δ)W = WT + FE_qᵀ, and the k largest
    eigenvalues of Δ sum to at most √k ‖Δ‖_F.
    """
    m, n = x.shape[-2:]
    source = default_generator(generator)
    found, images, hopeless, floor = _space(x, k, rtol, source)
    p, r = found.t.shape[-1], found.block
    w, s = torch.linalg.eigh(found.t)
    chosen = s[:, :, -k:].flip(-1).mT.to(x.dtype)
    q, upper = torch.linalg.qr(by(chosen, images).mT)
    left, sigma, right, ok = factor.svd(upper.to(torch.float64))
    turn = by(right.mT.to(x.dtype), chosen)
    value, factors = caller.rounded(q @ left.to(x.dtype), sigma, by(turn, found.rows).mT)
    reason = torch.where(ok & ~(hopeless & (x.dtype != torch.float64)), cert.NONE, cert.INACCURATE)
    if bool((reason != cert.NONE).all()):
        nothing = torch.full_like(w[:, 0], math.inf)
        return Found(value, nothing, nothing * math.nan, reason, p // r, FAILURE)

    wide = found.rows.to(torch.float64)
    own = probes.probes(p, x.device, SEEN)
    z = own.omega.mT @ wide
    # Rows that vanished, where the space is invariant, leave it short of n.
    if p < n or bool((wide.norm(dim=-1) < 0.5).any()):
        rest = _beyond(x, found, floor, source)
        other = probes.probes(rest.t.shape[-1], x.device, SEEN)
        beyond = other.omega.mT @ rest.rows.to(torch.float64)
        both = torch.cat([z, beyond - by(by(beyond, wide.mT), wide)], -2)
        back, forth, square = probes.twice(x, both)
        exact = back[:, z.shape[-2] :]
        exact = exact - by(by(exact, wide.mT), wide)
        ours = by(other.omega.mT @ rest.t, rest.rows.to(torch.float64))
        ours = ours + other.omega.mT[:, -rest.block :] @ rest.residual.to(torch.float64)
        noise = probes.two_norm(exact - ours, other, 4 * gamma(m + n + p) * square * norm(beyond))
        outside = top_bound(rest, ritz(rest), floor, noise=noise).clamp_min(0)
    else:
        back, forth, square = probes.twice(x, z)
        outside = torch.zeros_like(square)
    f = found.residual.to(torch.float64)
    # A V from the run's own images, which are known to be near A W.
    combined, shown = turn.to(torch.float64), images.to(torch.float64)
    gap = forth[:, : z.shape[-2]] - own.omega.mT @ shown
    off = 1.01 * probes.of_norm(gap, own, 4 * gamma(n + p) * square.sqrt() * norm(z))
    off = off + square.sqrt() * norm(factors[2] - by(combined, wide).mT)
    gap = back[:, : z.shape[-2]] - by(own.omega.mT @ found.t, wide) - own.omega.mT[:, -r:] @ f
    blur = probes.of_norm(gap, own, 4 * gamma(m + n + p) * square * norm(z))
    # W is orthonormal but for rounding, and F orthogonal to it; a row of W that vanished is zero.
    inner = by(wide, wide.mT)
    kept = torch.diag_embed((inner.diagonal(dim1=-2, dim2=-1) > 0.5).to(inner.dtype))
    size = 1.1 * (w[:, -1].abs() + two_norm(f) + outside)
    blur = blur + 2 * size * norm(inner - kept) + norm(by(wide, f.mT))
    coupling = torch.zeros_like(found.t)
    coupling[:, -r:, -r:] = by(f, f.mT)
    most = _most(found.t, coupling, outside, k) + math.sqrt(2 * k) * blur + 8 * (k + 1) * p * U * size
    optimum = (square * (1 - 8 * gamma(m + n)) - most).clamp_min(0).sqrt()
    excess, missed = _excess(x, factors, by(combined, shown).mT, off, square, optimum)
    return Found(value, excess, missed, reason, p // r, 4 * FAILURE)


SVD_LOWRANK: dict[str, Callable[..., Found]] = {"block_krylov": by_block_krylov, "svd": by_svd}
METHODS = tuple(SVD_LOWRANK)


@torch.no_grad()
def svd_lowrank_ex(
    a: Float[Tensor, "*b m n"],
    rank: int,
    *,
    method: str = "auto",
    rtol: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[tuple[Float[Tensor, "*b m k"], Float[Tensor, "*b k"], Float[Tensor, "*b n k"]], Certificate]:
    """`svd_lowrank` with its certificate, never raising for a matrix's values.

    >>> (u, s, v), certificate = svd_lowrank_ex(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
    >>> s.tolist(), certificate.converged.item()
    ([3.0, 2.0], True)
    """
    check("svd_lowrank", a)
    choose("svd_lowrank", method, SVD_LOWRANK)
    short = min(a.shape[-2:])
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= short:
        raise InputError(f"svd_lowrank: expected an integer rank from 0 to min(m, n) = {short}, got {rank!r}.")
    wide = a.shape[-2] < a.shape[-1]
    batch, tolerance = unscaled(load(a.mT if wide else a)), default_rtol(rtol, a.dtype)
    names = [method]
    if method == "auto":
        names = ["svd"] if short <= SMALL or SHARE * rank > short else ["block_krylov", "svd"]
    if not rank:
        names = ["svd"]
    narrow = a.dtype != torch.float64 and tolerance >= NARROW and names[0] == "block_krylov"
    plan = [(names[0], None)] * narrow + [(name, torch.float64) for name in names]
    count, m, n = batch.raw.shape
    u, s, v = (
        torch.full((count, *d), math.nan, dtype=a.dtype, device=a.device) for d in ((m, rank), (rank,), (n, rank))
    )
    bound = torch.full((count,), math.inf, dtype=torch.float64, device=a.device)
    residual, failure = bound * math.nan, torch.zeros_like(bound)
    code, steps = torch.zeros_like(batch.exponent), torch.zeros_like(batch.exponent)
    reason = torch.where(batch.finite, cert.INACCURATE, cert.NOT_FINITE)
    rows = batch.finite.nonzero().flatten()
    for name, work in plan:
        if not rows.numel():
            break
        x = batch.at(work)
        x = x if rows.numel() == count else x[rows]
        caller = Caller(a.dtype, batch.exponent[rows])
        found = SVD_LOWRANK[name](x, rank, caller, rtol=tolerance, generator=generator)
        better = ~(found.excess >= bound[rows])
        kept = rows[better]
        for whole, part in zip((u, s, v, bound, residual), (*found.value, found.excess, found.residual), strict=True):
            whole[kept] = part[better]
        code[kept], steps[kept] = METHODS.index(name), found.steps
        reason[kept], failure[kept] = found.reason[better], found.failure
        rows = rows[(bound[rows] > tolerance) | (reason[rows] == cert.INACCURATE)]
    proof = verdict(
        bound,
        tolerance,
        reason,
        shape=batch.shape,
        methods=tuple(SVD_LOWRANK),
        code=code,
        residual=residual,
        steps=steps,
    )
    proof.kind.copy_((failure > 0).reshape(batch.shape))
    proof.failure_probability.copy_(failure.reshape(batch.shape))
    u, s, v = (y.reshape(batch.shape + y.shape[1:]) for y in (u, s, v))
    return ((v, s, u) if wide else (u, s, v)), proof


def svd_lowrank(
    a: Float[Tensor, "*b m n"],
    rank: int,
    *,
    method: str = "auto",
    rtol: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "*b m k"], Float[Tensor, "*b k"], Float[Tensor, "*b n k"]]:
    """The best approximation of rank k, as U (m, k), S (k,), V (n, k), in the convention of `torch.svd_lowrank`.

    A ≈ U diag(S) Vᵀ, the minimiser of ‖A − B‖_F over B of rank ≤ k.

    Arguments: `a` (..., m, n); `rank` k, from 0 to min(m, n); `method`, one of `SVD_LOWRANK` or "auto"; `rtol`, the
    excess (‖A − USVᵀ‖_F − optimum) / ‖A‖_F asked for (`certificate.RTOL` of the dtype if None), which is what the
    certificate's `error_bound` bounds: the factors themselves are not unique. `generator` of the random start, a fixed
    seed if None.
    Raises: `ShapeError`, `DtypeError`, `InputError`; `ConvergenceError` where the excess may be above rtol.
    Cost: "block_krylov", products with about 4k vectors for slow decay and 2k for fast, in float32 where its rounding
    leaves rtol, and a float64 pass with k + 24 to bound that; "svd", used up to a side of 96, for k > n/4 and where the
    other is not certified, one float64 SVD (about 50 products).
    Accuracy: the excess is bounded from ‖A‖_F² − Σ sᵢ², so it is seen down to about 1e-7 of ‖A‖_F unless all that is
    missed is below that. The bound of "block_krylov"
    is an estimate that fails with probability `krylov.FAILURE`. The residual is ‖A − USVᵀ‖_F / ‖A‖_F.
    Source: Musco and Musco, arXiv:1504.05477, algorithm 2; the bound, Bhatia, Matrix Analysis (1997), §III.2.

    >>> u, s, v = svd_lowrank(torch.tensor([[2.0, 2.0], [2.0, 2.0]]), 1)
    >>> s
    tensor([4.])
    """
    value, certificate = svd_lowrank_ex(a, rank, method=method, rtol=rtol, generator=generator)
    require_converged("svd_lowrank", certificate)
    return value
