"""The square root of symmetric positive semi-definite matrices, with certificates."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from jaxtyping import Inexact
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg import derivatives
from gramian.linalg.certificate import Certificate, require_converged
from gramian.linalg.engine.backward_error import Rows, backward_error, tightened
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.double_double import (
    Pair,
    Product,
    damped,
    eye_like,
    minus,
    pair,
    plus,
    product,
    rough,
    symmetric,
    thin_rough,
)
from gramian.linalg.engine.eigenvalue_ratio import hopeless
from gramian.linalg.engine.escalation import Answer, Method
from gramian.linalg.engine.function import MatrixFunction, evaluate, register
from gramian.linalg.engine.loading import Damping
from gramian.linalg.engine.probes import EXACT, Probes, apply, apply_transposed, closer, of_norm, probes
from gramian.linalg.engine.real_form import takes_complex
from gramian.linalg.engine.rounding import LOOSE, chain_rounding, gamma, norm
from gramian.linalg.engine.spectrum import Spectrum
from gramian.linalg.engine.symmetric_eigen import decompose
from gramian.linalg.engine.workspace import scratch
from gramian.linalg.inverse_root_bound import of_roots, off_product, wide
from gramian.linalg.principal_root import principal_root_ex

__all__ = ["sqrtm", "sqrtm_ex"]

EIGH32_ERROR = 6e-7
"""What a float32 eigendecomposition loses, as relative error over √κ at least; observed."""


def _by_residual(x: Tensor, shift: Tensor, dtype: torch.dtype, times: Product, steps: int, certify: bool) -> Answer:
    """V w^(1/2) Vᵀ, then `steps` corrections E_ij / (s_i + s_j) from E = M − X², and a bound column by column.

    With D = √M − X, √M D + D X = E, so for an eigenvector X v = s v: ‖D v‖ ≤ ‖E v‖ / s, while ‖D‖₂ ≤ √‖E‖₂ covers the
    directions with s near zero (Bhatia, Matrix Analysis, theorem X.1.1). What is negative in M counts as zero: its
    size ν enters where the eigenvalue is not certain to be positive.
    """
    m = damped(x, shift)
    w, v, _, reason = decompose(m, dtype)
    s = w.clamp_min(0).sqrt()
    value = pair(symmetric(pair((v * s[:, None, :]) @ v.mT)).hi)
    sums = s[:, :, None] + s[:, None, :]
    for _ in range(steps):
        e, _ = minus(m, times(value, value))
        # To first order, which is none where the correction is larger than half of what it corrects: in the null space.
        core = v.mT @ e @ v
        small = core.abs() <= sums.square() / 2
        d = v @ (core / torch.where(small & (sums > 0), sums, torch.inf)) @ v.mT
        value = plus(value, (d + d.mT) / 2)
    if not certify:
        return Answer.bare(value.hi, reason, steps, None if steps else Spectrum(s, v))
    e, e_error = minus(m, times(value, value))
    vectors, diagonal = pair(v), pair(torch.diag_embed(w))
    # How far V w Vᵀ is from M, and V w₊ Vᵀ from X²; M₊ is at most as far from (V w Vᵀ)₊ as M from V w Vᵀ.
    whole, whole_error = minus(m, times(times(vectors, diagonal), pair(v.mT)))
    clipped = times(times(vectors, pair(diagonal.hi.clamp_min(0))), pair(v.mT))
    kept, kept_error = minus(clipped, times(value, value))
    f, f_error = minus(times(pair(v.mT), vectors), eye_like(v))
    skew = 2.1 * (norm(f * w[:, None, :]) + f_error * norm(w))
    apart = norm(whole) + whole_error + skew
    total = apart + norm(kept) + kept_error
    lowest = w.amin(-1) if w.shape[-1] else apart
    total = torch.where(lowest > apart, total.minimum(norm(e) + e_error), total)
    wide = total.sqrt()[:, None]
    negative = torch.where(lowest > apart, 0.0, (-lowest).clamp_min(0) + apart)[:, None]
    # Column by column, where s is not small.
    miss, miss_error = minus(times(m, vectors), times(vectors, diagonal))
    drift, drift_error = minus(times(value, vectors), times(vectors, pair(torch.diag_embed(s))))
    share = ((miss.norm(dim=1) + miss_error[:, None]) / w).clamp(0, 1)
    share = torch.where(w > 0, share, 1.0)
    columns = (e @ v).norm(dim=1) + (e_error + gamma(x.shape[-1]) * norm(e))[:, None] + negative * share
    columns = (columns + wide * (drift.norm(dim=1) + drift_error[:, None])) / s
    columns = torch.where(s > 0, columns, math.inf).minimum(wide)
    error = columns.norm(dim=-1) * (1 + norm(f) + f_error) + norm(value.lo)
    residual = norm(e) / norm(m.hi).clamp_min(2.0**-1000)
    # Corrections make the value more accurate than its eigenvalues.
    return Answer(value.hi, error, residual, reason, steps, spectrum=None if steps else Spectrum(s, v))


def _by_probes(x: Tensor, shift: Tensor, dtype: torch.dtype, work: torch.dtype, certify: bool, rtol: float) -> Answer:
    """V w₊^(1/2) Vᵀ, with a bound on the difference of two roots from one on the difference of their squares.

    Positive parts are no farther apart than the matrices: e bounds ‖M₊ − X²‖_F if ‖M − V w Vᵀ‖_F and ‖VᵀV − I‖_F do.
    Then ‖√M₊ − X‖_F ≤ (√n e)^(1/2) (Powers–Størmer; Bhatia, Matrix Analysis, theorem X.1.3), and ≤ e / (2√λ) where
    both are above λ > 0.

    Where M is positive definite there is a bound that κ hardly enters. With E = M − X², q = ‖X⁻¹E‖_F and
    s = q‖X⁻¹‖₂ ≥ ‖X⁻¹EX⁻¹‖, s < 1, on the way Y(t) = (X² + tE)^(1/2) from X to √M: Y'(0) has entries Eᵢⱼ / (xᵢ + xⱼ),
    so that ‖Y'(0)‖_F ≤ q/2; and by the integral of μ^(-1/2) λ / (λ + μ), 0 ≤ −Y'' ≤ (s/(1 − s))² Y and
    Y ≤ (1 + s)^(1/2) X. X⁻¹ is V w^(-1/2) Vᵀ but for a factor that ‖VᵀV − I‖ bounds.
    """
    n = x.shape[-1]
    m = damped(x, shift)
    w, v, _, reason = decompose(m._replace(hi=m.hi.to(work)), dtype)
    w = w.double()
    s = w.clamp_min(0).sqrt()
    value = of_roots(s, v, wide(dtype))
    if not certify:
        if work == torch.float32:
            reason = torch.where(reason == cert.NONE, cert.NONE, cert.INACCURATE)
        return Answer.bare(value, reason, spectrum=Spectrum(s, v))
    if not value[0:1].numel():
        zero = torch.zeros_like(shift)
        return Answer(value, zero, zero, reason)
    p = probes(n, x.device)
    if n > EXACT and work == torch.float32 and math.isfinite(rtol):
        error, residual = _of_value(m, value, s, v, p)
        if bool(((error <= 0.9 * rtol * norm(value)) & (reason == cert.NONE)).all()):
            return Answer(value, error, residual, reason, failure=10 * p.failure, spectrum=Spectrum(s, v))
    omega = p.omega.expand(x.shape[0], -1, -1)
    vectors = scratch("vectors", tuple(v.mT.shape), torch.float64, v).copy_(v.mT).mT
    length, largest = norm(omega), w.abs().amax(-1)
    across = apply_transposed(vectors, omega)
    slip = 3 * chain_rounding(n + 3, math.sqrt(n), length)
    phi = of_norm(apply_transposed(vectors, apply(vectors, omega)) - omega, p, slip)
    image = thin_rough(m, norm(m.hi), omega)
    miss = closer(image.hi - apply(vectors, w[:, :, None] * across), p, image.error + slip * largest + norm(m.lo))
    once = apply(vectors, s[:, :, None] * across)
    apart = closer(apply(value, omega) - once, p, slip * (largest.sqrt() + norm(value)))
    # (V w Vᵀ)₊ and X² are V w₊ Vᵀ up to the defect of V.
    e = miss + 4 * phi * largest
    lowest = (w[:, 0] * (1 - 2 * phi) - e).clamp_min(0)
    error = torch.minimum((math.sqrt(n) * e).sqrt(), e / (2 * lowest.sqrt()))
    error = torch.minimum(error, _of_definite(vectors, s, image, once, slip * largest, phi, norm(value), p)) + apart
    usable = (phi < 0.1) & error.isfinite()
    if work == torch.float32:
        # float32 cannot tell indefiniteness from rounding as finely as promised: float64 decides.
        reason = torch.where(reason == cert.NONE, cert.NONE, cert.INACCURATE)
    reason = torch.where(usable, reason, cert.INACCURATE)
    error = torch.where(usable, error, math.inf)
    residual = miss / norm(m.hi).clamp_min(2.0**-1000)
    return Answer(value, error, residual, reason, failure=10 * p.failure, spectrum=Spectrum(s, v))


def _of_value(m: Pair, value: Tensor, s: Tensor, v: Tensor, p: Probes) -> tuple[Tensor, Tensor]:
    """The bound of `_by_probes` for positive definite M, for X = `value` itself, and ‖M − X²‖_F / ‖M‖_F; inf if none.

    X = V diag(s) Vᵀ + G with ‖G‖₂ ≤ off, and LAPACK's bound on φ = ‖VᵀV − I‖₂.
    """
    n = v.shape[-1]
    whole = scratch("whole", tuple(value.shape), torch.float64, value).copy_(value)  # once for both products
    off, phi, low, top = off_product(whole, v, s), backward_error(n, v.dtype), s[:, 0], s[:, -1]
    size, omega = norm(value) * (1 + LOOSE), p.omega.expand(len(v), -1, -1)
    once = apply(whole, omega)
    image = thin_rough(m, norm(m.hi), omega)
    gap = image.hi - apply(whole, once)
    blur = image.error + norm(m.lo) * norm(p.omega[None]) + chain_rounding(2 * n + 2, size, size, norm(p.omega[None]))
    inside = apply_transposed(v, gap) / torch.where(s > 0, s, 1.0)[:, :, None]
    blur = 1.1 * (blur + chain_rounding(n, math.sqrt(n), norm(gap)))
    turned, lost = phi * top / low, off / (0.9 * low)
    q = closer(inside, p, blur / low) * (1 + phi) / ((1 - turned) * (1 - lost))
    error, fine = _of_quotient(q, 0.9 * low - off, size)
    good = fine & (low > 0) & (phi < 0.1) & (turned < 0.5) & (lost < 0.5)
    residual = of_norm(gap, p, blur) / norm(m.hi).clamp_min(2.0**-1000)
    return torch.where(good, error, math.inf), residual


def _of_quotient(q: Tensor, low: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """‖√M − X‖_F from q ≥ ‖X⁻¹(M − X²)‖_F, low ≤ λ_min(X) and ‖X‖_F ≤ size, and where it holds."""
    share = q / low
    found = q / 2 + (share / (1 - share)) ** 2 * (1 + share).sqrt() * size / 2
    return found, (share < 0.5) & found.isfinite()


def _of_definite(
    v: Tensor, s: Tensor, image: Pair, once: Tensor, blur: Tensor, phi: Tensor, size: Tensor, p: Probes
) -> Tensor:
    """The bound of `_by_probes` for positive definite M, from MΩ and XΩ; inf where it is none."""
    low = s[:, 0] * (1 - phi)
    gap = image.hi - apply(v, s[:, :, None] * apply_transposed(v, once))
    inside = apply_transposed(v, gap) / torch.where(s > 0, s, 1.0)[:, :, None]
    turned = phi * (1 + 1.1 * s[:, -1] / low)
    q = closer(inside, p, 1.1 * (image.error + 3 * blur) / low) * (1 + phi) / (1 - turned)
    found, good = _of_quotient(q, low, size * (1 + LOOSE))
    return torch.where(good & (low > 0) & (turned < 0.5), found, math.inf)


def _eigh32(x: Tensor, *, shift: Tensor, dtype: torch.dtype, rtol: float, certify: bool = True) -> Answer | None:
    """By an eigendecomposition in float32, bounded by probes."""
    if math.isfinite(rtol) and hopeless(damped(x, shift).hi.float(), rtol, EIGH32_ERROR, power=0.5):
        return None
    return _by_probes(x, shift, dtype, torch.float32, certify, rtol)


def _eigh64(x: Tensor, *, shift: Tensor, dtype: torch.dtype, rtol: float, certify: bool = True) -> Answer | None:
    """By an eigendecomposition in float64, bounded by probes: 1e-7 at worst, as a root turns ε into √ε."""
    if x.shape[-1] <= EXACT and math.isfinite(rtol):
        return None  # a finer bound costs less
    return _by_probes(x, shift, dtype, torch.float64, certify, rtol)


def _eigh(x: Tensor, *, shift: Tensor, dtype: torch.dtype, rtol: float, certify: bool = True) -> Answer:
    """By an eigendecomposition, bounded from a residual in plain float64.

    Up to `EXACT` the bound is LAPACK's own where that is a few roundings of `dtype`, else from the next correction.
    """
    if not certify or x.shape[-1] > EXACT or not x[0:1].numel():
        return _by_residual(x, shift, dtype, rough, 0, certify)
    m = damped(x, shift)
    w, v, _, reason = decompose(m, dtype)
    s = w.clamp_min(0).sqrt()
    value = symmetric(pair((v * s[:, None, :]) @ v.mT)).hi

    def finer(rows: Rows) -> tuple[Tensor, Tensor]:
        further = _by_residual(x[rows], shift[rows], dtype, product, 1, certify)
        own = norm(value[rows] - further.value) + further.error
        if not bool(own.isfinite().all()):
            own = torch.fmin(own, _by_residual(x[rows], shift[rows], dtype, rough, 0, certify).error)
        return own, further.residual

    error, residual = tightened(lambda: _by_backward_error(m, w, s), finer, norm(value), dtype)
    return Answer(value, error, residual, reason, spectrum=Spectrum(s, v))


def _by_backward_error(m: Pair, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """A bound on ‖V w₊^(1/2) Vᵀ − √M₊‖_F from LAPACK's own on how far M is from V₀ w V₀ᵀ, as `_by_probes` from e.

    And that bound, relative to ‖M‖₂.
    """
    n = w.shape[-1]
    known = backward_error(n)
    e = math.sqrt(n) * known * w.abs().amax(-1) + norm(m.lo)
    lowest = (w[:, 0] - e).clamp_min(0)
    error = torch.minimum((math.sqrt(n) * e).sqrt(), e / (2 * lowest.sqrt()))
    error = error + 2.2 * known * s.norm(dim=-1) + 1.1 * gamma(n + 4) * s.sum(-1)
    return error, torch.full_like(error, known)


def _eigh_refined(x: Tensor, *, shift: Tensor, dtype: torch.dtype, rtol: float, certify: bool = True) -> Answer:
    """The same with a first-order correction from a double-double residual."""
    return _by_residual(x, shift, dtype, product, 1, certify)


def _plain(m: Tensor) -> Tensor:
    w, v = torch.linalg.eigh(m)
    return (v * w.clamp_min(0)[..., None, :].sqrt()) @ v.mT


SQRTM = register(
    MatrixFunction(
        "sqrtm",
        {
            "eigh32": Method(
                _eigh32,
                torch.float64,
                1e-5,
                lambda m, n: {"eigh32": 1, "cholesky32": 2, "float32": 0.8, "thin64": 5},
                "well-conditioned matrices",
                narrow=True,
                spectral=True,
            ),
            "eigh64": Method(
                _eigh64,
                torch.float64,
                1e-8,
                lambda m, n: {"eigh64": 1, "float32": 0.8, "thin64": 9},
                "singular matrices too",
                spectral=True,
            ),
            "eigh": Method(
                _eigh,
                torch.float64,
                1e-13,
                lambda m, n: {"eigh64": 1, "float64": 11},
                "a finer bound",
                spectral=True,
            ),
            "eigh_refined": Method(
                _eigh_refined,
                torch.float64,
                0.0,
                lambda m, n: {"eigh64": 1, "float64": 40},
                "refined with double-double residuals",
            ),
        },
        "semidefinite",
        Fraction(1, 2),
        plain=_plain,
        exact=lambda mp, w: mp.sqrt(w),
        damped=True,
    )
)


@takes_complex("sqrtm", square=True)
@differentiable(
    derivatives.SQUARE_ROOT,
    shapes=lambda m, **_: torch.empty_like(m),
    methods=SQRTM.methods,
    spectral=True,
    m=2,
    damping=0,
)
def _sqrtm_ex(
    m: Tensor, damping: Damping = 0.0, *, method: str = "auto", rtol: float | None = None, certify: bool = True
) -> tuple[Tensor, Certificate]:
    """`sqrtm_ex` of symmetric matrices."""
    return evaluate(SQRTM, m, method=method, rtol=rtol, certify=certify, damping=damping)


def sqrtm_ex(
    m: Inexact[Tensor, "*b n n"],
    damping: Damping = 0.0,
    *,
    symmetric: bool = True,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
) -> tuple[Inexact[Tensor, "*b n n"], Certificate]:
    """`sqrtm` with its certificate, never raising for a matrix's values; the root of the positive part if indefinite.

    Args:
        m, damping, symmetric, method, rtol, certify: as for `sqrtm`.
    Returns: the square root and its `Certificate`.
    Raises: ShapeError, DtypeError, InputError: for wrong arguments.
    Cost: as for `sqrtm`.
    Source: as for `sqrtm`.

    >>> value, certificate = sqrtm_ex(torch.diag(torch.tensor([4.0, -1.0])))
    >>> value.diagonal().tolist(), certificate.converged.item()
    ([2.0, 0.0], False)
    """
    function = _sqrtm_ex if symmetric else principal_root_ex
    return function(m, damping, method=method, rtol=rtol, certify=certify)


def sqrtm(
    m: Inexact[Tensor, "*b n n"],
    damping: Damping = 0.0,
    *,
    symmetric: bool = True,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
) -> Inexact[Tensor, "*b n n"]:
    """The square root of a symmetric positive semi-definite matrix, or the principal one of a square matrix.

    sqrtm(M, λ) = (M + λI)^(1/2), symmetric positive semi-definite; if not `symmetric`, with eigenvalues in the right
    half-plane.

    Eigenvalues between −10·n·ε(dtype)·‖M‖ and 0 count as zero.

    Args:
        m: `(..., n, n)`, symmetric up to 10·n·ε(dtype); if not `symmetric`, without eigenvalues at zero or on the
            negative real axis.
        damping: λ ≥ 0, absolute, one number or one per matrix.
        symmetric: whether M is, and what is not is refused. If False, M may be any matrix with a principal root.
        method: the name of a method (see docs/linalg.md), or "auto".
        rtol: the relative Frobenius error asked for; `certificate.RTOL` of the dtype if None.
        certify: whether to bound the error; if False, the value of the same route, and only seen failures raise.
    Returns: `(..., n, n)`, the square root, in the dtype of `m`.
    Raises:
        ShapeError: where `m` is not square, or `damping` does not fit it.
        DtypeError: where `m` is not floating point, real or complex.
        InputError: for an unknown method, or a negative damping or rtol.
        ConvergenceError: where M + λI is not symmetric, has a negative eigenvalue beyond rounding, or no principal root
            if not `symmetric`, or where the error bound is above rtol.
    Cost: in float32 products at 1024²: an eigendecomposition, 7 in float32 or 13 in float64, and about 3; with the
    finer bound of "eigh" 25 more. Accuracy: what `rtol` asks for; 1e-7 where M is singular, as a root turns ε into √ε.
    If not `symmetric`, an eigendecomposition and some 20 products in float64, or, far from normal, 20 inverses and 80
    products more, by "denman_beavers", and one rounding of the dtype while the root's condition number, which is κ(M)^½
    or more for matrices far from normal, is below 1e8 or so.
    The certificate's residual is ‖M − V w Vᵀ‖_F / ‖M‖_F, or ‖MW − WD‖_F / (‖M‖_F ‖W‖_F) by "eigenvectors", or
    ‖M − X²‖_F / ‖M‖_F by "eigh", "eigh_refined" and "denman_beavers".
    Source: Higham, Functions of Matrices (2008), chapter 6; Bhatia, Matrix Analysis (1997), theorem X.1.1; Cheng,
    Higham, Kenney, Laub, SIAM J. Matrix Anal. Appl. 22 (2001).

    >>> sqrtm(torch.diag(torch.tensor([4.0, 9.0])))
    tensor([[2., 0.],
            [0., 3.]])
    """
    value, certificate = sqrtm_ex(m, damping, symmetric=symmetric, method=method, rtol=rtol, certify=certify)
    require_converged("sqrtm", certificate)
    return value
