"""Singular values, and the best approximation of low rank, with certificates."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError
from gramian.linalg import certificate as cert
from gramian.linalg import factor
from gramian.linalg.batch import Answer, Route, check, choose, climb, ladder, load, norm, scale
from gramian.linalg.certificate import Certificate, default_rtol, require_converged
from gramian.linalg.symmetric import gram
from gramian.linalg.twofold import Pair, U, eye_like, gamma, minus, pair, product, rough, transpose

Product = Callable[[Pair, Pair], Pair]
RESOLVED = 1e-8
"""σ/σ₁ below which a float64 Gram matrix, whose eigenvalues are σ² ± u·σ₁², no longer sees σ."""


def gram_eigvalsh(x: Tensor, *, decline: float) -> Answer:
    """Roots of the eigenvalues of XᵀX in float64. |σ̂ − σ| ≤ η/σ̂ or √η, η bounding the error of an eigenvalue."""
    w, ok = factor.eigvalsh(gram(x, torch.float64))
    s = w.clamp_min(0).sqrt().flip(-1)
    m, n = x.shape[-2:]
    top = s.amax(-1, keepdim=True) if n else s.new_zeros(s.shape[0], 1)
    # The product, then LAPACK's backward error with a generous p(n) = 10n (Anderson et al., LAPACK Users' Guide, §4.7).
    eta = ((gamma(m) + 10 * n * U) * norm(x) ** 2)[:, None]
    error = (eta / s).nan_to_num(nan=math.inf).minimum(eta.sqrt()).norm(dim=-1) + U * norm(s)
    unseen = (s < RESOLVED * top).any(-1)
    reason = torch.where(ok, torch.where(unseen, cert.INACCURATE, cert.NONE), cert.LAPACK)
    return Answer(s, error, torch.zeros_like(error), reason)


def _svd_answer(x: Tensor, times: Product) -> Answer:
    """σ(UΣVᵀ) is within ‖X − UΣVᵀ‖_F of σ(X) (Mirsky), and within the defects of U and V of Σ."""
    u, s, v, ok = factor.svd(x)
    sigma = pair(torch.diag_embed(s))
    left, right = pair(u), pair(v)
    gap, gap_error = minus(pair(x), times(times(left, sigma), transpose(right)))
    error = norm(gap) + gap_error
    for vectors in (left, right):
        f, f_error = minus(times(transpose(vectors), vectors), eye_like(vectors.hi))
        # U = Q(I + F)^(1/2), and ‖(I + F)^(1/2) − I‖ ≤ ‖F‖/2 to first order.
        error = error + (norm(f * s[:, None, :]) + f_error * norm(s)) * 0.51 + (norm(f) + f_error) ** 2 * norm(s)
    reason = torch.where(ok, cert.NONE, cert.LAPACK)
    return Answer(s, error, norm(gap) / norm(x).clamp_min(2.0**-1000), reason)


def svd_values(x: Tensor, *, decline: float) -> Answer:
    """By the SVD, bounded from residuals in plain float64."""
    return _svd_answer(x, rough)


def svd_values_twofold(x: Tensor, *, decline: float) -> Answer:
    """By the SVD, bounded from twofold residuals."""
    return _svd_answer(x, product)


SVDVALS: dict[str, Route] = {
    # Not for float64's default rtol: who works in float64 wants small singular values to more than √u.
    "gram_eigvalsh": Route(gram_eigvalsh, None, 2e-6, lambda m, n: {"eigvalsh64": 1, "float64": 0.8 * m / n}),
    "svd": Route(svd_values, torch.float64, 1e-13, lambda m, n: {"svd64": 0.5 + 0.5 * m / n, "float64": 5}),
    "svd_twofold": Route(
        svd_values_twofold, torch.float64, 0.0, lambda m, n: {"svd64": 0.5 + 0.5 * m / n, "float64": 15}
    ),
}


@torch.no_grad()
def svdvals_ex(
    a: Float[Tensor, "*b m n"], *, method: str = "auto", rtol: float | None = None
) -> tuple[Float[Tensor, "*b k"], Certificate]:
    """`svdvals` with its certificate, never raising for a matrix's values.

    >>> value, certificate = svdvals_ex(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    >>> value.tolist(), certificate.converged.item()
    ([4.0, 3.0], True)
    """
    check("svdvals", a)
    choose("svdvals", method, SVDVALS)
    tall = a.mT if a.shape[-2] < a.shape[-1] else a
    tolerance = default_rtol(rtol, a.dtype)
    names = [method] if method != "auto" else ladder(SVDVALS, tall.shape, tolerance, tall.device.type)
    return climb(load(tall), SVDVALS, names, tolerance, torch.clone)


def svdvals(a: Float[Tensor, "*b m n"], *, method: str = "auto", rtol: float | None = None) -> Float[Tensor, "*b k"]:
    """The singular values, descending.

    σᵢ(A) = λᵢ(AᵀA)^(1/2), i = 1 … min(m, n).

    Arguments: `a` (..., m, n); `method`, one of `SVDVALS` or "auto"; `rtol`, the error ‖σ̂ − σ‖₂ / ‖σ‖₂ asked for
    (`certificate.RTOL` of the dtype if None): relative to all of them, not to each.
    Raises: `ShapeError`, `DtypeError`; `ConvergenceError` where the error bound is above rtol.
    Cost: a float64 product and symmetric eigendecomposition of the smaller side; an SVD where some σ is below
    1e-8 σ₁, and for float64. Accuracy: one rounding of the dtype. The residual is ‖A − UΣVᵀ‖_F / ‖A‖_F.
    Source: Mirsky, Quart. J. Math. 11 (1960); Golub and Van Loan, Matrix Computations (2013), §8.6.

    >>> svdvals(torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]]))
    tensor([2., 1.])
    """
    value, certificate = svdvals_ex(a, method=method, rtol=rtol)
    require_converged("svdvals", certificate)
    return value


SVD_LOWRANK = ("svd",)


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
    choose("svd_lowrank", method, dict.fromkeys(SVD_LOWRANK))
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= min(a.shape[-2:]):
        raise InputError(
            f"svd_lowrank: expected an integer rank from 0 to min(m, n) = {min(a.shape[-2:])}, got {rank!r}."
        )
    batch = load(a)
    tolerance = default_rtol(rtol, a.dtype)
    u, s, v, ok = factor.svd(batch.x)
    spread = _svd_answer(batch.x, rough).error
    bad = ~batch.finite
    out_u, out_v = u[..., :rank].to(a.dtype), v[..., :rank].to(a.dtype)
    out_s = scale(s[..., :rank], batch.exponent).to(a.dtype)
    scaled = scale(out_s.to(torch.float64), -batch.exponent)
    part = out_u.to(torch.float64) * scaled[:, None, :]
    gap, gap_error = minus(pair(batch.x), rough(pair(part), transpose(pair(out_v.to(torch.float64)))))
    reached = norm(gap) + gap_error + U * norm(scaled)
    optimum = norm(s[..., rank:])
    excess = (reached - (optimum - spread).clamp_min(0)).clamp_min(0)
    size = norm(batch.x)
    bound = torch.where(size > 0, excess / size, 0.0)
    reason = torch.where(bad, cert.NOT_FINITE, torch.where(ok, cert.NONE, cert.LAPACK))
    bound = torch.where(reason == cert.NONE, bound, math.inf).nan_to_num(nan=math.inf, posinf=math.inf)
    converged = bound <= tolerance
    reason = torch.where((reason == cert.NONE) & ~converged, cert.INACCURATE, reason)

    def shaped(x: Tensor) -> Tensor:
        return x.reshape(batch.shape + x.shape[1:])

    certificate = Certificate(
        converged=shaped(converged),
        residual=shaped(torch.where(bad, math.nan, torch.where(size > 0, norm(gap) / size, 0.0))),
        error_bound=shaped(bound),
        kind=shaped(torch.zeros_like(reason)),
        failure_probability=shaped(torch.zeros_like(bound)),
        steps=shaped(torch.zeros_like(reason)),
        method=shaped(torch.zeros_like(reason)),
        reason=shaped(reason),
        methods=SVD_LOWRANK,
    )
    nan = bad[:, None, None]
    value = (
        shaped(torch.where(nan, math.nan, out_u)),
        shaped(torch.where(bad[:, None], math.nan, out_s)),
        shaped(torch.where(nan, math.nan, out_v)),
    )
    return value, certificate


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
    certificate's `error_bound` bounds: the factors themselves are not unique. `generator` is for random methods.
    Raises: `ShapeError`, `DtypeError`, `InputError`; `ConvergenceError` where the excess may be above rtol.
    Cost: a full float64 SVD (about 50 products). Accuracy: one rounding of the dtype. The residual is
    ‖A − USVᵀ‖_F / ‖A‖_F.
    Source: Eckart and Young, Psychometrika 1 (1936).

    >>> u, s, v = svd_lowrank(torch.tensor([[2.0, 2.0], [2.0, 2.0]]), 1)
    >>> s
    tensor([4.])
    """
    value, certificate = svd_lowrank_ex(a, rank, method=method, rtol=rtol, generator=generator)
    require_converged("svd_lowrank", certificate)
    return value
