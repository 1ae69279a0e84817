"""Points: rises of the loss that are measured, in the part that needs no labels and the part that labels add."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from gramian.calls import prepared
from gramian.compression.budget.optimism import Kept
from gramian.compression.calibration.measure import Measure
from gramian.recording import evaluating
from gramian.recording.forward_failures import naming_the_layer

__all__ = ["Point", "losses_of", "measured_points"]

PRECISE, LEAST = 0.05, 8
"""Half the interval of a measured rise, as a share of it, with which no more batches are asked; and so many are."""


class Point(NamedTuple):
    """One measurement: the second-order estimate of a plan, and what the loss rose by, with half its 90 % interval.

    Attributes:
        estimate: the second-order estimate.
        rise: of the mean loss.
        error: half the interval.
        cut: whether ranks were cut, or weights rounded: the estimate of the one is off by another factor.
        divergence: the part of the rise that does not depend on labels, where the data may be those that the model was
            trained on, so that the other part may be another on new data; else `None`.
        kept: what is known of that other part on new data.
    """

    estimate: float
    rise: float
    error: float
    cut: bool = True
    divergence: float | None = None
    kept: Kept | None = None


def losses_of(model: nn.Module, measure: Measure) -> list[tuple[float, float]]:
    """The sum of losses and the number of units of each batch, which may be none, as where all labels are ignored."""
    found = []
    with evaluating(model), torch.no_grad():
        for batch in measure.batches:
            with naming_the_layer("compress", batch, measure.objective, model):
                total, units = measure.objective.loss(model, batch, empty=True)
            found.append((float(total), float(units)))
    return found


def measured_points(
    model: nn.Module,
    measure: Measure,
    plans: Iterable[tuple[float, Callable[[], nn.Module], bool]],
    kept: Sequence[Kept | None] = (),
) -> tuple[Point, ...]:
    """The rises of the loss of smaller models, on as many batches as it takes to know each of them well.

    A rise is the divergence from the original's predictions, which needs no labels, and what the labels add, whose
    noise is nearly all of the rise's. So batches that the statistics have seen are asked too, for their labels: a
    cut fits them better than others, but that shows in the divergence, which is taken from the batches kept apart.

    Args:
        model: the one that they were made of.
        measure: the batches, which are asked in an order drawn once, and the loss.
        plans: of each smaller model the second-order estimate, a function that makes it, and whether ranks were cut.
        kept: for each what is known of new data, where these may be those that the model was trained on.

    Returns:
        As many points.

    Raises: as the objective.
    Cost: a pass of the batches for each, or of those that are enough; and two of up to 16 of them for divergences.
    Source: sequential sampling to a relative width (Chow & Robbins 1965).
    """
    apart = [Measure([batch], measure.objective) for batch in _drawn(measure.batches)]
    asked = apart + [Measure([batch], measure.objective) for batch in _drawn(measure.more)]
    before: list[tuple[float, float]] = []
    found = []
    with evaluating(model):  # which may be what the smaller ones are compared with
        for (estimate, make, cut), share in itertools.zip_longest(plans, kept):
            small, after = make(), []
            point = Point(estimate, math.nan, math.nan, cut)
            for one in asked:
                before += losses_of(model, one) if len(before) == len(after) else []
                after += losses_of(small, one)
                point = _point(estimate, before[: len(after)], after)._replace(cut=cut)
                if len(after) >= LEAST and point.error <= PRECISE * abs(point.rise):
                    break
            seen = asked[len(apart) : len(after)]
            found.append(point if measure.new else _parted(point, model, small, (apart, seen))._replace(kept=share))
    return tuple(found)


def _drawn(batches: Sequence[Any]) -> list[Any]:
    """The batches in an order that is drawn once, since they may be sorted."""
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()
    return [batches[i] for i in order]


def _parted(point: Point, model: nn.Module, small: nn.Module, asked: tuple[list[Measure], list[Measure]]) -> Point:
    """A point with its divergence on batches kept apart, and the rise as if that were the one on all of them."""
    apart, seen = asked
    objective = apart[0].objective
    if objective.against is not None:  # the rise is the divergence
        return point
    if objective.divergence is None:
        return point._replace(divergence=min(point.estimate, max(point.rise, 0.0)))
    own, other = (_divergence(model, small, part[:LEAST]) for part in (apart, seen))
    own = other if math.isnan(own.rise) else own  # the batches kept apart may have no labels
    if math.isnan(other.rise):
        return point._replace(divergence=own.rise)
    share = len(seen) / (len(seen) + len(apart))
    error = math.hypot(point.error, share * own.error, share * other.error)
    return point._replace(rise=point.rise + share * (own.rise - other.rise), error=error, divergence=own.rise)


def _divergence(model: nn.Module, small: nn.Module, asked: Sequence[Measure]) -> Point:
    """The mean divergence of the small model's predictions from the model's, with half its interval."""
    sums = []
    with evaluating(small), torch.no_grad():
        for measure in asked:
            objective, batch = measure.objective, prepared(model, measure.batches[0])
            assert objective.divergence is not None
            reference, output = objective.predict(model, batch), objective.predict(small, batch)
            _, units = objective.checked(objective.criterion(output, batch), empty=True)
            sums.append((float(objective.divergence(output, reference, batch)), float(units)))
    return _point(0.0, [(0.0, units) for _, units in sums], sums)


def _point(estimate: float, before: Sequence[tuple[float, float]], after: Sequence[tuple[float, float]]) -> Point:
    """A point from the losses of the same batches before and after."""
    units = sum(n for _, n in before)
    if not units:
        return Point(estimate, math.nan, math.nan)
    rises = [b - a for (a, _), (b, _) in zip(before, after, strict=True)]
    rise = sum(rises) / units
    if len(rises) < 2:
        return Point(estimate, rise, abs(rise))
    each = [r - rise * n for r, (_, n) in zip(rises, before, strict=True)]
    spread = sum(e * e for e in each) * len(each) / (len(each) - 1)
    return Point(estimate, rise, _student(len(rises) - 1) * math.sqrt(spread) / units)


def _student(freedom: int) -> float:
    """The 95 % quantile of Student's t, by its expansion (Abramowitz & Stegun, 26.7.5)."""
    z = 1.6449
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
