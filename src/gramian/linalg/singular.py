"""Singular values, with certificates."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg import singular_derivatives
from gramian.linalg.certificate import Certificate, default_rtol, require_converged
from gramian.linalg.engine import lapack
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.double_double import Product, eye_like, minus, pair, product, rough, transpose
from gramian.linalg.engine.escalation import Answer, Method
from gramian.linalg.engine.function import MatrixFunction, evaluate, register
from gramian.linalg.engine.loading import check
from gramian.linalg.engine.real_form import less_certain, mean_of_pairs, real_form
from gramian.linalg.engine.rounding import U, gamma, norm
from gramian.linalg.engine.symmetric_products import gram

__all__ = ["svdvals", "svdvals_ex"]

RESOLVED = 1e-8
"""σ/σ₁ below which a float64 Gram matrix, whose eigenvalues are σ² ± u·σ₁², no longer sees σ."""


def by_gram(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """σ̂ (B, n) ascending from the eigenvalues of XᵀX in float64, bounds on |σ̂ − σ|, and where LAPACK converged (B,).

    With |σ̂² − σ²| ≤ η, |σ̂ − σ| ≤ η / (σ̂ + √(σ̂² − η)), and never more than √η.
    """
    m, n = x.shape[-2:]
    g = gram(x, torch.float64)
    w, ok = lapack.eigvalsh(g)
    s = w.clamp_min(0).sqrt()
    # The product's rounding, by ‖X‖_F², which is the trace, and LAPACK's backward error with p(n) = 4n: three times
    # the worst of 400 matrices for n ≤ 12, and 50 times for n = 400 (Anderson et al., LAPACK Users' Guide, §4.7).
    size = g.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    eta = 1.01 * (gamma(m) * size + 4 * n * U * (w.abs().amax(-1, keepdim=True) if n else size))
    error = (eta / (s + (w - eta).clamp_min(0).sqrt())).nan_to_num(nan=math.inf).minimum(eta.sqrt())
    return s, error + U * s, ok


def _gram_eigvalsh(x: Tensor, *, rtol: float, certify: bool = True) -> Answer:
    """Roots of the eigenvalues of XᵀX in float64."""
    s, error, ok = by_gram(x)
    top = s[:, -1:] if x.shape[-1] else s.new_zeros(s.shape[0], 1)
    unseen = (s < RESOLVED * top).any(-1)
    reason = torch.where(ok, torch.where(unseen, cert.INACCURATE, cert.NONE), cert.LAPACK)
    if not certify:
        return Answer.bare(s.flip(-1), reason)
    return Answer(s.flip(-1), error.norm(dim=-1), torch.zeros_like(top[:, 0]), reason)


def _svd_answer(x: Tensor, times: Product, certify: bool) -> Answer:
    """σ(UΣVᵀ) is within ‖X − UΣVᵀ‖_F of σ(X) (Mirsky), and within the defects of U and V of Σ."""
    u, s, v, ok = lapack.svd(x)
    if not certify:
        return Answer.bare(s, torch.where(ok, cert.NONE, cert.LAPACK))
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


def _svd(x: Tensor, *, rtol: float, certify: bool = True) -> Answer:
    """By the SVD, bounded from residuals in plain float64."""
    return _svd_answer(x, rough, certify)


def svd_double_double(x: Tensor, *, rtol: float, certify: bool = True) -> Answer:
    """By the SVD, bounded from double-double residuals."""
    return _svd_answer(x, product, certify)


def _exact(mp: Any, a: Any) -> Any:
    w = mp.eigsy(a.T * a if a.rows >= a.cols else a * a.T, eigvals_only=True)
    return mp.matrix([mp.sqrt(max(e, 0)) for e in sorted(w, reverse=True)])


SVDVALS = register(
    MatrixFunction(
        "svdvals",
        {
            # Not for float64's default rtol: callers with float64 want small singular values to more than √u.
            "gram_eigvalsh": Method(
                _gram_eigvalsh,
                None,
                2e-6,
                lambda m, n: {"eigvalsh64": 1, "float64": 0.8 * m / n},
                "σ ≥ 1e-8 σ₁: small σ are good to u σ₁²/σ",
            ),
            "svd": Method(
                _svd, torch.float64, 1e-13, lambda m, n: {"svd64": 0.5 + 0.5 * m / n, "float64": 5}, "the rest"
            ),
            "svd_double_double": Method(
                svd_double_double,
                torch.float64,
                0.0,
                lambda m, n: {"svd64": 0.5 + 0.5 * m / n, "float64": 15},
                "a bound from double-double residuals",
            ),
        },
        "general",
        1,
        plain=torch.linalg.svdvals,
        exact=_exact,
    )
)


@differentiable(
    singular_derivatives.SINGULAR_VALUES,
    shapes=lambda a, **_: a.new_empty(*a.shape[:-2], min(a.shape[-2:]), dtype=a.dtype.to_real()),
    methods=SVDVALS.methods,
    real=False,
    a=2,
)
def svdvals_ex(
    a: Inexact[Tensor, "*b m n"], *, method: str = "auto", rtol: float | None = None, certify: bool = True
) -> tuple[Float[Tensor, "*b k"], Certificate]:
    """`svdvals` with its certificate, never raising for a matrix's values.

    Args:
        a, method, rtol, certify: as for `svdvals`.
    Returns: the singular values and their `Certificate`.
    Raises: ShapeError, DtypeError, InputError: for wrong arguments.
    Cost: as for `svdvals`.
    Source: as for `svdvals`.

    >>> value, certificate = svdvals_ex(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    >>> value.tolist(), certificate.converged.item()
    ([4.0, 3.0], True)
    """
    if not isinstance(a, Tensor) or not a.is_complex():
        return evaluate(SVDVALS, a, method=method, rtol=rtol, certify=certify)
    # Each occurs twice in the real form, and the mean of the two is no farther from it than they were.
    pairs, proof = evaluate(
        SVDVALS, real_form(check("svdvals", a, real=False)), method=method, rtol=rtol, certify=certify
    )
    value, rounding = mean_of_pairs(pairs)
    return value, less_certain(proof, rounding, default_rtol(rtol, a.dtype))


def svdvals(
    a: Inexact[Tensor, "*b m n"], *, method: str = "auto", rtol: float | None = None, certify: bool = True
) -> Float[Tensor, "*b k"]:
    """The singular values, descending.

    σᵢ(A) = λᵢ(AᵀA)^(1/2), i = 1 … min(m, n).

    Args:
        a: `(..., m, n)`.
        method: the name of a method (see docs/linalg.md), or "auto".
        rtol: the error ‖σ̂ − σ‖₂ / ‖σ‖₂ asked for, relative to all singular values together, not to each;
            `certificate.RTOL` of the dtype if None.
        certify: whether to bound the error; if False, the value of the same route, and only seen failures raise.
    Returns: `(..., min(m, n))`, in the dtype of `a`, or of its real part.
    Raises:
        ShapeError: where `a` has fewer than two dimensions.
        DtypeError: where `a` is not floating point, real or complex.
        InputError: for an unknown method or a negative rtol.
        ConvergenceError: where the error bound is above rtol.
    Cost: a float64 product and symmetric eigendecomposition of the smaller side; an SVD where some σ is below
    1e-8 σ₁, and for float64. Accuracy: one rounding of the dtype. The certificate's residual is ‖A − UΣVᵀ‖_F / ‖A‖_F.
    Source: Mirsky, Quart. J. Math. 11 (1960); Golub and Van Loan, Matrix Computations (2013), §8.6.

    >>> svdvals(torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]]))
    tensor([2., 1.])
    """
    value, certificate = svdvals_ex(a, method=method, rtol=rtol, certify=certify)
    require_converged("svdvals", certificate)
    return value
