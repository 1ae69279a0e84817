"""The rank of a stored matrix: how many singular values are more than the rounding of its entries."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gramian.report import Layer

__all__ = ["UNITS", "rank_above_rounding", "rank_beyond_chance"]

# Unit roundoff of the dtypes.
UNITS = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

# A rank is told as lower where that many small singular values would have this probability in a full matrix.
CHANCE = 1e-5

# At the level of a dtype's rounding, the gap must also be this large and have this many σ below it: products of square
# matrices, and rows of very different sizes, have gaps of any kind among their last few σ. Of 144 full matrices of side
# 256 (independent entries, rows or columns of different sizes, heavy tails, products) in float32, float16 and bfloat16
# none was taken for a lower rank, and 3 without this; of 72 products of thin factors 70 were, and all without this.
GAP, FEWEST = 4.0, 4


def rank_above_rounding(sigma: Sequence[float], shape: tuple[int, ...], level: float) -> int:
    """Return the least r for which entries that move by `level` explain σ_{r+1}, σ_{r+2}, ….

    If r directions carry an (m, n) matrix, rounding makes the others up to `level` (√(m−r) + √(n−r)).

    Args:
        sigma: all singular values, largest first.
        shape: (m, n).
        level: of the rounding of an entry, such as u rms(W).
    """
    n, m = sorted(shape)
    if len(sigma) and sigma[-1] > _floor(level, m, n, 0):  # the least of them is above the highest floor
        return len(sigma)
    return next((r for r, value in enumerate(sigma) if value <= _floor(level, m, n, r)), len(sigma))


def _floor(level: float, m: int, n: int, rank: int) -> float:
    return level * (math.sqrt(m - rank) + math.sqrt(n - rank))


def rank_beyond_chance(layer: Layer) -> int | None:
    """Return the rank above rounding where no full matrix would have one so low; `None` where σ are not all known.

    A full matrix has small σ too. So a rank below n is told only where two null hypotheses give it p < 1e-5. One is
    independent entries, for the number of σ under the floor of rounding: near zero the σ of a square matrix have a
    density of at most √n / (π rms(W)) · 2, and those of a tall one begin at rms(W) (√m − √n). The other is a spectrum
    that decays on as it did, for the gap at the rank: where entries differ in size, by rows or by heavy tails, σ become
    small without a gap, and rounding is in proportion to each entry. Then log σ has spacings as above the gap,
    exponentially distributed.

    Source: Edelman, Eigenvalues and condition numbers of random matrices (1988); Marchenko & Pastur 1967. The test of
    the gap is this library's own.
    """
    sigma, (n, m) = layer.singular_values, sorted(layer.shape[:2])
    unit = UNITS.get(layer.dtype)
    if layer.numerical_rank is None or len(sigma) != n or unit is None or not layer.frobenius_norm:
        return None
    rms = layer.frobenius_norm / math.sqrt(m * n)
    # Exactly dependent rows are zero up to float64's rounding, whatever the dtype. A product of float32 factors carries
    # the rounding of its sums; one in a narrow dtype is rounded at the end.
    exact = UNITS["float64"] * math.sqrt(n)
    levels = {exact, unit * math.sqrt(n) if layer.dtype == "float32" else max(unit, exact)}
    ranks = {level: _beyond_chance(level * rms, rms, sigma, m) for level in levels}
    return min(rank for level, rank in ranks.items() if level == exact or _has_gap(sigma, rank))


def _has_gap(sigma: tuple[float, ...], rank: int) -> bool:
    return rank == len(sigma) or (rank <= len(sigma) - FEWEST and sigma[rank] * GAP <= sigma[rank - 1])


def _beyond_chance(level: float, rms: float, sigma: tuple[float, ...], m: int) -> int:
    n = len(sigma)
    rank = rank_above_rounding(sigma, (m, n), level)
    if rank == n:
        return n
    floor = _floor(level, m, n, rank)
    is_possible = floor > rms * (math.sqrt(m) - math.sqrt(n)) / 2
    independent = 2 * floor * math.sqrt(n) / (math.pi * rms) if is_possible else 0.0
    p_value = max(_poisson_tail(n - rank, independent), _p_of_gap(sigma, rank))
    return rank if p_value < CHANCE else n


def _p_of_gap(sigma: tuple[float, ...], rank: int) -> float:
    """Return the probability of the gap below σ_rank in a spectrum with the spacings of the half above it."""
    start = rank // 2
    if rank - start < 2 or not sigma[rank]:
        return 0.0  # no spacings to compare with, or exactly dependent
    spacing = math.log(sigma[start] / sigma[rank - 1]) / (rank - 1 - start)
    return math.exp(-math.log(sigma[rank - 1] / sigma[rank]) / spacing) if spacing else 0.0


def _poisson_tail(count: int, mean: float) -> float:
    """Return the probability of at least `count` events where `mean` are expected."""
    if count <= 0:
        return 1.0
    if not mean:
        return 0.0
    term = math.exp(count * math.log(mean) - mean - math.lgamma(count + 1))
    total = 0.0
    for k in range(count, count + 1000):
        total += term
        term *= mean / (k + 1)
        if term < 1e-17 * total:
            break
    return min(1.0, total)
