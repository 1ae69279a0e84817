"""The polar factor by dynamically weighted Halley steps in Cholesky form: products and triangular solves only."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg.engine import lapack
from gramian.linalg.engine.eigenvalue_ratio import hopeless
from gramian.linalg.engine.escalation import Answer
from gramian.linalg.engine.probes import apply, apply_transposed, of_norm, probes
from gramian.linalg.engine.rounding import chain_rounding, norm
from gramian.linalg.engine.symmetric_products import gram, symmetric_product

FLOOR = 5e-4
"""The least σ/‖A‖₂ that the weights allow for: in float32 a Cholesky step for less would err by more than εκ."""

STEPS32_ERROR = 6e-7
"""What the float32 steps lose, as relative error over κ at least; observed."""

SWEEPS = 3
"""Inverse iterations for the least eigenvalue of H: its bound is off by at most (GAIN² n)^(1/6)."""


def weights(low: float) -> tuple[float, float, float]:
    """a, b, c of the Halley step x(a + bx²)/(1 + cx²) that lifts [low, 1] best.

    Nakatsukasa, Bai, Gygi, SIAM J. Matrix Anal. Appl. 31 (2010), §3.
    """
    if low > 1 - 1e-12:
        return 3.0, 1.0, 3.0
    gamma = (4 * (1 - low**2) / low**4) ** (1 / 3)
    root = math.sqrt(1 + gamma)
    a = root + 0.5 * math.sqrt(8 - 4 * gamma + 8 * (2 - low**2) / (low**2 * root))
    b = (a - 1) ** 2 / 4
    return a, b, a + b - 1


def qdwh(x: Tensor, *, rtol: float, certify: bool = True) -> Answer | None:
    """Two Halley steps for singular values above 5e-4 of the largest, a polynomial one, in float32; error εκ."""
    g = gram(x)
    if hopeless(g, rtol, STEPS32_ERROR, power=0.5):
        return None
    # ‖A‖₂ from above, within a few per cent: ‖A‖₂ ≤ ‖(AᵀA)⁴‖_F^(1/8).
    p = probes(x.shape[-1], x.device)
    high = p.omega.to(x.dtype).expand(x.shape[0], -1, -1)
    scale = torch.ones(x.shape[0], dtype=torch.float64, device=x.device)
    for _ in range(4 if x[0:1].numel() else 0):
        high = g @ high
        size = norm(high).clamp_min(2.0**-100)
        high, scale = high / size[:, None, None].to(x.dtype), scale * size
    top = (scale * p.factor).pow(1 / 8).to(x.dtype)[:, None, None] if x[0:1].numel() else 1.0
    x0, g, q, low = x, g / top**2, x / top, FLOOR
    for _ in range(2):
        a, b, c = weights(low)
        low = low * (a + b * low**2) / (1 + c * low**2)
        middle = 2 / (1 + low)  # centers [low, 1] about 1; the next weights take the factor into account
        q = _halley(q, g, a, b, c)
        g = gram(q)
        if low > 0.9:
            q, g = q * middle, g * middle**2
    # (I + E)^(-1/2) to third order, |E| ≤ 1 − low²: what is left is (35/128) E⁴.
    e = g
    e.diagonal(dim1=-2, dim2=-1).sub_(1)
    square = symmetric_product(e, e)
    poly = torch.baddbmm(square, square, e, beta=0.375, alpha=-0.3125).sub_(e, alpha=0.5)
    q = torch.baddbmm(q, q, poly)
    return _bounded(x0, q) if certify else Answer.bare(q, steps=3)


def _halley(q: Tensor, g: Tensor, a: float, b: float, c: float) -> Tensor:
    """q (b/c + (a − b/c) (I + c qᵀq)⁻¹) with qᵀq = g, by a Cholesky factor and two triangular solves."""
    shifted = c * g
    shifted.diagonal(dim1=-2, dim2=-1).add_(1)
    lower, _ = lapack.cholesky(shifted)
    y = torch.linalg.solve_triangular(lower.mT, q, upper=True, left=False)
    y = torch.linalg.solve_triangular(lower, y, upper=False, left=False)
    return torch.add(y * (a - b / c), q, alpha=b / c)


def _bounded(x: Tensor, q: Tensor) -> Answer:
    """A bound from H = (QᵀA + AᵀQ)/2, which a Cholesky factor L of it in float32 proves positive definite.

    With E = A − QH and F = QᵀQ − I, Q' = Q(I + F)^(-1/2) is the polar factor of A − E', E' = E + (Q − Q')H; and the
    factor moves by at most ‖E'‖_F / σ on a path on which the least singular value is ≥ σ (Higham, Functions of
    Matrices, §8.1). σ ≥ λ_min(H) − ‖E'‖_F, λ_min(H) ≥ λ_min(LLᵀ) − ‖H − LLᵀ‖_F, and λ_min(LLᵀ) ≥
    ‖(LLᵀ)⁻ʲ‖_F^(-1/j).
    """
    n = x.shape[-1]
    p = probes(n, x.device)
    h = q.mT @ x
    lower, info = lapack.cholesky((h + h.mT) / 2)
    lower = torch.where((info != 0)[:, None, None], torch.eye(n, dtype=x.dtype, device=x.device), lower).double()
    omega = p.omega.expand(x.shape[0], -1, -1)
    length, size, root = norm(omega), norm(lower), math.sqrt(max(n, 1))
    long = sum(x.shape[-2:]) + 2 * n
    qo, xo = apply(q, omega), apply(x, omega)
    y = (apply_transposed(q, xo) + apply_transposed(x, qo)) / 2
    y_error = chain_rounding(long, 6 * root, norm(x), length)
    qy = apply(q, y)
    e = of_norm(xo - qy, p, 2 * y_error + chain_rounding(long, 9 * root, norm(x), length))
    f = of_norm(apply_transposed(q, qo) - omega, p, chain_rounding(long, 6 * root, length))
    fh = of_norm(apply_transposed(q, qy) - y, p, 2 * y_error + chain_rounding(long, 9 * root, norm(x), length))
    slack = (1 - f).clamp_min(2.0**-30) ** -1.5
    distance = e + fh * slack * (1 + f) / 2 + 2.0**-100 * n
    apart = of_norm(lower @ (lower.mT @ omega) - y, p, y_error + chain_rounding(3 * n, size, size, length))
    z = omega
    for _ in range(SWEEPS):
        z = torch.linalg.solve_triangular(lower, z, upper=False)
        z = torch.linalg.solve_triangular(lower.mT, z, upper=True)
    lowest = of_norm(z, p) ** (-1 / SWEEPS) * (1 - 2.0**-10) if n else distance + 1
    proven = (info == 0) & (f < 0.5)
    proven &= lowest > 2.0**-40 * n * size**2  # the solves above are then right to ten bits
    lowest = lowest - apart
    proven &= lowest > 2 * distance
    error = torch.where(proven, distance / (lowest - distance) + f * slack / 2, math.inf)
    if not x[0:1].numel():
        error = torch.zeros_like(error)
    reason = torch.where(error.isfinite(), cert.NONE, cert.INACCURATE)
    exact = torch.full_like(error, math.sqrt(n))
    return Answer(q, error, e / norm(x).clamp_min(2.0**-100), reason, steps=3, failure=5 * p.failure, size=exact)
