"""The polar factor to a few per cent, for the steps of optimizers: a sum of shifted inverses of the Gram matrix.

Zolotarev's best rational approximation to the sign on [low, 1] is a sum of simple fractions in x², so that
polar(A) ≈ α (I + Σⱼ wⱼ (AAᵀ + pⱼI)⁻¹) A: one Gram matrix, `terms` Cholesky factorizations and one product, where an
iteration takes two products with A a step. The inverses are LAPACK's: an explicit block elimination loses definiteness
beside the smallest shift.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.linalg.engine import lapack
from gramian.linalg.engine.precision import in_full_precision
from gramian.linalg.engine.probes import SEED
from gramian.linalg.engine.scaling import unit_peak
from gramian.linalg.engine.symmetric_products import symmetric_product
from gramian.linalg.engine.workspace import scratch

LEAST = 5e-4
"""Least `low`: the smallest of four shifts is then 3e-7 of the largest eigenvalue; a float32 Gram matrix of lower rank
has eigenvalues down to −2e-8 of it (observed, to 1024×4096)."""

CHUNK = 1 << 20
"""Entries of the matrices that are worked on together on a CPU: the allocator reuses buffers of this size, while larger
ones cost new memory pages each time."""

THIN = 8
"""Vectors of the power method."""
SWEEPS = 3
"""Its steps."""
RAISE = 1.2
"""The factor by which its guess is raised: for normal entries, whose largest eigenvalues lie close, it finds 0.8 of the
largest."""


class Fractions(NamedTuple):
    """α, pⱼ and wⱼ of f(x) = αx (1 + Σ wⱼ / (x² + pⱼ)), which is within `error` of 1 on [low, 1]."""

    scale: float
    poles: tuple[float, ...]
    weights: tuple[float, ...]
    error: float

    @property
    def slope(self) -> float:
        """f'(0): how much the smallest singular values are magnified."""
        return self.scale * (1 + sum(w / p for w, p in zip(self.weights, self.poles, strict=True)))


@lru_cache(maxsize=64)
def fractions(low: float, terms: int) -> Fractions:
    """Zolotarev's function of type (2·terms + 1, 2·terms) for [low, 1], centered about 1.

    c_i = low² sn²(u_i) / cn²(u_i) with u_i = iK' / (2·terms + 1) and complementary modulus; those of odd i are the
    poles. Nakatsukasa and Freund, SIAM Review 58 (2016), §3.

    >>> f = fractions(1e-3, 3)
    >>> round(f.error, 3), round(f.scale * (1 + sum(w / (1 + p) for w, p in zip(f.weights, f.poles))), 3)
    (0.062, 1.062)
    """
    # Landen's transformation by the arithmetic-geometric mean: amplitudes back from the last modulus, which is zero.
    mean, other, gap = [1.0], low, [math.sqrt(1 - low * low)]
    while gap[-1] > 1e-14 * mean[-1]:
        mean.append((mean[-1] + other) / 2)
        gap.append((mean[-2] - other) / 2)
        other = math.sqrt(mean[-2] * other)
    depth = len(mean) - 1
    values = []
    for i in range(1, 2 * terms + 1):
        phi = 2**depth * math.pi / 2 * i / (2 * terms + 1)
        for a, c in zip(mean[:0:-1], gap[:0:-1], strict=True):
            phi = (phi + math.asin(c / a * math.sin(phi))) / 2
        values.append((low * math.tan(phi)) ** 2)
    poles, zeros = values[::2], values[1::2]
    weights = tuple(math.prod(z - p for z in zeros) / math.prod(q - p for q in poles if q != p) for p in poles)
    top, bottom = (
        x * math.prod((x * x + z) / (x * x + p) for p, z in zip(poles, zeros, strict=True)) for x in (1, low)
    )
    return Fractions(2 / (top + bottom), tuple(poles), weights, (top - bottom) / (top + bottom))


@in_full_precision
def zolotarev(
    a: Float[Tensor, "*b m n"],
    *,
    low: float,
    terms: int = 2,
    dtype: torch.dtype | None = None,
    out: Float[Tensor, "*b m n"] | None = None,
) -> Float[Tensor, "*b m n"]:
    """Approximate polar factor of each matrix, whose singular values from `low` · ‖A‖₂ up end within
    `fractions(low, terms).error` of 1, and smaller ones below.

    The last product is in `dtype`, float32 if None; all else is in float32. A zero matrix gives zero, NaN stays in its
    own matrix, and each matrix is scaled by itself. It is written to `out`, contiguous and perhaps `a`, if given.
    """
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        x = a.detach().reshape(math.prod(a.shape[:-2]), *a.shape[-2:])
        if not x.numel():
            return a.clone()
        f = fractions(max(low, LEAST), terms)
        out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out.view(x.shape)
        few = max(1, CHUNK // x[0].numel()) if x.device.type == "cpu" else len(x)
        for part, place in zip(x.split(few), out.split(few), strict=True):
            place.copy_(_sum_of_fractions(part, f, dtype or torch.float32))
        return out.reshape(a.shape)


def _sum_of_fractions(x: Tensor, f: Fractions, dtype: torch.dtype) -> Tensor:
    """f of the singular values of x (B, m, n). It keeps the memory layout of x and transposes only its Gram matrix."""
    tall = x.shape[-2] > x.shape[-1]
    x = unit_peak(x, torch.float32)
    g = symmetric_product(x.mT, x) if tall else symmetric_product(x, x.mT)
    top = _largest(g).clamp_min(torch.finfo(torch.float32).tiny)
    g = g.div_(top)
    total = None
    for pole, weight in zip(f.poles, f.weights, strict=True):
        shifted = g.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(pole)
        factor, _ = lapack.cholesky(shifted, scratch("factor", tuple(g.shape), g.dtype, g))
        term = torch.cholesky_inverse(factor)
        total = term.mul_(f.scale * weight) if total is None else total.add_(term, alpha=f.scale * weight)
    assert total is not None
    total.diagonal(dim1=-2, dim2=-1).add_(f.scale)
    total = total.mT.to(dtype)  # LAPACK's inverses come column by column
    x = torch.mul(x, top.rsqrt(), out=torch.empty_like(x, dtype=dtype))
    return torch.bmm(x, total) if tall else torch.bmm(total, x)


def _largest(g: Tensor) -> Tensor:
    """The largest eigenvalue of each g (B, m, m) ≽ 0, roughly, by power steps on a few vectors (B, 1, 1).

    f grows no faster than x above 1, so a guess that is some per cent too low does no harm.
    """
    start = torch.randn(THIN, g.shape[-1], generator=torch.Generator().manual_seed(SEED), device="cpu")
    v = start.to(g.device).repeat(len(g), 1, 1)
    tiny = torch.finfo(v.dtype).tiny
    size = v[:, :, :1]
    for _ in range(SWEEPS):
        v = v @ g
        size = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        v = v / size.clamp_min(tiny)
    return RAISE * size.amax(-2, keepdim=True)
