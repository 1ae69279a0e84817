"""How near to singular a matrix is: a cheap guess to choose a route by, and the smallest singular value, bounded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg.batch import norm
from gramian.linalg.probes import SEED
from gramian.linalg.singular import by_gram, svd_values_twofold
from gramian.linalg.twofold import Pair, eye_like, minus, pair, plus, product, transpose

WIDTH = 8
SWEEPS = 3
TIGHT = 64
"""Up to this side an SVD with twofold residuals costs little beside the calls."""


def eigenvalue_ratio(g: Tensor) -> Tensor:
    """About λ_min / λ_max of each SPD matrix (B, n, n), by a few power and inverse iterations; 0 where Cholesky fails.

    A Cholesky factor (a third of a product at best) and products with `WIDTH` vectors. In float32 ratios below 1e-6
    cannot be seen.
    """
    if not g[0:1].numel():
        return g.new_ones(g.shape[0], dtype=torch.float64)
    factor, info = torch.linalg.cholesky_ex(g)
    bad = info != 0
    if bool(bad.any()):
        factor = torch.where(bad[:, None, None], torch.eye(g.shape[-1], dtype=g.dtype, device=g.device), factor)
    start = torch.randn(g.shape[-1], WIDTH, generator=torch.Generator().manual_seed(SEED)).to(g)
    high = low = start.expand(g.shape[0], -1, -1)
    for _ in range(SWEEPS):
        high = g @ (high / high.norm(dim=-2, keepdim=True))
        low = torch.cholesky_solve(low / low.norm(dim=-2, keepdim=True), factor)
    largest = high.norm(dim=-2).amax(-1)
    smallest = 1 / low.norm(dim=-2).amax(-1)
    return torch.where(bad, 0.0, smallest / largest).to(torch.float64).nan_to_num(nan=0.0)


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """σ₁ of each x (B, m, n) in float64, and a bound on its error: where x is small, the tighter of two."""
    s, errors, ok = by_gram(x)
    value, error = s[:, -1], torch.where(ok, errors[:, -1], math.inf)
    if x.shape[-1] <= TIGHT:
        found = svd_values_twofold(x, decline=math.inf)
        tighter = (found.error < error) & (found.reason == cert.NONE)
        value, error = torch.where(tighter, found.value[:, 0], value), torch.where(tighter, found.error, error)
    return value, error


def smallest(x: Tensor) -> tuple[Tensor, Tensor]:
    """σ_n of each x (B, m, n), m ≥ n, in float64, and a bound on its error, inf where κ is beyond about 1e14.

    σ_n = 1/‖X⁻¹‖₂ with the inverse refined on twofold residuals, so that its rounding is not magnified by κ. Where
    m > n, X⁻¹ is that of QᵀX, formed twofold: what Q misses of X, ρ, adds ρ² to σ_n².
    """
    m, n = x.shape[-2:]
    spread, missed = x.new_zeros(x.shape[0]), x.new_zeros(x.shape[0])
    square = pair(x)
    if m > n:
        q = pair(torch.linalg.qr(x).Q)
        square = product(transpose(q), pair(x))
        defect, defect_error = minus(eye_like(x), product(transpose(q), q))
        gap, gap_error = minus(pair(x), product(q, Pair(square.hi, square.lo, square.error)))
        spread, missed = norm(defect) + defect_error, norm(gap) + gap_error
    y, _ = torch.linalg.inv_ex(square.hi)
    close = pair(y.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
    for _ in range(3):
        r, _ = minus(eye_like(x), product(square, close))
        # Not a contraction: a step would make it worse, and the bound will say so.
        r = torch.where((norm(r) < 1)[:, None, None], r, 0.0)
        close = plus(close, close.hi @ r)
    r, r_error = minus(eye_like(x), product(square, close))
    # X⁻¹ = Y(I − R)⁻¹.
    size = norm(r) + r_error
    top, blur = largest(close.hi)
    blur = blur + norm(close.lo)
    value = 1 / top
    high = (1 + size) / (top - blur).clamp_min(0) / (1 - spread)
    low = (1 - size) / (top + blur) / (1 + spread)
    error = torch.maximum((high**2 + missed**2).sqrt() - value, value - low)
    return value, torch.where((size < 0.5) & (spread < 0.5), error, math.inf).nan_to_num(nan=math.inf, posinf=math.inf)
