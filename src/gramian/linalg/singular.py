"""Singular values, with certificates."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg import factor
from gramian.linalg.batch import Answer, check, choose, climb, load, norm
from gramian.linalg.certificate import Certificate, default_rtol, require_converged
from gramian.linalg.twofold import Pair, U, eye_like, gamma, minus, pair, product, rough, transpose

Product = Callable[[Pair, Pair], Pair]
RESOLVED = 1e-8
"""σ/σ₁ below which a float64 Gram matrix, whose eigenvalues are σ² ± u·σ₁², no longer sees σ."""


def gram_eigvalsh(x: Tensor) -> Answer:
    """Roots of the eigenvalues of XᵀX in float64. |σ̂ − σ| ≤ η/σ̂ or √η, η bounding the error of an eigenvalue."""
    w, _, ok = factor.eigh(x.mT @ x)
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


def svd_values(x: Tensor) -> Answer:
    """By the SVD, bounded from residuals in plain float64."""
    return _svd_answer(x, rough)


def svd_values_twofold(x: Tensor) -> Answer:
    """By the SVD, bounded from twofold residuals."""
    return _svd_answer(x, product)


SVDVALS: dict[str, Callable[..., Answer]] = {
    "gram_eigvalsh": gram_eigvalsh,
    "svd": svd_values,
    "svd_twofold": svd_values_twofold,
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
    names = [method]
    if method == "auto":
        names = ["svd_twofold"] if a.dtype == torch.float64 else ["gram_eigvalsh", "svd"]
    return climb(load(tall), SVDVALS, names, default_rtol(rtol, a.dtype), torch.clone)


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
