"""The inverse p-th root of symmetric positive definite matrices, certified with products by a few random vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from jaxtyping import Inexact
from torch import Tensor

from gramian.errors import InputError
from gramian.linalg import certificate as cert
from gramian.linalg import derivatives
from gramian.linalg.certificate import Certificate, require_converged
from gramian.linalg.engine import lapack
from gramian.linalg.engine.derivative import differentiable
from gramian.linalg.engine.double_double import (
    Pair,
    damped,
    eye_like,
    minus,
    pair,
    plus,
    power,
    product,
    symmetric,
    thin_product,
    thin_rough,
)
from gramian.linalg.engine.eigenvalue_ratio import hopeless
from gramian.linalg.engine.escalation import Answer, Method
from gramian.linalg.engine.function import MatrixFunction, evaluate, register
from gramian.linalg.engine.loading import Damping
from gramian.linalg.engine.probes import Probes, apply, apply_transposed, closer, of_norm, probes
from gramian.linalg.engine.real_form import takes_complex
from gramian.linalg.engine.rounding import LOOSE, U, chain_rounding, gamma, norm, unit_roundoff
from gramian.linalg.engine.spectrum import Spectrum
from gramian.linalg.engine.symmetric_eigen import decompose
from gramian.linalg.engine.symmetric_products import symmetric_product
from gramian.linalg.principal_inverse_root import principal_inverse_root_ex

__all__ = ["inv_root", "inv_root_ex"]

EIGH32_ERROR = 4 * 2.0**-24
"""What a float32 eigendecomposition loses, as relative error times p over κ at least; observed."""

STEPS = 60
"""Most steps of the coupled iteration: at first each gains (1 + 1/p) on κ^(1/p), in the end each doubles the digits."""

REFINEMENTS = 2
"""Corrections of `_eigh_refined`."""


def _eigh32(
    x: Tensor, *, shift: Tensor, p: int, dtype: torch.dtype, rtol: float, certify: bool = True
) -> Answer | None:
    """V w^(-1/p) Vᵀ by an eigendecomposition in float32; error εκ/p."""
    narrow = x.float()
    narrow.diagonal(dim1=-2, dim2=-1).add_(shift.float()[:, None])
    if hopeless(narrow, rtol * p, EIGH32_ERROR):
        return None
    w, v, ok = lapack.eigh(narrow)
    if not certify:
        reason = torch.where(ok & (w > 0).all(-1), cert.NONE, cert.INACCURATE)
        root = _root(w.double(), p)
        return Answer.bare(_of_roots(root, v, v.dtype), reason, spectrum=Spectrum(root, v))
    value, error, residual = _from_eigenpairs(damped(x, shift), w.double(), v, p, v.dtype)
    proven = ok & error.isfinite() & (w > 0).all(-1)
    reason = torch.where(proven, cert.NONE, cert.INACCURATE)
    error = torch.where(proven, error, math.inf)
    spectrum = Spectrum(_root(w.double(), p), v)
    return Answer(value, error, residual, reason, failure=6 * probes(x.shape[-1], x.device).failure, spectrum=spectrum)


def _eigh64(x: Tensor, *, shift: Tensor, p: int, dtype: torch.dtype, rtol: float, certify: bool = True) -> Answer:
    """The same in float64, with V w^(-1/p) Vᵀ multiplied in float32 unless M is float64; error uκ/p and one rounding.

    Where a positive definite M is not proven the value is the root of the inverse on the range.
    """
    m = damped(x, shift)
    w, v, floor, reason = decompose(m, dtype)
    kept = w > floor
    if not certify:
        reason = torch.where((reason == cert.NONE) & ~kept.all(-1), cert.SINGULAR, reason)
        root = torch.where(kept, _root(w, p), 0.0)
        return Answer.bare(_of_roots(root, v, _wide(dtype)), reason, spectrum=Spectrum(_root(w, p), v))
    value, error, residual = _from_eigenpairs(m, w, v, p, _wide(dtype))
    proven = error.isfinite() & (w > 0).all(-1)
    error = torch.where(proven, error, math.inf)
    unproven = torch.where(kept.all(-1), cert.INACCURATE, cert.SINGULAR)
    reason = torch.where((reason == cert.NONE) & ~proven, unproven, reason)
    if not bool(proven.all()):
        root = torch.where(kept, w, torch.inf) ** (-1 / p)
        on_range = ((v * root[:, None, :]) @ v.mT).to(value.dtype)
        value = torch.where(proven[:, None, None], value, on_range)
    spectrum = Spectrum(_root(w, p), v)
    return Answer(value, error, residual, reason, failure=6 * probes(x.shape[-1], x.device).failure, spectrum=spectrum)


def _coupled_newton(
    x: Tensor, *, shift: Tensor, p: int, dtype: torch.dtype, rtol: float, certify: bool = True
) -> Answer:
    """X ← XT, M ← TᵖM with T = ((p + 1)I − M)/p, products only, in float32 (float64 for a float64 M). Iannazzo 2006.

    For devices on which an eigendecomposition is slow. Positive definiteness comes from a Cholesky factor of X.
    """
    n = x.shape[-1]
    m = damped(x, shift)
    work = _wide(dtype)
    eye = torch.eye(n, dtype=work, device=x.device)
    start = (1 + p) / (2 * norm(m.hi).clamp_min(2.0**-500))
    y = (m.hi * start[:, None, None]).to(work)
    z = eye * (start ** (1 / p)).to(work)[:, None, None]
    least = torch.full_like(start, math.inf)
    best, steps = z, 0
    for step in range(STEPS if x.numel() else 0):
        t = (eye * (p + 1) - y) / p
        y, z = power(t, p, torch.matmul) @ y, z @ t
        gap = norm(y - eye)
        # Rounding makes the iteration diverge again once it has reached its limiting accuracy: keep the best.
        better = gap < least
        best, least = torch.where(better[:, None, None], z, best), torch.where(better, gap, least)
        steps = step + 1
        if step % 4 == 3 and not bool((better & (gap > 1e-3 * unit_roundoff(work))).any()):
            break
    value = (best + best.mT) / 2
    if not certify:
        failed = ~(least < 0.5) & bool(n)
        return Answer.bare(value, torch.where(failed, cert.INACCURATE, cert.NONE), steps)
    lower, info = lapack.cholesky(value)
    lower = torch.where((info != 0)[:, None, None], eye, lower).double()
    top = norm(lower) ** 2

    def times(z: Tensor) -> Tensor:
        return lower @ (lower.mT @ z)

    error, residual = _root_bound(m, value, times, top, norm(lower), p, probes(n, x.device), _fine)
    proven = (info == 0) & error.isfinite()
    reason = torch.where(proven, cert.NONE, cert.INACCURATE)
    error = torch.where(proven, error, math.inf)
    return Answer(value, error, residual, reason, steps, failure=6 * probes(n, x.device).failure)


def _root(w: Tensor, p: int) -> Tensor:
    """w^(-1/p), zero where w is not positive."""
    return torch.where(w > 0, w, torch.inf) ** (-1 / p)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for the others."""
    return torch.promote_types(dtype, torch.float32)


def _of_roots(root: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """V diag(root) Vᵀ in `dtype`, exactly symmetric."""
    left = v.to(dtype) * root.sqrt().to(dtype)[:, None, :]
    return symmetric_product(left, left.mT)


def _from_eigenpairs(m: Pair, w: Tensor, v: Tensor, p: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """V w^(-1/p) Vᵀ in `dtype`, its bound and its residual."""
    n = w.shape[-1]
    root = _root(w, p)
    value = _of_roots(root, v, dtype)
    if v.dtype == torch.float64 and n:
        return value, *_eigen_bound(m, value, root, v, p, probes(n, v.device))

    vectors = v.double()  # once for all products

    def times(z: Tensor) -> Tensor:
        return apply(vectors, root[:, :, None] * apply_transposed(vectors, z))

    # ‖V‖₂² ≤ 1.1: LAPACK's vectors are orthonormal to far better than that, in any dtype.
    top = root.amax(-1) * 1.1 if n else root.new_zeros(root.shape[0])
    row = torch.full_like(top, math.sqrt(n)) * top.sqrt()
    error, residual = _root_bound(m, value, times, top, row, p, probes(n, v.device), _rough)
    return value, error, residual


def _eigen_bound(m: Pair, value: Tensor, root: Tensor, v: Tensor, p: int, probe: Probes) -> tuple[Tensor, Tensor]:
    """As `_root_bound` for X = V₀ diag(root) V₀ᵀ, V₀ = V(VᵀV)^(-1/2), in the basis of V, which is cheaper.

    V₀ᵀ(XᵇMXᵃ − I)V₀ = DᵇV₀ᵀMV₀Dᵃ − I, D = diag(root). V₀ differs from V by less than φ = ‖VᵀV − I‖₂, for which
    LAPACK's bound is taken (Users' Guide, §4.7, with p(n) = 10n), and that moves the product by √κ φ on either side.
    """
    n = v.shape[-1]
    omega = probe.omega.expand(v.shape[0], -1, -1)
    length, root_n, phi = norm(omega), math.sqrt(n), 10 * n * 2 * U
    top, low, size = root.amax(-1), root.amin(-1), norm(m.hi)
    slip = gamma(n + 3) * root_n
    once = apply(v, root[:, :, None] * apply_transposed(v, omega))
    own = norm(root)
    blur = 2.1 * slip * top * length + chain_rounding(n, norm(value), length)
    apart = closer(apply(value, omega) - once, probe, blur) + 2.2 * phi * own
    b = p // 2
    a = p - b
    inner = root[:, :, None] ** a * omega
    right = apply(v, inner)
    image = thin_product(m, size, right)
    back = apply_transposed(v, image.hi + image.lo)
    back_error = image.error * 1.1 + 2 * slip * norm(image.hi)
    # DᵇVᵀM = (I + R)D⁻ᵃVᵀ: an error made before M is magnified by at most that.
    left_error = top**b * back_error + 2.2 * low**-a * slip * norm(inner) + 8 * U * length
    turned = 5 * root_n * phi * ((top / low) ** a + (top / low) ** b)
    left = root[:, :, None] ** b * back - omega
    r = of_norm(left, probe, left_error) + turned
    first = closer(root[:, :, None] * left, probe, top * left_error) + top * turned
    return _from_norms(first, r, own, apart, p), r


def _root_bound(
    m: Pair,
    value: Tensor,
    times: Callable[[Tensor], Tensor],
    top: Tensor,
    row: Tensor,
    p: int,
    probe: Probes,
    times_m: Callable[[Pair, Tensor], Pair],
) -> tuple[Tensor, Tensor]:
    """A bound on ‖value − M^(-1/p)‖_F, for a `value` near the positive definite X that `times` applies; and r.

    With R = XᵇMXᵃ − I, a + b = p, a − b = 0 or 1, S = X^(p/2) M X^(p/2) − I is similar to R, and its eigenvalues are at
    most r = ‖R‖. On the way Y(t) = (X^(-p/2) (I + tS) X^(-p/2))^(-1/p) from X to M^(-1/p):

    - In the eigenbasis of X, Y'(0) has entries Sᵢⱼ (xᵢxⱼ)^(p/2) / Σₖ xᵢᵏ xⱼᵖ⁻¹⁻ᵏ, at most Sᵢⱼ √(xᵢxⱼ) / p by the
      inequality of the means, so that ‖Y'(0)‖_F ≤ ‖XR‖_F / p.
    - By the integral of μ^(-1/p) (λ + μ)⁻¹, 0 ≤ Y'' ≤ (2/p) (r/(1 − r))² Y, and Y ≤ (1 − r)^(-1/p) X.

    So ‖M^(-1/p) − X‖_F ≤ (‖XR‖_F + (r/(1 − r))² (1 − r)^(-1/p) ‖X‖_F) / p, into which no condition number enters; where
    it is less, ((1 − r)^(-1/p) − 1) ‖X‖_F, as λ^(-1/p) is operator monotone (Bhatia, Matrix Analysis, chapter V).
    `top` bounds ‖X‖₂, and one application errs by γ √top · `row`, where `row` bounds the Frobenius norm of either
    factor of X.
    """
    if not value[0:1].numel():
        zero = torch.zeros(value.shape[0], dtype=torch.float64, device=value.device)
        return zero, zero
    n = value.shape[-1]
    omega = probe.omega.expand(value.shape[0], -1, -1)
    slip = 2 * chain_rounding(n + 2, row, top.sqrt())

    def several(z: Tensor, error: Tensor, count: int) -> tuple[Tensor, Tensor]:
        for _ in range(count):
            z, error = times(z), top * error + slip * norm(z)
        return z, error

    zero = torch.zeros_like(top)
    once, once_error = several(omega, zero, 1)
    apart = closer(apply(value, omega) - once, probe, once_error + chain_rounding(n, norm(value), norm(omega)))
    b = p // 2
    a = p - b
    right, right_error = several(once, once_error, a - 1)
    image = times_m(m, right)
    left, left_error = several(image.hi + image.lo, image.error + U * norm(image.hi), b)
    # XᵇM = (I + R) X⁻ᵃ, and X⁻ᵖ ≤ M / (1 − r): an error made before M is magnified by at most that.
    left_error = left_error + right_error * 2 * (2 * norm(m.hi)) ** (a / p)
    r = of_norm(left - omega, probe, left_error)
    spread, spread_error = several(left - omega, left_error, 1)
    first = closer(spread, probe, spread_error)
    return _from_norms(first, r, norm(value) * (1 + LOOSE) + apart, apart, p), r


def _from_norms(first: Tensor, r: Tensor, size: Tensor, apart: Tensor, p: int) -> Tensor:
    """The bound of `_root_bound` from ‖XR‖_F, r, ‖X‖_F, and the distance of the value from X."""
    near = r.clamp_max(0.5)
    whole = torch.expm1(torch.log1p(-near) / -p)
    share = ((near / (1 - near)) ** 2 * (1 - near) ** (-1 / p)) / p
    error = torch.minimum(first / p + share * size, whole * size) + apart
    return torch.where((r < 0.5) & error.isfinite(), error, math.inf)


def _fine(m: Pair, z: Tensor) -> Pair:
    """M z in double-double arithmetic, for an exact m."""
    return thin_product(m, norm(m.hi), z)


def _rough(m: Pair, z: Tensor) -> Pair:
    """M z in plain float64."""
    return thin_rough(m, norm(m.hi), z)


def _eigh_refined(x: Tensor, *, shift: Tensor, p: int, dtype: torch.dtype, rtol: float, certify: bool = True) -> Answer:
    """V w^(-1/p) Vᵀ, then two first-order corrections from double-double residuals R = I − XᵖM; right to the last bits
    while uκ < 1.

    In the eigenbasis the correction is R_ij x_jᵖ / Σ_k x_iᵏ x_j^(p−1−k), the divided difference of λ^(-1/p) without its
    cancellation (Higham, Functions of Matrices, theorem 3.11). The bound is that of `_root_bound`.
    """
    m = damped(x, shift)
    w, v, floor, reason = decompose(m, dtype)
    root = _root(w, p)
    value = symmetric(pair((v * root[:, None, :]) @ v.mT))
    value = pair(value.hi)
    row, column = root[:, :, None], root[:, None, :]
    ratio = torch.where(row > 0, column / row, 0.0)
    # Divided by x_iᵖ⁻¹ throughout, so that no power overflows.
    weights = row * ratio**p / sum(ratio ** (p - 1 - k) for k in range(p))
    for _ in range(REFINEMENTS):
        r, _ = minus(eye_like(x), product(power(value, p, product), m))
        # Eigenvalues ascend: above the diagonal lie the large entries of R, below it their rounding.
        d = ((v.mT @ r @ v) * weights).triu()
        d = v @ (d + d.triu(1).mT) @ v.mT
        value = plus(value, (d + d.mT) / 2)
    kept = w > floor
    if not certify:
        lost = ~kept.all(-1)
        reason = torch.where((reason == cert.NONE) & lost, cert.SINGULAR, reason)
        on_range = (v * (root * kept)[:, None, :]) @ v.mT
        return Answer.bare(torch.where(lost[:, None, None], on_range, value.hi), reason, REFINEMENTS)
    r, r_error = minus(eye_like(x), product(power(value, p, product), m))
    size = norm(r) + r_error
    n = x.shape[-1]
    largest = root.amax(-1) if n else root.new_zeros(root.shape[0])
    smallest = root.amin(-1) if n else root.new_ones(root.shape[0])
    positive = smallest / 2 > 8 * gamma(n + 8) * math.sqrt(max(n, 1)) * largest
    proven = (size < 1) & positive & (w > 0).all(-1)
    relative = torch.expm1(torch.log1p(-size.clamp_max(0.999)) / -p)
    error = torch.where(proven, relative * (norm(value.hi) + norm(value.lo)) + norm(value.lo), math.inf)
    unproven = torch.where(kept.all(-1), cert.INACCURATE, cert.SINGULAR)
    reason = torch.where((reason == cert.NONE) & ~proven, unproven, reason)
    on_range = (v * (root * kept)[:, None, :]) @ v.mT
    return Answer(torch.where(proven[:, None, None], value.hi, on_range), error, norm(r), reason, REFINEMENTS)


def _plain(m: Tensor, p: int) -> Tensor:
    w, v = torch.linalg.eigh(m)
    return (v * w[..., None, :] ** (-1 / p)) @ v.mT


INV_ROOT = register(
    MatrixFunction(
        "inv_root",
        {
            "coupled_newton": Method(
                _coupled_newton,
                torch.float64,
                1e-4,
                lambda m, n: {"float32": 92, "thin64": 18},
                "products only, for devices where eigh is slow",
                narrow=True,
            ),
            "eigh32": Method(
                _eigh32,
                torch.float64,
                1e-5,
                lambda m, n: {"eigh32": 1, "cholesky32": 2, "float32": 0.8, "thin64": 10},
                "κ ≤ 1e3 at 1e-4, 1e4 at 1e-2",
                narrow=True,
                spectral=True,
            ),
            "eigh64": Method(
                _eigh64,
                torch.float64,
                1e-12,
                lambda m, n: {"eigh64": 1, "float32": 0.8, "thin64": 14},
                "κ ≤ 1e12",
                spectral=True,
            ),
            "eigh_refined": Method(
                _eigh_refined,
                torch.float64,
                0.0,
                lambda m, n: {"eigh64": 1, "float64": 40},
                "κ to 1e13",
            ),
        },
        "definite",
        lambda p: Fraction(-1, p),
        plain=_plain,
        exact=lambda mp, w, p: mp.power(w, -mp.mpf(1) / p),
        examples={"inv_root_2": lambda a: {"p": 2}, "inv_root_4": lambda a: {"p": 4}},
        damped=True,
    )
)


@takes_complex("inv_root", square=True)
@differentiable(
    derivatives.INVERSE_ROOT,
    shapes=lambda m, **_: torch.empty_like(m),
    methods=INV_ROOT.methods,
    spectral=True,
    m=2,
    damping=0,
)
def _inv_root_ex(
    m: Tensor, p: int, damping: Damping = 0.0, *, method: str = "auto", rtol: float | None = None, certify: bool = True
) -> tuple[Tensor, Certificate]:
    """`inv_root_ex` of symmetric matrices."""
    return evaluate(INV_ROOT, m, method=method, rtol=rtol, certify=certify, damping=damping, p=p)


def inv_root_ex(
    m: Inexact[Tensor, "*b n n"],
    p: int,
    damping: Damping = 0.0,
    *,
    symmetric: bool = True,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
) -> tuple[Inexact[Tensor, "*b n n"], Certificate]:
    """`inv_root` with its certificate, never raising for a matrix's values.

    Where M + λI is rank-deficient the value is the root of the inverse on its range, and not converged.

    Args:
        m, p, damping, symmetric, method, rtol, certify: as for `inv_root`.
    Returns: the inverse root and its `Certificate`.
    Raises: ShapeError, DtypeError, InputError: for wrong arguments.
    Cost: as for `inv_root`.
    Source: as for `inv_root`.

    >>> value, certificate = inv_root_ex(torch.diag(torch.tensor([16.0, 0.0])), 4)
    >>> value.tolist(), certificate.converged.item()
    ([[0.5, 0.0], [0.0, 0.0]], False)
    """
    if isinstance(p, bool) or not isinstance(p, int) or p < 1:
        raise InputError(f"inv_root: expected an integer p ≥ 1, got {p!r}. Use p=2 or p=4, for M^(-1/2) or M^(-1/4).")
    function = _inv_root_ex if symmetric else principal_inverse_root_ex
    return function(m, p, damping, method=method, rtol=rtol, certify=certify)


def inv_root(
    m: Inexact[Tensor, "*b n n"],
    p: int,
    damping: Damping = 0.0,
    *,
    symmetric: bool = True,
    method: str = "auto",
    rtol: float | None = None,
    certify: bool = True,
) -> Inexact[Tensor, "*b n n"]:
    """The inverse p-th root of a symmetric positive definite matrix, or the principal one of a square matrix.

    inv_root(M, p, λ) = (M + λI)^(-1/p), if not `symmetric` with eigenvalues whose arguments are between −π/p and π/p.

    Args:
        m: `(..., n, n)`, symmetric up to 10·n·ε(dtype), or Hermitian; if not `symmetric`, without eigenvalues at zero
            or on the negative real axis.
        p: an integer ≥ 1.
        damping: λ ≥ 0, absolute, one number or one per matrix; 0 for p > 2 if not `symmetric`.
        symmetric: whether M is, and what is not is refused. If False, M may be any matrix with a principal root.
        method: the name of a method (see docs/linalg.md), or "auto".
        rtol: the relative Frobenius error asked for; `certificate.RTOL` of the dtype if None.
        certify: whether to bound the error; if False, the value of the same route, and only seen failures raise.
    Returns: `(..., n, n)`, the inverse root, in the dtype of `m`.
    Raises:
        ShapeError: where `m` is not square, or `damping` does not fit it.
        DtypeError: where `m` is not floating point, real or complex.
        InputError: for an unknown method, a p that is not an integer ≥ 1, or a negative damping or rtol.
        ConvergenceError: where M + λI is not symmetric, has an eigenvalue that is not positive, or the error bound is
            above rtol.
    Cost: in float32 products at 1024²: an eigendecomposition, 7 in float32 or 13 in float64, and about 3; refined, 100.
    "coupled_newton" about 90, products only. Accuracy: what `rtol` asks for, until κ nears 1e13. The certificate's
    residual is a bound on ‖XᵇMXᵃ − I‖_F, a + b = p. If not `symmetric`, a square root and an inverse, or a logarithm
    and an exponential, whose errors are composed; the residual is that of the last.
    Source: Higham, Functions of Matrices (2008), chapter 7 and theorem 3.11.

    >>> inv_root(torch.diag(torch.tensor([16.0, 1.0])), 4)
    tensor([[0.5000, 0.0000],
            [0.0000, 1.0000]])
    """
    value, certificate = inv_root_ex(m, p, damping, symmetric=symmetric, method=method, rtol=rtol, certify=certify)
    require_converged("inv_root", certificate)
    return value
