"""How far an inverse p-th root V diag(x) Vᵀ is from M^(-1/p): bounds from products with a few random vectors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gramian.linalg.engine.backward_error import backward_error
from gramian.linalg.engine.double_double import Pair, thin_product, thin_rough
from gramian.linalg.engine.probes import Probes, apply, apply_transposed, closer, of_norm, probes
from gramian.linalg.engine.rounding import LOOSE, U, chain_rounding, gamma, norm, unit_roundoff
from gramian.linalg.engine.symmetric_products import gram
from gramian.linalg.engine.workspace import scratch


def root_of(w: Tensor, p: int) -> Tensor:
    """w^(-1/p), zero where w is not positive."""
    return torch.where(w > 0, w, torch.inf) ** (-1 / p)


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for the others."""
    return torch.promote_types(dtype, torch.float32)


def of_roots(root: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """V diag(root) Vᵀ in `dtype`, exactly symmetric."""
    # LAPACK stores vectors by columns.
    return gram(scratch("rows", tuple(v.mT.shape), dtype, v).copy_(v.mT).mul_(root.sqrt().to(dtype)[:, :, None]))


TIGHT = 128
"""Side up to which a residual in double-double arithmetic costs little."""


def from_eigenpairs(
    m: Pair, w: Tensor, v: Tensor, p: int, dtype: torch.dtype, rtol: float, wanted: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """V w^(-1/p) Vᵀ in `dtype`, its bound, no finer than `rtol` or the dtype `wanted` needs, and its residual."""
    n = w.shape[-1]
    root = root_of(w, p)
    value = of_roots(root, v, dtype)
    if v.dtype == torch.float64 and n:
        probe = probes(n, v.device)
        apart = _apart(value, root, v, probe)
        enough = 0.9 * rtol * norm(value)
        if wanted != torch.float64 or (n > TIGHT and math.isfinite(rtol)):
            far = backward_error(n) * w.abs().amax(-1) + norm(m.lo)
            error, residual = _from_backward_error(root, far, p)
            near = apart.maximum(2 * unit_roundoff(wanted) * norm(value))
            if bool(((error <= near) & (error + apart <= enough)).all()):
                return value, error + apart, residual
        if n > TIGHT and math.isfinite(rtol):
            error, residual = _eigen_bound(m, root, v, p, probe, rough_product)
            if bool((error + apart <= enough).all()):
                return value, error + apart, residual
        error, residual = _eigen_bound(m, root, v, p, probe, fine)
        return value, error + apart, residual

    whole = scratch("whole", tuple(value.shape), torch.float64, value).copy_(value)  # once for all products
    off = off_product(whole, v, root)
    # ‖V‖₂² ≤ 1.1 and σ_min(V)² ≥ 0.9: LAPACK's vectors are orthonormal to far better than that, in any dtype.
    top = root.amax(-1) * 1.1 + off if n else root.new_zeros(root.shape[0])
    slip = chain_rounding(n, norm(value) * (1 + LOOSE))

    def times_m(m: Pair, z: Tensor) -> Pair:
        # ‖M‖_F, up to LAPACK's error.
        return thin_rough(m, 1.1 * norm(w), z)

    error, residual = root_bound(m, value, lambda z: apply(whole, z), top, slip, p, probes(n, v.device), times_m)
    if n:
        error = torch.where(off < 0.5 * root.amin(-1), error, math.inf)
    return value, error, residual


def off_product(value: Tensor, v: Tensor, root: Tensor) -> Tensor:
    """A bound on ‖X − V diag(root) Vᵀ‖₂ for the X that `of_roots` makes in float32; below 0.9 min(root) X is positive.

    X is a product LLᵀ, whose rounding is at most γₙ‖L‖²_F. Where that is too much it is measured by probes.
    """
    n = v.shape[-1]
    if not n:
        return root.new_zeros(root.shape[0])
    unit = n * unit_roundoff(v.dtype)
    # L itself is V diag(root)^½ up to a rounding of each entry or two.
    off = 1.2 * (unit / (1 - min(unit, 0.5)) + 8 * unit_roundoff(v.dtype)) * root.sum(-1)
    if bool((off < 0.5 * root.amin(-1)).all()):
        return off
    probe = probes(n, v.device)
    omega = probe.omega.expand(v.shape[0], -1, -1)
    once = apply(v, root[:, :, None] * apply_transposed(v, omega))
    blur = chain_rounding(n, norm(value), norm(omega)) + 3 * chain_rounding(n + 3, root.sum(-1), norm(omega))
    return torch.minimum(off, of_norm(apply(value, omega) - once, probe, blur))


def _apart(value: Tensor, root: Tensor, v: Tensor, probe: Probes) -> Tensor:
    """A bound on ‖value − V₀ diag(root) V₀ᵀ‖_F for a float64 V and V₀ = V(VᵀV)^(-1/2).

    V₀ differs from V by less than φ = ‖VᵀV − I‖₂, for which LAPACK's bound is taken.
    """
    n = v.shape[-1]
    turned = 2.2 * backward_error(n) * norm(root)
    if value.dtype == torch.float64:
        # V diag(root)^½ is a rounding or two off, and the product γₙ: less than what is known of V.
        return turned + 1.1 * gamma(n + 8) * root.sum(-1)
    omega = probe.omega.expand(v.shape[0], -1, -1)
    length, top = norm(probe.omega[None]), root.amax(-1)
    once = apply(v, root[:, :, None] * apply_transposed(v, omega))
    blur = 2.1 * gamma(n + 3) * math.sqrt(n) * top * length + chain_rounding(n, norm(value), length)
    return closer(apply(value, omega) - once, probe, blur) + turned


def _from_backward_error(root: Tensor, far: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """A bound on ‖X − M^(-1/p)‖_F, and on the residual, for X = V₀ diag(root) V₀ᵀ with ‖M − X^(-p)‖₂ ≤ `far`.

    With LAPACK's own bound on that, as for V₀ in `_apart`, it takes no product. It has κ in it.
    """
    r = root.amax(-1) ** p * far
    error = torch.expm1(torch.log1p(-r.clamp_max(0.5)) / -p) * norm(root)
    return torch.where((r < 0.5) & (root > 0).all(-1), error, math.inf), r * math.sqrt(root.shape[-1])


def _eigen_bound(
    m: Pair, root: Tensor, v: Tensor, p: int, probe: Probes, times_m: Callable[[Pair, Tensor], Pair]
) -> tuple[Tensor, Tensor]:
    """As `root_bound` for X = V₀ diag(root) V₀ᵀ, V₀ as in `_apart`, in the basis of V, which is cheaper.

    V₀ᵀ(XᵇMXᵃ − I)V₀ = DᵇV₀ᵀMV₀Dᵃ − I, D = diag(root), and φ moves it by √κ φ on either side.
    """
    n = v.shape[-1]
    omega = probe.omega.expand(v.shape[0], -1, -1)
    length, root_n, phi = norm(probe.omega[None]), math.sqrt(n), backward_error(n)
    top, low = root.amax(-1), root.amin(-1)
    slip = gamma(n + 3) * root_n
    b = p // 2
    a = p - b
    inner = root[:, :, None] ** a * omega
    right = apply(v, inner)
    image = times_m(m, right)
    back = apply_transposed(v, image.hi + image.lo)
    back_error = image.error * 1.1 + 2 * slip * norm(image.hi)
    # DᵇVᵀM = (I + R)D⁻ᵃVᵀ: an error made before M is magnified by at most that.
    left_error = top**b * back_error + 2.2 * low**-a * slip * norm(inner) + 8 * U * length
    turned = 5 * root_n * phi * ((top / low) ** a + (top / low) ** b)
    left = root[:, :, None] ** b * back - omega
    r = of_norm(left, probe, left_error) + turned
    first = closer(root[:, :, None] * left, probe, top * left_error) + top * turned
    return _from_norms(first, r, norm(root), p), r


def root_bound(
    m: Pair,
    value: Tensor,
    times: Callable[[Tensor], Tensor],
    top: Tensor,
    slip: Tensor | float,
    p: int,
    probe: Probes,
    times_m: Callable[[Pair, Tensor], Pair],
    *,
    near: bool = False,
) -> tuple[Tensor, Tensor]:
    """A bound on ‖value − M^(-1/p)‖_F for a positive definite value X that `times` applies, or is `near`; and r.

    With R = XᵇMXᵃ − I, a + b = p, a − b = 0 or 1, S = X^(p/2) M X^(p/2) − I is similar to R, and its eigenvalues are at
    most r = ‖R‖. On the way Y(t) = (X^(-p/2) (I + tS) X^(-p/2))^(-1/p) from X to M^(-1/p):

    - In the eigenbasis of X, Y'(0) has entries Sᵢⱼ (xᵢxⱼ)^(p/2) / Σₖ xᵢᵏ xⱼᵖ⁻¹⁻ᵏ, at most Sᵢⱼ √(xᵢxⱼ) / p by the
      inequality of the means, so that ‖Y'(0)‖_F ≤ ‖XR‖_F / p.
    - By the integral of μ^(-1/p) (λ + μ)⁻¹, 0 ≤ Y'' ≤ (2/p) (r/(1 − r))² Y, and Y ≤ (1 − r)^(-1/p) X.

    So ‖M^(-1/p) − X‖_F ≤ (‖XR‖_F + (r/(1 − r))² (1 − r)^(-1/p) ‖X‖_F) / p, into which no condition number enters; where
    it is less, ((1 − r)^(-1/p) − 1) ‖X‖_F, as λ^(-1/p) is operator monotone (Bhatia, Matrix Analysis, chapter V).
    `top` bounds ‖X‖₂, and one application to z errs by at most `slip` ‖z‖_F.
    """
    if not value[0:1].numel():
        zero = torch.zeros(value.shape[0], dtype=torch.float64, device=value.device)
        return zero, zero
    n = value.shape[-1]
    omega = probe.omega.expand(value.shape[0], -1, -1)

    def several(z: Tensor, error: Tensor, count: int) -> tuple[Tensor, Tensor]:
        for _ in range(count):
            z, error = times(z), top * error + slip * norm(z)
        return z, error

    zero = torch.zeros_like(top)
    once, once_error = several(omega, zero, 1)
    size = norm(value) * (1 + LOOSE)
    apart = zero
    if near:
        apart = closer(apply(value, omega) - once, probe, once_error + chain_rounding(n, size, norm(omega)))
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
    return _from_norms(first, r, size + apart, p) + apart, r


def _from_norms(first: Tensor, r: Tensor, size: Tensor, p: int) -> Tensor:
    """The bound of `root_bound` from ‖XR‖_F, r and ‖X‖_F."""
    near = r.clamp_max(0.5)
    whole = torch.expm1(torch.log1p(-near) / -p)
    share = ((near / (1 - near)) ** 2 * (1 - near) ** (-1 / p)) / p
    error = torch.minimum(first / p + share * size, whole * size)
    return torch.where((r < 0.5) & error.isfinite(), error, math.inf)


def fine(m: Pair, z: Tensor) -> Pair:
    """M z in double-double arithmetic, for an exact m."""
    return thin_product(m, norm(m.hi), z)


def rough_product(m: Pair, z: Tensor) -> Pair:
    """M z in plain float64."""
    return thin_rough(m, norm(m.hi), z)
