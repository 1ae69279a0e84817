"""The polar factor, by several routes and with one certificate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError
from gramian.linalg import certificate as cert
from gramian.linalg import factor
from gramian.linalg.batch import Answer, check, choose, climb, load, norm
from gramian.linalg.certificate import Certificate, default_rtol, require_converged
from gramian.linalg.polar_express import COEFFICIENTS, defect, newton_schulz
from gramian.linalg.twofold import Pair, U, eye_like, gamma, minus, pair, plus, product, rough, symmetric, transpose

Product = Callable[[Pair, Pair], Pair]


def _by_svd(x: Tensor, times: Product, steps: int) -> Answer:
    """U Vᵀ, `steps` Newton steps, and the certificate; the isometry on the range where full rank is not proven."""
    u, s, v, ok = factor.svd(x)
    close = pair(u @ v.mT)
    for _ in range(steps):
        close = _newton(pair(x), close, s, v)
    answer = _certified(x, close, s, v, times, steps)
    top = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_zeros(s.shape[0], 1)
    kept = s > 2 * U * max(x.shape[-2:]) * top
    deficient = ~answer.error.isfinite() & ~kept.all(-1)
    value = torch.where(deficient[:, None, None], (u * kept[:, None, :]) @ v.mT, answer.value)
    reason = torch.where(ok, torch.where(deficient, cert.SINGULAR, answer.reason), cert.LAPACK)
    return replace(answer, value=value, reason=reason)


def svd(x: Tensor) -> Answer:
    """By the SVD; error uκ, bounded from residuals in plain float64."""
    return _by_svd(x, rough, steps=0)


def svd_refined(x: Tensor) -> Answer:
    """By the SVD and Newton steps in its basis on twofold residuals, which takes the error from uκ to u for uκ < 1."""
    return _by_svd(x, product, steps=2)


def gram_eigh(x: Tensor) -> Answer:
    """A (AᵀA)^(-1/2) by an eigendecomposition of the Gram matrix, and one Newton–Schulz step; error uκ²."""
    w, v, ok = factor.eigh(x.mT @ x)
    top = w.abs().amax(-1, keepdim=True) if w.shape[-1] else w.new_zeros(w.shape[0], 1)
    kept = w > 10 * max(x.shape[-2:]) * U * top
    root = torch.where(kept, w, torch.inf).rsqrt()
    q = x @ ((v * root[:, None, :]) @ v.mT)
    q = 1.5 * q - 0.5 * q @ (q.mT @ q)
    # Below that the Gram matrix cannot tell a small singular value from none: another route has to.
    answer = _certified(x, pair(q), w.clamp_min(0).sqrt().flip(-1), v.flip(-1), rough, steps=1)
    reason = torch.where(kept.all(-1), answer.reason, cert.INACCURATE)
    return replace(answer, reason=torch.where(ok, reason, cert.LAPACK))


POLAR: dict[str, Callable[..., Any]] = {
    "gram_eigh": gram_eigh,
    "svd": svd,
    "svd_refined": svd_refined,
    "newton_schulz": newton_schulz,  # outside the ladder: it neither goes to float64 nor waits for the device
}


def _newton(a: Pair, q: Pair, s: Tensor, v: Tensor) -> Pair:
    """One first-order step towards the polar factor, in the basis of the right singular vectors.

    With F = QᵀQ − I and W = (I − F/2)QᵀA, the polar factor of A is, to first order in the error of Q,
    Q(I − F/2 + Ω) + (A − Q(I − F/2)W) H⁻¹, where Ω is skew and ΩH + HΩ = W − Wᵀ.
    """
    f, _ = minus(product(transpose(q), q), eye_like(q.hi))
    w = product(transpose(q), a)
    inner = f @ w.hi
    skew = (w.hi - w.hi.mT) + (w.lo - w.lo.mT) - (inner - inner.mT) / 2
    sums = s[:, :, None] + s[:, None, :]
    omega = v @ ((v.mT @ skew @ v) / torch.where(sums > 0, sums, torch.inf)) @ v.mT
    step = q.hi @ (omega - f / 2)
    if q.hi.shape[-2] > q.hi.shape[-1]:
        outside, _ = minus(a, product(q, w))
        outside = outside + q.hi @ inner
        # What rounding left in range would be magnified by H⁻¹ and spoil QᵀQ.
        outside = outside - q.hi @ (q.hi.mT @ outside)
        step = step + outside @ (v / torch.where(s > 0, s, torch.inf)[:, None, :]) @ v.mT
    return plus(q, step)


def _certified(x: Tensor, q: Pair, s: Tensor, v: Tensor, times: Product, steps: int) -> Answer:
    """Bound ‖Q − polar(A)‖_F from ‖A − QH‖, QᵀQ − I, and a lower bound on H's smallest eigenvalue.

    Q' = Q(QᵀQ)^(-1/2) is the polar factor of A − E', E' = A − Q'H, for any positive definite H; and the polar factor
    moves by at most ‖E'‖_F / σ along a path on which the smallest singular value is ≥ σ (its derivative has entries
    (E_ij − E_ji)/(σ_i + σ_j), i ≠ j, in range and E_ij/σ_j out of it; Higham, Functions of Matrices, §8.1).
    """
    a, n = pair(x), x.shape[-1]
    h = symmetric(times(transpose(q), a))
    gap, gap_error = minus(a, times(q, h))
    f, f_error = minus(times(transpose(q), q), eye_like(q.hi))
    size = norm(f) + f_error
    slack = (1 - size).clamp_min(2.0**-30) ** -1.5
    turned = (norm(f @ h.hi) + (f_error + gamma(n + 2) * norm(f)) * norm(h.hi)) * slack * (1 + size) / 2
    distance = norm(gap) + gap_error + turned
    # H is positive definite if S^(-1/2) Vᵀ H V S^(-1/2) is near I, and then its eigenvalues are near S in ratio.
    turned_h = times(times(pair(v.mT), h), pair(v))
    off, off_error = minus(turned_h, pair(torch.diag_embed(s)))
    fade = torch.where(s > 0, s, 0.0).rsqrt()
    near = norm(off * fade[:, :, None] * fade[:, None, :]) + off_error * (fade**2).amax(-1) if n else norm(off)
    skew, skew_error = minus(times(pair(v.mT), pair(v)), eye_like(v))
    shrink = (1 - near) / (1 + norm(skew) + skew_error)
    lowest = shrink * s[:, -1] if n else distance + 1
    proven = (near < 1) & (lowest > distance) & (size < 0.5)
    if x.shape[-2] == n:
        # In range only pairs count, and the smallest sum is σ_n + σ_(n−1); a 1×1 has none.
        second = s[:, -2] if n > 1 else torch.full_like(distance, math.inf)
        lowest = (lowest + shrink * second) / 2
    error = distance / (lowest - distance) + size * slack / 2 + norm(q.lo)
    error = torch.where(proven, error * (1 + 2.0**-20), math.inf)
    if not x[0:1].numel():
        error = torch.zeros_like(error)
    reason = torch.where(error.isfinite(), cert.NONE, cert.INACCURATE)
    return Answer(q.hi, error, norm(gap) / norm(x).clamp_min(2.0**-1000), reason, steps)


@torch.no_grad()
def polar_ex(
    a: Float[Tensor, "*b m n"],
    *,
    method: str = "auto",
    rtol: float | None = None,
    steps: int = len(COEFFICIENTS),
    certify: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "*b m n"], Certificate]:
    """`polar` with its certificate, never raising for a matrix's values.

    `steps`, `certify` and `dtype` concern `method="newton_schulz"`: the number of steps, whether to spend one product
    on ‖XᵀX − I‖_F (if not, nothing is converged and the bound is inf), and the dtype of the products.

    >>> q, certificate = polar_ex(torch.zeros(2, 3, 2), method="newton_schulz")
    >>> certificate.converged.tolist(), q.abs().max().item()
    ([False, False], 0.0)
    """
    check("polar", a)
    choose("polar", method, POLAR)
    if steps < 1:
        raise InputError(f"polar: expected steps ≥ 1, got {steps}. Leave it out for {len(COEFFICIENTS)}.")
    tolerance = default_rtol(rtol, a.dtype)
    if method == "newton_schulz":
        return _newton_schulz_ex(a, tolerance, steps, certify, dtype)
    wide = a.shape[-2] < a.shape[-1]
    tall = a.mT if wide else a
    names = [method]
    if method == "auto":
        names = ["svd_refined"] if a.dtype == torch.float64 else ["svd", "svd_refined"]
        if tall.shape[-2] >= 2 * tall.shape[-1] and a.dtype != torch.float64:
            names = ["gram_eigh", *names]
    value, certificate = climb(load(tall), POLAR, names, tolerance, torch.zeros_like)
    return (value.mT if wide else value), certificate


def _newton_schulz_ex(
    a: Tensor, rtol: float, steps: int, certify: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Certificate]:
    """The products-only route: nothing here waits for the device."""
    x = newton_schulz(a, steps=steps, dtype=dtype)
    batch, k = a.shape[:-2], min(a.shape[-2:])
    code = torch.zeros(batch, dtype=torch.long, device=a.device)
    if certify:
        residual = defect(x).to(torch.float64)
        # |σ − 1| ≤ |σ² − 1|; a rounding in a small singular direction grows with it, by at most the product of the a's.
        unit = torch.finfo(dtype or (x.dtype if x.dtype == torch.float64 else torch.float32)).eps / 2
        growth = math.prod(COEFFICIENTS[min(i, len(COEFFICIENTS) - 1)][0] for i in range(steps))
        bound = (residual + growth * unit * math.sqrt(k)) / math.sqrt(max(k, 1))
        bound = bound.nan_to_num(nan=math.inf)
    else:
        residual = torch.full(batch, math.nan, dtype=torch.float64, device=a.device)
        bound = torch.full_like(residual, math.inf)
    converged = bound <= rtol
    certificate = Certificate(
        converged=converged,
        residual=residual,
        error_bound=bound,
        kind=torch.ones_like(code),
        failure_probability=torch.full_like(bound, math.nan),
        steps=torch.full_like(code, steps),
        method=torch.full_like(code, list(POLAR).index("newton_schulz")),
        reason=torch.where(converged, cert.NONE, torch.where(residual.isfinite(), cert.INACCURATE, cert.NOT_FINITE))
        if certify
        else torch.full_like(code, cert.INACCURATE),
        methods=tuple(POLAR),
    )
    return x, certificate


def polar(
    a: Float[Tensor, "*b m n"],
    *,
    method: str = "auto",
    rtol: float | None = None,
    steps: int = len(COEFFICIENTS),
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*b m n"]:
    """The nearest matrix with orthonormal columns (or rows): the polar factor U Vᵀ of A = U Σ Vᵀ.

    polar(A) = A (AᵀA)^(-1/2), the maximiser of tr(QᵀA) over orthonormal Q.

    Arguments: `a` (..., m, n); `method`, one of `POLAR` or "auto"; `rtol`, the relative Frobenius error asked for
    (`certificate.RTOL` of the dtype if None); `steps` and `dtype`, see `polar_ex`.
    Raises: `ShapeError`, `DtypeError`; `ConvergenceError` where a matrix is rank-deficient or the error bound is above
    rtol (`polar_ex` then has the partial isometry on the range).
    Cost: one SVD in float64 (about 50 products), or for m ≥ 2n and κ ≤ 1e6 one eigendecomposition of the Gram matrix;
    "newton_schulz" 3 products of the smaller side a step. Accuracy: one rounding of the dtype, until κ nears 1e13.
    Source: Higham, Functions of Matrices (2008), chapter 8; "newton_schulz": arXiv:2505.16932, algorithm 1.

    >>> polar(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
    tensor([[1., 0.],
            [0., 1.]])
    """
    value, certificate = polar_ex(a, method=method, rtol=rtol, steps=steps, dtype=dtype)
    require_converged("polar", certificate)
    return value
