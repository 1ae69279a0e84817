"""Prediction: how much the loss will rise, from the second-order estimate and a few points where it was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gramian.compression.calibrating import Measure
from gramian.recording import evaluating

__all__ = ["Point", "Predicted", "losses_of", "measured_point", "predict"]

Z = 1.6449
"""The 95 % quantile of the normal distribution."""
PACES, VAGUE, MISFIT = (0.02, 0.05, 0.1, 0.2, 0.4), 3.0, 0.03
"""As shares of the size of the multiple: how far it may wander while the estimate grows by a factor of e; how uncertain
it is before anything was measured; and how far a single plan may be off."""


class Predicted(NamedTuple):
    """The rise of the mean loss that is expected, and an interval that holds nine in ten.

    Attributes:
        rise: of the mean loss per unit.
        low, high: the interval; NaN where nothing was measured.
        measured: whether it rests on measurements, and not on the second-order estimate alone, which is often several
            times too low.
    """

    rise: float
    low: float
    high: float
    measured: bool


class Point(NamedTuple):
    """One measurement: the second-order estimate of a plan, and what the loss rose by, with half its 90 % interval.

    Attributes:
        estimate: the second-order estimate.
        rise: of the mean loss.
        error: half the interval.
        cut: whether ranks were cut, or weights rounded: the estimate of the one is off by another factor.
    """

    estimate: float
    rise: float
    error: float
    cut: bool = True


def losses_of(model: nn.Module, measure: Measure) -> list[tuple[float, float]]:
    """The sum of losses and the number of units of each batch."""
    found = []
    with evaluating(model), torch.no_grad():
        for batch in measure.batches:
            total, units = measure.objective.loss(model, batch)
            found.append((float(total), float(units)))
    return found


def measured_point(
    estimate: float, before: Sequence[tuple[float, float]], after: Sequence[tuple[float, float]]
) -> Point:
    """A point from the losses of the same batches before and after."""
    units = sum(n for _, n in before)
    rises = [b - a for (a, _), (b, _) in zip(before, after, strict=True)]
    rise = sum(rises) / units
    if len(rises) < 2:
        return Point(estimate, rise, abs(rise))
    each = [r - rise * n for r, (_, n) in zip(rises, before, strict=True)]
    spread = sum(e * e for e in each) * len(each) / (len(each) - 1)
    return Point(estimate, rise, _student(len(rises) - 1) * math.sqrt(spread) / units)


def predict(estimate: float, points: Sequence[Point]) -> Predicted:
    """The rise at a second-order estimate, from rises that were measured at others.

    What the rise is as a multiple of the estimate wanders slowly with the logarithm of the estimate. So a point that is
    known well tells of its neighbors, and a rise that is small beside the noise of its measurement is found from larger
    ones. How fast the multiple wanders is averaged over, by how likely it makes the points.

    Args:
        estimate: `½ Σ σ²` of what is dropped.
        points: measured, in any order.

    Returns:
        The rise with its interval; the estimate itself where nothing was measured.

    Raises: nothing of its own.
    Cost: none to speak of.
    Source: Gaussian-process regression (Rasmussen & Williams 2006, eq. 2.23–2.30) with the covariance of a random walk.

    >>> round(predict(2.0, [Point(1.0, 3.0, 0.0), Point(4.0, 12.0, 0.0)]).rise, 3)
    6.0
    """
    if estimate <= 0:
        return Predicted(0.0, 0.0, 0.0, bool(points))
    known = [p for p in points if p.estimate > 0 and math.isfinite(p.rise) and math.isfinite(p.error)]
    if not known:
        return Predicted(estimate, math.nan, math.nan, False)
    at, rises, errors = (torch.tensor(column, dtype=torch.float64) for column in list(zip(*known, strict=True))[:3])
    places = torch.cat([at, at.new_tensor([estimate])]).log()
    multiple, noise = rises / at, (errors / Z / at).square()
    weight = 1 / (noise + multiple.square().mean() + 1e-300)
    level = float(((weight * multiple.abs()).sum() / weight.sum()).clamp_min(1e-300))
    means, variances, likely = [], [], []
    for pace in PACES:
        prior = level**2 * (VAGUE**2 + pace**2 * _random_walk(places - places.min()))
        covariance = prior[:-1, :-1] + torch.diag(noise + (MISFIT * level) ** 2)
        lower = torch.linalg.cholesky(covariance)
        residual = torch.linalg.solve_triangular(lower, (multiple - level)[:, None], upper=False)[:, 0]
        weights = torch.linalg.solve_triangular(lower, prior[:-1, -1:], upper=False)[:, 0]
        means.append(level + float(weights @ residual))
        variances.append(max(0.0, float(prior[-1, -1] - weights @ weights)))
        likely.append(float(-0.5 * residual @ residual - lower.diagonal().log().sum()))
    share = torch.tensor(likely, dtype=torch.float64).softmax(0)
    mean, spread = share.new_tensor(means), share.new_tensor(variances)
    middle = float(share @ mean)
    half = Z * math.sqrt(float(share @ (spread + (mean - middle).square())) + (MISFIT * level) ** 2)
    return Predicted(estimate * middle, estimate * (middle - half), estimate * (middle + half), True)


def _random_walk(times: Tensor) -> Tensor:
    """The covariance of a random walk that starts at 0, at some times that are not negative."""
    return torch.minimum(times[:, None], times[None, :])


def _student(freedom: int) -> float:
    """The 95 % quantile of Student's t, by its expansion (Abramowitz & Stegun, 26.7.5)."""
    z = Z
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
