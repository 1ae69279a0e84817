"""Frobenius norms of matrices that would be expensive to form, from their products with a few random vectors.

‖EΩ‖_F² / k estimates ‖E‖_F² for a Gaussian Ω (n, k). It falls below ‖E‖_F² / γ², γ = `GAINS`[k], with a probability
that is worst for E of rank one, where ‖EΩ‖² / ‖E‖² is χ² with k degrees of freedom: so γ‖EΩ‖_F / √k is an upper bound
except with that probability. The products are taken in float64 with the float32 factors themselves, whatever method
found them. Up to `EXACT` columns Ω is the identity, and the norm is exact.

An E that is rounding is far from rank one, and then γ can be less. With the same probability ‖E‖₂ ≤ γ‖EΩ‖₂ / √k. So if
s = ‖EΩ‖_F² / ‖EΩ‖₂², and g‖EΩ‖_F / √k were below ‖E‖_F, then ‖E‖_F² ≥ ρ‖E‖₂² with ρ = s g² / γ²: a property of E, by
which ‖EΩ‖_F² is a sum of χ² with weights aᵢ of at most 1/ρ of the whole. By Chernoff that falls below k‖E‖_F² / g²
with a probability of at most exp(−(ρk/2)(1/g² − 1 + ln g²)), since Σ ln(1 + c aᵢ) is least where as few weights as may
be share the whole. `SPREAD` has the g for which this is `FAILURE` / 4.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from gramian.linalg.engine import lapack
from gramian.linalg.engine.rounding import norm
from gramian.linalg.engine.thin import times
from gramian.linalg.engine.workspace import scratch

SEED = 0x6772616D69616E
"""The seed of every generator that linalg makes for itself. It is not a small number, since the caller may have drawn
the matrix from a small seed, and probes that are rows of the matrix's own factor prove nothing."""

WIDTH = 16
EXACT = 32
"""Columns up to which Ω is the identity."""
GAINS = {8: 24.0, WIDTH: 6.2, 32: 3.0, 64: 2.02}
MORE = 64
"""Vectors where a bound by `WIDTH` of them just misses what was asked."""
SPREAD = ((3, 4.41), (6, 3.51), (9, 3.10), (12, 2.85))
"""The s from which γ = 6.2 can be so much less, for k = `WIDTH`."""
SPREAD_FROM = 128
"""Columns from which finding s costs little beside the products."""
FAILURE = 1e-10
"""P(χ²_k < k / GAINS[k]²) is below this, 9.0e-11 for k = 32; a test derives it."""

CHUNK = 1 << 17
"""Entries in a part that is widened to float64 at once: 1 MB, which stays in the cache."""

PART = 1 << 18
"""The same for `twice`, which reads each part three times."""


class Probes(NamedTuple):
    """Ω (n, k) in float64, the factor from ‖EΩ‖_F to a bound on ‖E‖_F, and the probability that the bound fails.

    `closer` bounds fail with three times that probability.
    """

    omega: Tensor
    factor: float
    failure: float


@lru_cache(maxsize=16)
def probes(n: int, device: torch.device, width: int = WIDTH) -> Probes:
    """The probes for matrices with n columns, the same in every call; `width` of them, one of `GAINS`."""
    if n <= (EXACT if width == WIDTH else width):
        return Probes(torch.eye(n, dtype=torch.float64, device=device), 1.0, 0.0)
    # Stored by rows, with which the products are several times as fast.
    omega = torch.randn(
        width, n, generator=torch.Generator().manual_seed(SEED + n), dtype=torch.float64, device="cpu"
    ).mT
    return Probes(omega.to(device), GAINS[width] / math.sqrt(width), FAILURE)


def of_norm(e: Tensor, p: Probes, rounding: Tensor | float = 0.0) -> Tensor:
    """A bound on ‖E‖_F from EΩ (B, m, k), which has an error of at most `rounding` in Frobenius norm."""
    return (norm(e) + rounding) * p.factor


def closer(e: Tensor, p: Probes, rounding: Tensor | float = 0.0) -> Tensor:
    """As `of_norm`, and less where E is far from rank one: for the norms that make up most of a bound."""
    size = norm(e)
    if p.omega.shape[-1] != WIDTH or len(p.omega) < SPREAD_FROM:
        return (size + rounding) * p.factor
    # Of eᵀe over its trace, whose eigenvalues are at most one, the eighth power: ‖e‖₂, or up to 1.1 times as much.
    unit = e / size.clamp_min(2.0**-1000)[:, None, None]
    shares = unit.mT @ unit
    shares = shares @ shares
    shares = shares @ shares
    largest = size * norm(shares @ shares) ** (1 / 16) * (1 + 2.0**-30)
    # What is known of EΩ itself, which is `rounding` away.
    spread = ((size - rounding) / (largest + rounding)).clamp_min(0) ** 2  # NaN where they are not finite
    gain = torch.full_like(size, GAINS[WIDTH])
    for least, better in SPREAD:
        gain = torch.where(spread >= least, better, gain)
    return (size + rounding) * gain / math.sqrt(WIDTH)


def apply(a: Tensor, z: Tensor) -> Tensor:
    """a z in float64, for a (B, m, n) of any dtype and z (B, n, k) in float64."""
    return _by_columns(a.mT, z) if a.stride(-2) == 1 else _by_rows(a, z)


def apply_transposed(a: Tensor, z: Tensor) -> Tensor:
    """aᵀ z in float64, for a (B, m, n) of any dtype and z (B, m, k) in float64."""
    return _by_rows(a.mT, z) if a.stride(-2) == 1 else _by_columns(a, z)


def _by_rows(a: Tensor, z: Tensor) -> Tensor:
    if a.dtype == torch.float64:
        return times(a, z)
    parts = [times(_widened(part), z) for part in a.split(_rows(a), dim=-2)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _by_columns(a: Tensor, z: Tensor) -> Tensor:
    if a.dtype == torch.float64:
        return (z.mT @ a).mT
    rows = _rows(a)
    total = None
    for part, right in zip(a.split(rows, dim=-2), z.split(rows, dim=-2), strict=True):
        # (zᵀ a)ᵀ: the wide factor is read along its rows.
        product = right.mT @ _widened(part)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total.mT


def _widened(part: Tensor) -> Tensor:
    """In float64, valid until the next part."""
    return scratch("widened", tuple(part.shape), torch.float64, part).copy_(part)


def _rows(a: Tensor) -> int:
    return max(64, CHUNK // max(1, a.shape[0] * a.shape[-1]))


def two_norm_bound(e: Tensor, p: Probes, rounding: Tensor | float = 0.0) -> Tensor:
    """A bound on ‖E‖₂ from the rows (EΩ)ᵀ (B, k, m): ‖EΩ‖₂ ≥ ‖E‖₂ ‖vᵀΩ‖ for E's leading right singular vector v.

    Several times less than `of_norm` where E is noise, and with the same probability.
    """
    e = e.to(torch.float64)
    size = lapack.small_eigvalsh(e @ e.mT)[..., -1].clamp_min(0).sqrt().nan_to_num(nan=math.inf)
    return (size + rounding) * p.factor


def twice(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows z xᵀx (B, k, n) and z xᵀ (B, k, m), and ‖x‖_F² (B,), in float64, for x (B, m, n) of any dtype.

    One pass over x, which is widened in parts that fit the cache.
    """
    b, m, n = x.shape
    forth, back, square = z.new_empty(b, z.shape[-2], m), torch.zeros_like(z), z.new_zeros(b)
    rows = max(64, PART // max(1, n))
    wide = x.dtype == torch.float64
    count = 0 if wide else min(rows, m)
    # Laid out like x: a part that has to be transposed on its way takes three times as long.
    buffer = z.new_empty(n, count).mT if x.stride(-2) == 1 else z.new_empty(count, n)
    for i in range(b):
        columns = z[i].mT.contiguous()
        for start in range(0, m, rows):
            part = x[i, start : start + rows]
            part = part if wide else buffer[: part.shape[0]].copy_(part)
            image = forth[i, :, start : start + rows].copy_(times(part, columns).mT)
            back[i].addmm_(image, part)
            square[i] += torch.linalg.vector_norm(part) ** 2
    return back, forth, square
