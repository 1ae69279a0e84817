"""How far an inverse p-th root V diag(x) Vᵀ is from M^(-1/p): bounds from products with a few random vectors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gramian.linalg.engine.double_double import Pair, thin_product, thin_rough
from gramian.linalg.engine.probes import Probes, apply, apply_transposed, closer, of_norm, probes
from gramian.linalg.engine.rounding import LOOSE, U, chain_rounding, gamma, norm
from gramian.linalg.engine.symmetric_products import symmetric_product
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
    rows = scratch("rows", tuple(v.mT.shape), dtype, v).copy_(v.mT).mul_(root.sqrt().to(dtype)[:, :, None])
    return symmetric_product(rows.mT, rows)


TIGHT = 128
"""Side up to which a residual in double-double arithmetic costs little."""


def from_eigenpairs(
    m: Pair, w: Tensor, v: Tensor, p: int, dtype: torch.dtype, rtol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """V w^(-1/p) Vᵀ in `dtype`, its bound, no finer than `rtol` needs, and its residual."""
    n = w.shape[-1]
    root = root_of(w, p)
    value = of_roots(root, v, dtype)
    if v.dtype == torch.float64 and n:
        probe = probes(n, v.device)
        if n > TIGHT and math.isfinite(rtol):
            error, residual = _eigen_bound(m, value, root, v, p, probe, rough_product)
            if bool((error <= 0.9 * rtol * norm(value)).all()):
                return value, error, residual
        return value, *_eigen_bound(m, value, root, v, p, probe, fine)

    # Once for all products, in the memory's order.
    vectors = scratch("vectors", tuple(v.mT.shape), torch.float64, v).copy_(v.mT).mT

    def times(z: Tensor) -> Tensor:
        return apply(vectors, root[:, :, None] * apply_transposed(vectors, z))

    # ‖V‖₂² ≤ 1.1: LAPACK's vectors are orthonormal to far better than that, in any dtype.
    top = root.amax(-1) * 1.1 if n else root.new_zeros(root.shape[0])
    row = torch.full_like(top, math.sqrt(n)) * top.sqrt()
    error, residual = root_bound(m, value, times, top, row, p, probes(n, v.device), rough_product)
    return value, error, residual


def _eigen_bound(
    m: Pair, value: Tensor, root: Tensor, v: Tensor, p: int, probe: Probes, times_m: Callable[[Pair, Tensor], Pair]
) -> tuple[Tensor, Tensor]:
    """As `root_bound` for X = V₀ diag(root) V₀ᵀ, V₀ = V(VᵀV)^(-1/2), in the basis of V, which is cheaper.

    V₀ᵀ(XᵇMXᵃ − I)V₀ = DᵇV₀ᵀMV₀Dᵃ − I, D = diag(root). V₀ differs from V by less than φ = ‖VᵀV − I‖₂, for which
    LAPACK's bound is taken (Users' Guide, §4.7, with p(n) = 10n), and that moves the product by √κ φ on either side.
    """
    n = v.shape[-1]
    omega = probe.omega.expand(v.shape[0], -1, -1)
    length, root_n, phi = norm(omega), math.sqrt(n), 10 * n * 2 * U
    top, low = root.amax(-1), root.amin(-1)
    slip = gamma(n + 3) * root_n
    once = apply(v, root[:, :, None] * apply_transposed(v, omega))
    own = norm(root)
    blur = 2.1 * slip * top * length + chain_rounding(n, norm(value), length)
    apart = closer(apply(value, omega) - once, probe, blur) + 2.2 * phi * own
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
    return _from_norms(first, r, own, apart, p), r


def root_bound(
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
    """The bound of `root_bound` from ‖XR‖_F, r, ‖X‖_F, and the distance of the value from X."""
    near = r.clamp_max(0.5)
    whole = torch.expm1(torch.log1p(-near) / -p)
    share = ((near / (1 - near)) ** 2 * (1 - near) ** (-1 / p)) / p
    error = torch.minimum(first / p + share * size, whole * size) + apart
    return torch.where((r < 0.5) & error.isfinite(), error, math.inf)


def fine(m: Pair, z: Tensor) -> Pair:
    """M z in double-double arithmetic, for an exact m."""
    return thin_product(m, norm(m.hi), z)


def rough_product(m: Pair, z: Tensor) -> Pair:
    """M z in plain float64."""
    return thin_rough(m, norm(m.hi), z)
