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
from gramian.linalg import factor
from gramian.linalg.batch import check, choose, load, norm, scale
from gramian.linalg.certificate import Certificate, default_rtol, require_converged
from gramian.linalg.krylov import FAILURE, Krylov, default_generator, gaussian, lanczos, times, top_bound
from gramian.linalg.twofold import U, eye_like, gamma, minus, pair, rough, transpose
from gramian.linalg.verdict import verdict

SMALL = 96
"""Up to this smaller side the SVD costs less than the Krylov method's calls."""
SHARE = 4
"""Past rank n/4 the Krylov space is so large a part of the whole that the SVD costs less."""
PROBES = 8

Triple = tuple[Tensor, Tensor, Tensor]


class _Factors(NamedTuple):
    """U (B, m, k), S (B, k), V (B, n, k); an upper bound on Σ σᵢ², i ≤ k, of the matrix; failures; steps."""

    u: Tensor
    s: Tensor
    v: Tensor
    most: Tensor
    reason: Tensor
    steps: int
    failure_probability: float


def svd_error(x: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """A bound on ‖σ(A) − s‖₂: ‖A − USVᵀ‖_F (Mirsky) and the defects of U and V."""
    gap, error = minus(pair(x), rough(pair(u * s[:, None, :]), transpose(pair(v))))
    error = error + norm(gap) + 2 * U * norm(s)
    for vectors in (u, v):
        f, f_error = minus(rough(transpose(pair(vectors)), pair(vectors)), eye_like(vectors))
        error = error + (norm(f) + f_error) * norm(s)
    return error


def by_svd(x: Tensor, k: int, *, rtol: float, generator: torch.Generator | None) -> _Factors:
    """The leading part of the full SVD."""
    u, s, v, ok = factor.svd(x)
    spread = svd_error(x, u, s, v)
    # |σ̂ − σ| sums to at most `spread` in norm (Mirsky).
    most = (norm(s[:, :k]) + spread) ** 2
    return _Factors(u[..., :k], s[:, :k], v[..., :k], most, torch.where(ok, cert.NONE, cert.LAPACK), 0, 0.0)


def _most(t: Tensor, coupling: Tensor, outside: Tensor, k: int) -> Tensor:
    """An upper bound on the sum of the k largest eigenvalues of [[T, Rᵀ], [R, C]], from RᵀR and ‖C‖₂ ≤ `outside`.

    For any τ > 0 the matrix is at most diag(T + RᵀR/τ, C + τI) in Loewner's order, and so is each eigenvalue; the least
    over a few τ is taken.
    """
    w = torch.linalg.eigvalsh(t)
    kth = w[:, -k].clamp_min(0)
    size = norm(coupling).sqrt()
    best = torch.full_like(kth, math.inf)
    for share in (0.9, 0.6, 0.3, 0.1, 1e-2, 1e-4, 1e-8):
        tau = torch.maximum((kth - outside).clamp_min(0) * share, 1e-15 * w[:, -1].abs() + 1e-3 * share * size)
        raised = torch.linalg.eigvalsh(t + coupling / tau.clamp_min(2.0**-900)[:, None, None])
        total = torch.maximum(raised, (outside + tau)[:, None]).flip(-1)[:, :k].sum(-1)
        best = torch.minimum(best, total.nan_to_num(nan=math.inf))
    return best


def by_block_krylov(x: Tensor, k: int, *, rtol: float, generator: torch.Generator | None) -> _Factors:
    """Block Krylov on AᵀA from about k/2 random vectors, until what the rank-k part misses is below rtol.

    Slow decay takes many small blocks, fast decay few: the Ritz values seen so far decide when to stop. The bound needs
    the norm of AᵀA outside the space, which a second, deflated Lanczos from other random vectors bounds.
    """
    b, _, n = x.shape
    r = min(max(4, -(-k // 2)), n)
    source = default_generator(generator)
    images: list[Tensor] = []
    square = norm(x) ** 2

    def apply(y: Tensor) -> Tensor:
        images.append(times(x, y))
        return times(x.mT, images[-1])

    def stop(found: Krylov) -> bool:
        p = found.t.shape[-1]
        if p < k + r:
            return False
        w, s = torch.linalg.eigh((found.t + found.t.mT) / 2)
        top = w[:, -k:].clamp_min(0)
        missed = norm(found.residual @ s[:, -r:, -k:]) ** 2 / (0.5 * top[:, 0]).clamp_min(2.0**-900)
        left = (square - top.sum(-1)).clamp_min(0)
        excess = left.sqrt() - (left - missed).clamp_min(0).sqrt()
        return bool(((excess <= 0.5 * rtol * square.sqrt()) | (norm(found.residual) <= 1e-13 * w[:, -1])).all())

    limit = max(k + 2 * r, n // 2) // r
    start = gaussian(source, x, 1, n, r).expand(b, -1, -1)
    found = lanczos(apply, start, limit, stop=stop, every=1)
    basis, t = found.basis, found.t
    p = t.shape[-1]
    w, s = torch.linalg.eigh(t)
    chosen = s[:, :, -k:].flip(-1)
    image = torch.cat(images, -1) @ chosen
    q, upper = torch.linalg.qr(image)
    left, sigma, right, ok = factor.svd(upper)
    v = basis @ (chosen @ right)

    def outside(y: Tensor) -> Tensor:
        y = y - times(basis, times(basis.mT, y))
        y = times(x.mT, times(x, y))
        return y - times(basis, times(basis.mT, y))

    if p < n:
        probes = gaussian(source, x, 1, n, min(PROBES, n)).expand(b, -1, -1)

        def low_enough(seen: Krylov) -> bool:
            return bool((top_bound(seen)[1] <= torch.maximum(0.75 * w[:, -k], 1e-12 * w[:, -1])).all())

        rest = top_bound(lanczos(outside, probes, 24, stop=low_enough, every=2))[1].clamp_min(0)
    else:
        rest = torch.zeros_like(square)
    coupling = torch.zeros_like(t)
    coupling[:, -r:, -r:] = found.residual.mT @ found.residual
    # Every product of the run rounds: of A with a unit block, then of Aᵀ with that, then the projections.
    blur = 4 * gamma(max(x.shape[-2:]) + p) * square
    most = _most(t, coupling, rest, k) + (k + 1) * blur
    reason = torch.where(ok, cert.NONE, cert.INACCURATE)
    return _Factors(q @ left, sigma, v, most, reason, p // r, FAILURE)


SVD_LOWRANK: dict[str, Callable[..., _Factors]] = {"block_krylov": by_block_krylov, "svd": by_svd}
METHODS = tuple(SVD_LOWRANK)


def _excess(x: Tensor, value: Triple, exponent: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """An upper bound on (‖A − USVᵀ‖_F − optimum)/‖A‖_F of the factors as they were rounded, and ‖A − USVᵀ‖/‖A‖."""
    u, v = value[0].to(torch.float64), value[2].to(torch.float64)
    s = scale(value[1].to(torch.float64), -exponent)
    square = norm(x) ** 2
    inner = (times(x, v) * u).sum(-2) * s
    part = ((u.mT @ u) * (v.mT @ v) * s[:, :, None] * s[:, None, :]).flatten(1).sum(1)
    missed = (square - 2 * inner.sum(-1) + part).clamp_min(0)
    blur = 8 * gamma(x.shape[-1] + x.shape[-2]) * (square + part)
    reached = (missed + blur).sqrt()
    optimum = (square * (1 - 8 * x.shape[-1] * U) - most).clamp_min(0).sqrt()
    size = square.sqrt()
    zero = (size == 0) & (s == 0).all(-1)
    bound = torch.where(zero, 0.0, ((reached - optimum).clamp_min(0) / size).nan_to_num(nan=math.inf))
    return bound, torch.where(size > 0, missed.sqrt() / size.clamp_min(2.0**-1000), 0.0)


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
    batch, tolerance = load(a.mT if wide else a), default_rtol(rtol, a.dtype)
    names = [method]
    if method == "auto":
        names = ["svd"] if short <= SMALL or SHARE * rank > short else ["block_krylov", "svd"]
    if not rank:
        names = ["svd"]
    count = batch.x.shape[0]
    m, n = batch.x.shape[1:]
    u, s, v = (batch.x.new_full((count, *d), math.nan, dtype=a.dtype) for d in ((m, rank), (rank,), (n, rank)))
    bound = batch.x.new_full((count,), math.inf)
    residual, failure = bound * math.nan, torch.zeros_like(bound)
    code, steps = torch.zeros_like(batch.exponent), torch.zeros_like(batch.exponent)
    reason = torch.where(batch.finite, cert.INACCURATE, cert.NOT_FINITE)
    rows = batch.finite.nonzero().flatten()
    for name in names:
        if not rows.numel():
            break
        whole_batch = rows.numel() == count
        x, exponent = (batch.x if whole_batch else batch.x[rows]), batch.exponent[rows]
        found = SVD_LOWRANK[name](x, rank, rtol=tolerance, generator=generator)
        value = (found.u.to(a.dtype), scale(found.s, exponent).to(a.dtype), found.v.to(a.dtype))
        excess, left = _excess(x, value, exponent, found.most)
        for whole, part in zip((u, s, v, bound, residual), (*value, excess, left), strict=True):
            whole[rows] = part
        code[rows], steps[rows] = METHODS.index(name), found.steps
        reason[rows], failure[rows] = found.reason, found.failure_probability
        rows = rows[(excess > tolerance) | (found.reason == cert.INACCURATE)]
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
    Cost: "block_krylov", float64 products with about 4k vectors for slow decay and 2k for fast, and k³; "svd", used up
    to a side of 96, for k > n/4 and where the other is not certified, one float64 SVD (about 50 products).
    Accuracy: the excess is bounded from ‖A‖_F² − Σ sᵢ², so it is seen down to about 1e-7. The bound of "block_krylov"
    is an estimate that fails with probability `krylov.FAILURE`. The residual is ‖A − USVᵀ‖_F / ‖A‖_F.
    Source: Musco and Musco, arXiv:1504.05477, algorithm 2; the bound, Bhatia, Matrix Analysis (1997), §III.2.

    >>> u, s, v = svd_lowrank(torch.tensor([[2.0, 2.0], [2.0, 2.0]]), 1)
    >>> s
    tensor([4.])
    """
    value, certificate = svd_lowrank_ex(a, rank, method=method, rtol=rtol, generator=generator)
    require_converged("svd_lowrank", certificate)
    return value
