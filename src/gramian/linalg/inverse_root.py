"""Routes to the inverse p-th root, certified with products by a few random vectors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg import factor
from gramian.linalg.batch import Answer, declined, norm
from gramian.linalg.conditioning import eigenvalue_ratio
from gramian.linalg.inverses import damped
from gramian.linalg.probes import Probes, apply, chain_rounding, of_norm, probes
from gramian.linalg.symmetric import symmetric_product
from gramian.linalg.twofold import Pair, U, gamma, thin_product

LOSS = 24 * 2.0**-24
"""Bound on the relative error times p, over κ, that a float32 eigendecomposition costs; observed."""

NEGLIGIBLE = 10
"""Eigenvalues above −10·n·ε(dtype)·‖M‖ are rounding, not indefiniteness; the design's constant."""

STEPS = 60
"""Most steps of the coupled iteration: first each gains (1 + 1/p) on κ^(1/p), at last each doubles the digits."""


def eigh32(x: Tensor, shift: Tensor, asymmetric: Tensor, p: int, eps: float, *, decline: float) -> Answer:
    """V w^(-1/p) Vᵀ by an eigendecomposition in float32; error εκ/p."""
    narrow = x.float()
    narrow = narrow + shift.float()[:, None, None] * torch.eye(x.shape[-1], dtype=narrow.dtype, device=x.device)
    if math.isfinite(decline) and x.numel():
        hopeless = decline * p * eigenvalue_ratio(narrow) < LOSS
        if bool(hopeless.all()):
            return declined(narrow)
    w, v, ok = factor.eigh(narrow)
    value, error, residual = _from_eigenpairs(damped(x, shift), w.double(), v, p, v.dtype)
    proven = ok & error.isfinite() & (w > 0).all(-1)
    reason = torch.where(asymmetric, cert.NOT_SYMMETRIC, torch.where(proven, cert.NONE, cert.INACCURATE))
    error = torch.where(proven, error, math.inf)
    return Answer(value, error, residual, reason, failure=2 * probes(x.shape[-1], x.device).failure)


def eigh64(x: Tensor, shift: Tensor, asymmetric: Tensor, p: int, eps: float, *, decline: float) -> Answer:
    """The same in float64, the product V w^(-1/p) Vᵀ in float32 if M came so; error uκ/p and a rounding of the answer.

    Where a positive definite M is not proven the value is the root of the inverse on the range.
    """
    m = damped(x, shift)
    w, v, floor, reason = decompose(m, asymmetric, eps)
    dtype = torch.float64 if eps < 2.0**-30 else torch.float32
    value, error, residual = _from_eigenpairs(m, w, v, p, dtype)
    proven = error.isfinite() & (w > 0).all(-1)
    error = torch.where(proven, error, math.inf)
    kept = w > floor
    unproven = torch.where(kept.all(-1), cert.INACCURATE, cert.SINGULAR)
    reason = torch.where((reason == cert.NONE) & ~proven, unproven, reason)
    if not bool(proven.all()):
        root = torch.where(kept, w, torch.inf) ** (-1 / p)
        on_range = ((v * root[:, None, :]) @ v.mT).to(value.dtype)
        value = torch.where(proven[:, None, None], value, on_range)
    return Answer(value, error, residual, reason, failure=2 * probes(x.shape[-1], x.device).failure)


def coupled_newton(x: Tensor, shift: Tensor, asymmetric: Tensor, p: int, eps: float, *, decline: float) -> Answer:
    """X ← XT, M ← TᵖM with T = ((p + 1)I − M)/p, products only, in float32 (float64 if M came so). Iannazzo 2006.

    For devices on which an eigendecomposition is slow. Positive definiteness comes from a Cholesky factor of X.
    """
    n = x.shape[-1]
    m = damped(x, shift)
    work = torch.float64 if eps < 2.0**-30 else torch.float32
    eye = torch.eye(n, dtype=work, device=x.device)
    start = (1 + p) / (2 * norm(m.hi).clamp_min(2.0**-500))
    y = (m.hi * start[:, None, None]).to(work)
    z = eye * (start ** (1 / p)).to(work)[:, None, None]
    least = torch.full_like(start, math.inf)
    best, steps = z, 0
    for step in range(STEPS if x.numel() else 0):
        t = (eye * (p + 1) - y) / p
        y, z = _power(t, p) @ y, z @ t
        gap = norm(y - eye)
        # Rounding makes the iteration turn round once it is as near as it comes.
        better = gap < least
        best, least = torch.where(better[:, None, None], z, best), torch.where(better, gap, least)
        steps = step + 1
        if step % 4 == 3 and not bool((better & (gap > 1e-3 * finest(work))).any()):
            break
    value = (best + best.mT) / 2
    lower, info = torch.linalg.cholesky_ex(value)
    lower = torch.where((info != 0)[:, None, None], eye, lower).double()
    top = norm(lower) ** 2

    def times(z: Tensor) -> Tensor:
        return lower @ (lower.mT @ z)

    error, residual = root_bound(m, value, times, top, norm(lower), p, probes(n, x.device), twofold=True)
    proven = (info == 0) & error.isfinite()
    reason = torch.where(asymmetric, cert.NOT_SYMMETRIC, torch.where(proven, cert.NONE, cert.INACCURATE))
    error = torch.where(proven, error, math.inf)
    return Answer(value, error, residual, reason, steps, failure=2 * probes(n, x.device).failure)


def finest(dtype: torch.dtype) -> float:
    """The unit roundoff of a dtype."""
    return torch.finfo(dtype).eps / 2


def _power(t: Tensor, p: int) -> Tensor:
    if p == 1:
        return t
    half = _power(t, p // 2)
    return half @ half @ t if p % 2 else half @ half


def decompose(m: Pair, asymmetric: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eigenvalues, eigenvectors, the floor (B, 1) below which float64 cannot tell them from zero, and the reason."""
    w, v, ok = factor.eigh(m.hi)
    n = w.shape[-1]
    top = w.abs().amax(-1, keepdim=True) if n else w.new_zeros(w.shape[0], 1)
    indefinite = (w < -NEGLIGIBLE * n * eps * top).any(-1)
    reason = torch.where(indefinite, cert.INDEFINITE, cert.NONE)
    reason = torch.where(asymmetric, cert.NOT_SYMMETRIC, reason)
    return w, v, NEGLIGIBLE * n * 2 * U * top, torch.where(ok, reason, cert.LAPACK)


def _from_eigenpairs(m: Pair, w: Tensor, v: Tensor, p: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """V w^(-1/p) Vᵀ in `dtype`, its bound and its residual."""
    n = w.shape[-1]
    root = torch.where(w > 0, w, torch.inf) ** (-1 / p)
    left = v.to(dtype) * root.sqrt().to(dtype)[:, None, :]
    value = symmetric_product(left, left.mT)
    if v.dtype == torch.float64 and n:
        return value, *_eigen_bound(m, value, root, v, p, probes(n, v.device))
    vectors, across = v.double(), v.double().mT

    def times(z: Tensor) -> Tensor:
        return vectors @ (root[:, :, None] * (across @ z))

    # ‖V‖₂² ≤ 1.1: LAPACK's vectors are orthonormal to far better than that, in any dtype.
    top = root.amax(-1) * 1.1 if n else root.new_zeros(root.shape[0])
    row = torch.full_like(top, math.sqrt(n)) * top.sqrt()
    error, residual = root_bound(m, value, times, top, row, p, probes(n, v.device), twofold=False)
    return value, error, residual


def _eigen_bound(m: Pair, value: Tensor, root: Tensor, v: Tensor, p: int, probe: Probes) -> tuple[Tensor, Tensor]:
    """As `root_bound` for X = V₀ diag(root) V₀ᵀ, V₀ = V(VᵀV)^(-1/2), seen from its own basis, which is cheaper.

    V₀ᵀ(XᵇMXᵃ − I)V₀ = DᵇV₀ᵀMV₀Dᵃ − I, D = diag(root). V₀ differs from V by less than φ = ‖VᵀV − I‖₂, for which
    LAPACK's bound is taken (Users' Guide, §4.7, with p(n) = 10n), and that moves the product by √κ φ on either side.
    """
    n = v.shape[-1]
    omega = probe.omega.expand(v.shape[0], -1, -1)
    length, root_n, phi = norm(omega), math.sqrt(n), 10 * n * 2 * U
    top, low, size = root.amax(-1), root.amin(-1), norm(m.hi)
    slip = gamma(n + 3) * root_n
    once = v @ (root[:, :, None] * (v.mT @ omega))
    own = norm(root)
    blur = 2.1 * slip * top * length + chain_rounding(n, norm(value), length)
    apart = of_norm(apply(value, omega) - once, probe, blur) + 2.2 * phi * own
    a = p // 2
    b = p - a
    inner = root[:, :, None] ** a * omega
    right = v @ inner
    image = thin_product(m, size, right)
    back = v.mT @ (image.hi + image.lo)
    back_error = image.error * 1.1 + 2 * slip * norm(image.hi)
    # DᵇVᵀM = (I + R)D⁻ᵃVᵀ: what is wrong before M grows by no more than that.
    left_error = top**b * back_error + 2.2 * low**-a * slip * norm(inner) + 8 * U * length
    turned = 5 * root_n * phi * ((top / low) ** a + (top / low) ** b)
    r = of_norm(root[:, :, None] ** b * back - omega, probe, left_error) + turned
    relative = torch.expm1(torch.log1p(-r.clamp_max(0.5)) / -p)
    error = relative * own * (1 + phi) + apart
    return torch.where((r < 0.5) & error.isfinite(), error, math.inf), r


def root_bound(
    m: Pair,
    value: Tensor,
    times: Callable[[Tensor], Tensor],
    top: Tensor,
    row: Tensor,
    p: int,
    probe: Probes,
    *,
    twofold: bool,
) -> tuple[Tensor, Tensor]:
    """A bound on ‖value − M^(-1/p)‖_F, `value` being near X, which `times` applies and is positive definite; and r.

    If r = ‖XᵇMXᵃ − I‖ < 1, a + b = p, then the eigenvalues of X^(p/2) M X^(p/2) are as near to 1, (1 − r) X⁻ᵖ ≤ M ≤
    (1 + r) X⁻ᵖ, and as λ^(-1/p) is operator monotone, ‖M^(-1/p) − X‖ ≤ ((1 − r)^(-1/p) − 1) ‖X‖ in every unitarily
    invariant norm (Bhatia, Matrix Analysis, chapter V): no condition number enters. `top` bounds ‖X‖₂, and one
    application errs by γ √top · `row`, `row` bounding the Frobenius norm of either factor of X.
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
    apart = of_norm(apply(value, omega) - once, probe, once_error + chain_rounding(n, norm(value), norm(omega)))
    a = p // 2
    right, right_error = several(once, once_error, a - 1) if a else (omega, zero)
    image = thin_product(m, norm(m.hi), right) if twofold else _rough(m, right)
    left, left_error = several(image.hi + image.lo, image.error + U * norm(image.hi), p - a)
    # XᵇM = (I + R) X⁻ᵃ, and X⁻ᵖ ≤ M / (1 − r): what went wrong before M grows by no more than that.
    left_error = left_error + right_error * 2 * (2 * norm(m.hi)) ** (a / p)
    r = of_norm(left - omega, probe, left_error)
    relative = torch.expm1(torch.log1p(-r.clamp_max(0.5)) / -p)
    size = of_norm(once, Probes(omega, probe.factor, 0.0), once_error).minimum(norm(value) + apart)
    error = relative * size + apart
    return torch.where((r < 0.5) & error.isfinite(), error, math.inf), r


def _rough(m: Pair, z: Tensor) -> Pair:
    """M z in plain float64."""
    value = m.hi @ z
    error = chain_rounding(z.shape[-2], norm(m.hi), norm(z)) + norm(m.lo) * norm(z)
    assert isinstance(error, Tensor)
    return Pair(value, torch.zeros_like(value), error)
