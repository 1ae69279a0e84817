"""Tests singular values against noise: which ones are too large for independent random entries, with p-values.

The null hypothesis is a matrix of independent entries of one variance. Matrices whose rows differ in size, or whose
entries depend on each other, violate it, and are reported as structured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["LEVEL", "Noise", "against_noise", "marchenko_pastur_cdf", "tracy_widom_quantile", "tracy_widom_sf"]

# A singular value counts as structure below this p-value. The margin is for finite matrices with entries that are
# bounded but not Gaussian, whose largest singular value has a heavier tail than the limit law. The level was chosen on
# one set of null matrices and tested on another by benchmarks/inspect_calibration.py.
LEVEL = 1e-5

# Smallest side for which the limit laws are used. For smaller ones the edge fluctuates by more than a tenth of itself.
LEAST_SIDE = 16

# The bulk counts as noise up to this distance of the spectrum's distribution function from Marchenko and Pastur's. For
# a Gaussian matrix of side 64 or more the distance is below 0.02 (benchmarks/inspect_calibration.py).
BULK_DISTANCE = 0.04


# Nodes of the quadrature of a determinant: of 28, 48 and 64, probabilities agree to 1e-7, above 1e-30 to 1e-13.
NODES, NODES_FAR = 28, 48


@dataclass(frozen=True)
class Noise:
    """Comparison of a spectrum with that of independent entries.

    Attributes:
        edge: largest singular value of such a matrix in the limit (Marchenko & Pastur), in the matrix's units.
        above: number of singular values significantly larger than the edge.
        p_value: probability that noise has a largest singular value this large.
        bulk_distance: largest difference of the two distribution functions.
        note: why singular values above the edge were not counted.
    """

    edge: float
    above: int
    p_value: float
    bulk_distance: float
    note: str = ""

    @property
    def is_noise(self) -> bool:
        """Whether the spectrum is consistent with independent entries."""
        return self.above == 0 and self.bulk_distance < BULK_DISTANCE


def against_noise(sigma: Tensor, shape: tuple[int, int], clipped_top: float | None = None) -> Noise | None:
    """Compare a spectrum with that of independent entries; `None` where a side is below 16.

        edge  s (√m + √n),   s² the variance of the entries without the singular values above the edge
        p     1 − F₁((σ₁² / s² − μ) / τ),  μ = (√(m−½) + √(n−½))²,  τ = √μ (1/√(m−½) + 1/√(n−½))^(1/3)

    Args:
        sigma: all singular values, largest first, float64.
        shape: (m, n) of the matrix.
        clipped_top: the largest singular value after a few extreme entries are clipped, where there are any. Values
            above the edge that clipping removes are explained by those entries, and are not counted.
    Returns: the comparison.
    Cost: O(min(m, n)) and a determinant of side 28. Accuracy: of p, that of the limit law, O(n^(−2/3)) with this
        centering for Gaussian entries.
    Source: Marchenko & Pastur, Math. USSR-Sb. 1 (1967); Johnstone, Ann. Statist. 29 (2001), theorem 1.1; the centering
    with ½ is Ma, Bernoulli 18 (2012), eq. 3.
    """
    n, m = sorted(shape)
    if n < LEAST_SIDE or not float(sigma[0]) > 0:
        return None
    squares = np.square(sigma.numpy())
    a, b = math.sqrt(m - 0.5), math.sqrt(n - 0.5)
    center, spread = (a + b) ** 2, (a + b) * (1 / a + 1 / b) ** (1 / 3)
    threshold = (center + spread * tracy_widom_quantile(LEVEL)) / (m * n)
    above, rest = _settle(squares, m, n, threshold)
    variance = rest / ((m - above) * (n - above))
    p = tracy_widom_sf((squares[0] / variance - center) / spread) if variance > 0 else 0.0
    note = ""
    if above and clipped_top is not None:
        clipped = tracy_widom_sf((clipped_top**2 / variance - center) / spread) if variance > 0 else 0.0
        if clipped >= LEVEL:
            note = f"{above} beyond the edge, explained by a few extreme entries"
            above, p = 0, clipped
    edge = math.sqrt(variance) * (math.sqrt(m) + math.sqrt(n))
    return Noise(edge, above, p, _bulk_distance(squares[above:], m - above, n - above), note)


def _settle(squares: np.ndarray, m: int, n: int, threshold: float) -> tuple[int, float]:
    """Return the number of values above the noise edge that the others define, and the energy of the others."""
    tails = np.concatenate((np.cumsum(squares[::-1])[::-1], [0.0]))  # energy from each place on
    above = 0
    while above < n - 1:
        variance = tails[above] / ((m - above) * (n - above))
        passed = min(int((squares > threshold * variance * m * n).sum()), n - 1)
        if passed <= above:
            break
        above = passed
    return above, float(tails[above])


def tracy_widom_sf(s: float) -> float:
    """Return 1 − F₁(s), the probability that the Tracy–Widom law of real matrices exceeds s.

        F₁(s) = det(I − K),   K(x, y) = ½ Ai((x + y) / 2)  on (s, ∞)

    Small probabilities keep their relative accuracy, down to 1e-300.

    Source: Ferrari & Sasamoto, J. Phys. A 38 (2005) L557, eq. 1; the quadrature is Bornemann, Math. Comp. 79 (2010).

    >>> round(tracy_widom_sf(0.9793), 4), round(tracy_widom_sf(2.0234), 4)
    (0.05, 0.01)
    """
    if s > 400:
        return 0.0
    if s < -12:
        return 1.0
    nodes, weights = _legendre(NODES if s <= 10 else NODES_FAR)
    length = 18.0 + max(0.0, -s)
    x = s + length * (nodes + 1) / 2
    root = np.sqrt(weights * length / 2)
    kernel = 0.5 * torch.special.airy_ai(torch.from_numpy(np.add.outer(x, x) / 2)).numpy() * np.outer(root, root)
    eigenvalues = np.linalg.eigvalsh(kernel)
    # Clipped below 1: deep in the left tail, the determinant is dominated by rounding.
    return float(min(1.0, max(0.0, -math.expm1(float(np.log1p(-np.minimum(eigenvalues, 1 - 1e-16)).sum())))))


@cache
def _legendre(num: int) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(num)


@cache
def tracy_widom_quantile(level: float) -> float:
    """Return the s at which 1 − F₁(s) is `level`, by bisection."""
    low, high = -5.0, 60.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if tracy_widom_sf(middle) > level else (low, middle)
    return high


def marchenko_pastur_cdf(x: np.ndarray, m: int, n: int) -> np.ndarray:
    """Return the share of the n values σ²/m of unit noise (m ≥ n) that lie below x, in the limit.

    >>> marchenko_pastur_cdf(np.array([0.0, 1.0, 4.0]), 100, 100).round(3)
    array([0.   , 0.609, 1.   ])
    """
    return np.interp(x, *_law(m, n))


@lru_cache(maxsize=64)
def _law(m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Places, and the law's distribution function there."""
    c = n / m
    low, high = (1 - math.sqrt(c)) ** 2, (1 + math.sqrt(c)) ** 2
    # With x = middle − half·cos t the density is smooth in t: so are its square roots at both ends, and its pole at 0.
    t = np.linspace(0, math.pi, 1025)
    grid = (low + high) / 2 - (high - low) / 2 * np.cos(t)
    speed = ((high - low) / 2 * np.sin(t)) ** 2 / (2 * math.pi * c * np.maximum(grid, 1e-300))
    if low == 0.0:
        speed[0] = (high / 2) / math.pi / c  # the limit at t = 0, where both vanish
    steps = (speed[1:] + speed[:-1]) / 2 * (t[1] - t[0])
    return grid, np.concatenate(([0.0], np.cumsum(steps))) / steps.sum()


def _bulk_distance(squares: np.ndarray, m: int, n: int) -> float:
    mean = squares.mean()
    if not mean > 0:
        return 1.0
    expected = marchenko_pastur_cdf(squares[::-1] / mean, m, n)
    places = (np.arange(n) + 0.5) / n
    return float(np.abs(expected - places).max())
