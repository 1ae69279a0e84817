"""Fits a power law to the tail of a spectrum, with an interval, or abstains with the reason.

The exponent is never the reason for an alarm: untrained Gaussian matrices of one shape have fitted exponents from 4 to
12, and log-normal eigenvalues, which follow no power law, have fitted exponents like those of trained matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

__all__ = ["LEAST_TAIL", "Tail", "fit_tail"]

# Fewest points of a tail. A fit to n points has a standard error of (α − 1)/√n at best: 14 % of α − 1 here.
LEAST_TAIL = 50

# Quantile 0.9 of √n·D under a true power law, with D the Kolmogorov–Smirnov distance of the fit, whose start minimizes
# D. Simulated; tests/test_noise.py derives it again.
CRITICAL_DISTANCE = 0.80

# Vuong's statistic below which a log-normal fits better than a power law (one-sided 10 %).
CRITICAL_VUONG = -1.28

NUM_STARTS = 48  # candidates for where the tail begins
NUM_RESAMPLES = 40


@dataclass(frozen=True)
class Tail:
    """A power law p(λ) ∝ λ^(−α) of the eigenvalues λ = σ² ≥ `start`.

    Attributes:
        alpha: the exponent; `None` where the fit abstains.
        low, high: its 95 % interval.
        size: number of eigenvalues in the tail.
        start: smallest eigenvalue of the tail.
        note: why the fit abstains, or what its result means.
    """

    alpha: float | None
    low: float | None = None
    high: float | None = None
    size: int = 0
    start: float = 0.0
    note: str = ""


def fit_tail(sigma: Tensor) -> Tail:
    """Fit a power law to the largest eigenvalues σ², or abstain.

        α = 1 + n / Σ log(λᵢ / λ_start)

    where λ_start minimizes the Kolmogorov–Smirnov distance. The interval comes from resampling the eigenvalues, with a
    new start for each sample, combined with the standard error for a fixed start, (α − 1)/√n. The fit abstains if there
    are fewer than 50 points, if the distance is one that a power law exceeds once in ten, if a log-normal fits better,
    or if the tail spans less than a factor of 4.

    Args:
        sigma: all singular values, largest first, float64.
    Returns: the tail; the same spectrum gives the same interval, since the resampling is seeded.
    Cost: O(48 · 40 · n).
    Source: Clauset, Shalizi & Newman, SIAM Review 51 (2009), eq. 3.1, 3.9 and §5; Vuong, Econometrica 57 (1989).
    """
    squares = np.square(sigma.numpy())[::-1]
    squares = squares[squares > 1e-24 * squares[-1]] if squares.size and squares[-1] > 0 else squares[:0]
    if squares.size < LEAST_TAIL:
        return Tail(None, note=f"{squares.size} eigenvalues, fewer than the {LEAST_TAIL} that a tail needs")
    logs = np.log(squares)
    alpha, start, distance = (x[0] for x in _fit(logs[None]))
    size = int((logs >= start).sum())
    tail = logs[logs >= start] - start
    if distance * math.sqrt(size) > CRITICAL_DISTANCE:
        return Tail(None, size=size, note=f"no power law: the distance from the best one is {distance:.2f}")
    if tail[-1] < math.log(4.0):
        return Tail(None, size=size, note=f"the tail spans a factor of {math.exp(tail[-1]):.1f} only")
    if _vuong(tail, float(alpha)) < CRITICAL_VUONG:
        return Tail(None, size=size, note="a log-normal fits better than a power law")
    draws = np.random.default_rng(0).integers(0, logs.size, (NUM_RESAMPLES, logs.size))
    alphas, _, _ = _fit(np.sort(logs[draws], axis=1))
    half = 1.96 * math.hypot(float(alphas.std(ddof=1)), float(alpha - 1) / math.sqrt(size))
    return Tail(
        float(alpha), max(1.0, float(alpha) - half), float(alpha) + half, size, math.exp(start),
        "an iid power law is not ruled out; it is not shown to be one either",
    )  # fmt: skip


def _fit(logs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return exponent, log start and distance for each row of ascending log eigenvalues."""
    n = logs.shape[1]
    starts = np.unique(np.linspace(0, n - LEAST_TAIL, NUM_STARTS).astype(int))
    size = (n - starts)[:, None]
    ranks = np.arange(n) - starts[:, None]
    places, inside = (ranks + 0.5) / size, ranks >= 0
    best = []
    for row in logs:
        first = row[starts][:, None]
        mean = np.cumsum(row[::-1])[::-1][starts][:, None] / size - first
        slope = 1 / np.maximum(mean, 1e-300)  # α − 1
        expected = -np.expm1(-slope * np.maximum(row - first, 0.0))
        # The distribution function of the points jumps by 1/size at each: half of it to either side of its place.
        distance = (np.abs(expected - places) * inside).max(axis=1) + 0.5 / size[:, 0]
        k = int(distance.argmin())
        best.append((1 + slope[k, 0], first[k, 0], distance[k]))
    alpha, start, distance = np.array(best).T
    return alpha, start, distance


def _vuong(tail: np.ndarray, alpha: float) -> float:
    """Return Vuong's statistic of the power law against a log-normal truncated to the tail; negative: the latter.

    `tail` holds log λ − log λ_start ≥ 0: exponential under the power law, a normal truncated at 0 under the other.
    """
    power = math.log(alpha - 1) - (alpha - 1) * tail
    normal = _truncated_normal(tail)
    difference = power - normal
    spread = float(difference.std())
    return float(difference.sum() / (spread * math.sqrt(tail.size))) if spread > 1e-12 else 0.0


def _truncated_normal(x: np.ndarray) -> np.ndarray:
    """Return the log likelihoods under the normal, truncated at 0, of greatest likelihood (a grid refined twice)."""
    mean, spread = float(x.mean()), float(x.std())
    first, second = float(x.sum()), float(np.square(x).sum())
    # the mean from far left, where the law is an exponential, to the data's; the spread to match
    center, width = (mean - 4 * spread, 2 * spread), (6 * spread, 1.8 * spread)
    best = (math.inf, mean, spread)
    for _ in range(4):
        for mu in np.linspace(center[0] - width[0], center[0] + width[0], 21):
            for tau in np.linspace(max(center[1] - width[1], 0.02 * spread), center[1] + width[1], 21):
                inside = 0.5 * math.erfc(-mu / tau / math.sqrt(2))
                if inside < 1e-300:
                    continue
                cost = (second - 2 * mu * first + x.size * mu * mu) / (2 * tau * tau) + x.size * math.log(tau * inside)
                if cost < best[0]:
                    best = (cost, float(mu), float(tau))
        center, width = (best[1], best[2]), (width[0] / 5, width[1] / 5)
    _, mu, tau = best
    inside = 0.5 * math.erfc(-mu / tau / math.sqrt(2))
    return -np.square((x - mu) / tau) / 2 - math.log(tau * inside * math.sqrt(2 * math.pi))
