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
PACES, VAGUE, MISFIT, NOISE = (0.02, 0.05, 0.1, 0.2, 0.4), 3.0, 0.03, 1e12
"""As shares of the size of the multiple: how far it may wander while the estimate grows by a factor of e; how uncertain
it is before anything was measured; how far a single plan may be off; and the largest variance that is told apart."""


class Predicted(NamedTuple):
    """The rise of the mean loss that is expected, and an interval that holds nine in ten measurements on new data.

    Attributes:
        rise: of the mean loss per unit.
        low, high: the interval, of a measurement on as much new data as was kept apart; NaN where nothing was measured.
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
    multiple, error = rises / at, errors / Z / at
    weight = 1 / (error.square() + multiple.square().mean() + 1e-300)
    level = float(torch.maximum((weight * multiple.abs()).sum() / weight.sum(), error.min()))
    if not 0 < level < math.inf:  # nothing rose at all
        return Predicted(0.0, 0.0, 0.0, True)
    # In units of the level, since losses may have any.
    multiple, noise = multiple / level, (error / level).square().clamp_max(NOISE) + MISFIT**2
    means, variances, likely = [], [], []
    for pace in PACES:
        prior = VAGUE**2 + pace**2 * _random_walk(places - places.min())
        lower = torch.linalg.cholesky(prior[:-1, :-1] + torch.diag(noise))
        residual = torch.linalg.solve_triangular(lower, (multiple - 1)[:, None], upper=False)[:, 0]
        weights = torch.linalg.solve_triangular(lower, prior[:-1, -1:], upper=False)[:, 0]
        means.append(1 + float(weights @ residual))
        variances.append(max(0.0, float(prior[-1, -1] - weights @ weights)))
        likely.append(float(-0.5 * residual @ residual - lower.diagonal().log().sum()))
    share = torch.tensor(likely, dtype=torch.float64).softmax(0)
    mean, spread = share.new_tensor(means), share.new_tensor(variances)
    middle = float(share @ mean)
    half = Z * math.sqrt(float(share @ (spread + (mean - middle).square())) + MISFIT**2)
    rise = estimate * level * middle
    half = math.hypot(estimate * level * half, _error_of_another(estimate, known))
    return Predicted(rise, rise - half, rise + half, True)


def _error_of_another(estimate: float, known: Sequence[Point]) -> float:
    """Half the interval of another measurement on as much data: on the line between points, of logarithms of both."""
    sure = sorted((math.log(p.estimate), math.log(p.error)) for p in known if p.error > 0)
    if not sure:
        return 0.0
    at = math.log(estimate)
    # The loss of a unit is off by a first-order term, which grows with the root of what the second order costs.
    below = max((one for one in sure if one[0] <= at), default=(at, sure[0][1] + 0.5 * (at - sure[0][0])))
    above = min((one for one in sure if one[0] > at), default=(at, sure[-1][1] + 0.5 * (at - sure[-1][0])))
    share = (at - below[0]) / (above[0] - below[0]) if above[0] > below[0] else 0.0
    return math.exp((1 - share) * below[1] + share * above[1])


def _random_walk(times: Tensor) -> Tensor:
    """The covariance of a random walk that starts at 0, at some times that are not negative."""
    return torch.minimum(times[:, None], times[None, :])


def _student(freedom: int) -> float:
    """The 95 % quantile of Student's t, by its expansion (Abramowitz & Stegun, 26.7.5)."""
    z = Z
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
