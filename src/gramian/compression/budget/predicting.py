"""Prediction: how much the loss will rise, from the second-order estimate and points where it was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gramian.compression.budget.optimism import Kept, kept_on_new_data
from gramian.compression.budget.points import Point, measured_points
from gramian.compression.calibration.measure import Measure

__all__ = ["REMOVED", "Predicted", "Rises", "predict"]

INTERPOLATION = 0.1
"""How far the rise between two measured points may at least be from the line between them, as a share of it."""
ON_NEW_DATA = (-1.0, 1.6, 1.25)
"""How a rise on new data is bounded by its two parts on training data: at least the first times the divergence, at most
the second times the divergence and the third times what is beyond it. From eleven models, of which four knew their
training data by heart; see docs/compress.md."""


REMOVED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
"""Shares of the layers that can be factored, at whose removal the rise of the loss is measured."""
MEASURED_BITS = (4, 8)
"""Bits at which the rise is measured too; what other bits cost follows from these, if it is no more."""
LEAST_BITS = 2


class Predicted(NamedTuple):
    """The rise of the mean loss that is expected, and an interval that holds nine in ten.

    Attributes:
        rise: of the mean loss per unit.
        low, high: the interval, of new data; NaN where nothing was measured.
        measured: whether it was measured or lies between measurements of its kind. It is not in a plan from a file,
            beyond the last one or with zeros or rounded factors that were not measured before; nor where there is the
            second-order estimate alone, which is often several times too low.
        seen: whether `rise` is that on data like the calibration's, which may be those that the model was trained on,
            so that it is another on new data; else it is that on new data.

    >>> Predicted(0.00123456, 0.0011111, 0.0013333, True)
    Predicted(rise=0.00123, low=0.00111, high=0.00133, measured=True)
    >>> print(Predicted(0.12, -0.0067, 0.24, True))
    rise of the mean loss at most 0.24
    >>> print(Predicted(0.12, -0.0067, 0.24, True, seen=True))
    rise of the mean loss at most 0.24 on new data, 0.12 on data like the calibration's
    """

    rise: float
    low: float
    high: float
    measured: bool
    seen: bool = False

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={getattr(self, name):.3g}" for name in ("rise", "low", "high"))
        return f"Predicted({numbers}, measured={self.measured}{', seen=True' if self.seen else ''})"

    def _repr_html_(self) -> str:
        return f"<p>{self}</p>"

    def __str__(self) -> str:
        return f"rise of the mean loss {self.interval}"

    @property
    def interval(self) -> str:
        """The rise and its interval; where it may be none, or is not of new data, what it is there at most."""
        if math.isnan(self.low):
            return f"{self.rise:.2g} (to second order)"
        how = "" if self.measured else ", extrapolated"
        if self.seen:
            return f"at most {self.high:.2g} on new data, {self.rise:.2g} on data like the calibration's{how}"
        if self.low <= 0 < self.high:
            return f"at most {self.high:.2g}{how}"
        return f"{self.rise:.2g} ({self.low:.2g} to {self.high:.2g}{how})"


@dataclass(eq=False)
class Rises:
    """The points of a plan, measured once they are asked for.

    Args:
        cut: those of cut ranks; `None` where they are not measured yet.
        rounded: those of rounded weights, likewise.
        measure: on what; `None` where no more can be measured, as in a plan from a file.
        beyond: those of single plans beyond all others, or of a form of their own, each for that plan alone while more
            can be measured.
    """

    cut: tuple[Point, ...] | None = ()
    rounded: tuple[Point, ...] | None = ()
    measure: Measure | None = None
    beyond: tuple[Point, ...] = ()

    def of(self, plan: Any, cut: bool) -> tuple[Point, ...]:
        """The points of one kind.

        Args:
            plan: any of those that share this.
            cut: of cut ranks, or of rounded weights.
        """
        found = self.cut if cut else self.rounded
        if found is not None:
            return found
        if cut:
            smallest = _smallest(plan).keep
            parts = [plan.at(keep=1 - removed, of="factorable") for removed in REMOVED if 1 - removed >= smallest]
        else:
            parts = [plan.at(bits=bits) for bits in MEASURED_BITS]
        found = self._measured(parts, cut)
        self.cut, self.rounded = (found, self.rounded) if cut else (self.cut, found)
        return found

    def at(self, plan: Any, cut: bool, *, is_own: bool = False) -> Predicted:
        """The rise of one plan: between the points, or measured where it is beyond them, or has a form of its own.

        Args:
            plan: whose rise is asked for.
            cut: whether ranks or units are cut, or weights rounded.
            is_own: whether its form is none of the points'.
        """
        estimate = plan.predicted_loss
        points = () if is_own and self.measure is not None else self.of(plan, cut)
        if not is_own and estimate <= max((p.estimate for p in points), default=0.0):
            return predict(estimate, points)
        beyond = tuple(p for p in self.beyond if p.cut == cut)
        own = tuple(p for p in beyond if p.estimate == estimate)
        if self.measure is not None:
            own = beyond = own or self._measured([plan], cut)
            self.beyond = tuple(dict.fromkeys(self.beyond + own))
        if is_own:
            return predict(estimate, own) if own else predict(estimate, points)._replace(measured=False)
        return predict(estimate, points + beyond)

    def settled(self, plan: Any) -> Rises:
        """The same for a file, with which nothing can be measured: with that plan, and the smallest there are."""
        cut, rounded = self.of(plan, True), self.of(plan, False)
        if self.measure is not None:
            for one in (plan, _smallest(plan), plan.at(bits=LEAST_BITS)):
                _ = one.predicted
        return Rises(cut, rounded, None, self.beyond)

    def _measured(self, parts: Sequence[Any], cut: bool) -> tuple[Point, ...]:
        assert self.measure is not None
        if not parts:
            return ()
        asked = [(part.predicted_loss, part.apply, cut) for part in parts]
        return measured_points(
            parts[0].model, self.measure, asked, kept_on_new_data(parts, self.measure) if cut else ()
        )


def _smallest(plan: Any) -> Any:
    """The smallest plan of ranks."""
    return plan.at(keep=plan.at(keep=1.0, of="factorable").smallest, of="factorable")


def predict(estimate: float, points: Sequence[Point]) -> Predicted:
    """The rise at a second-order estimate: on the line between the nearest points, of logarithms of both.

    Args:
        estimate: `½ Σ σ²` of what is dropped.
        points: measured, in any order.

    Returns:
        The rise with its interval, which is extrapolated beyond the largest estimate that was measured; the estimate
        itself where nothing was measured. Where the data may be those that the model was trained on, the rise is that
        on such data, and the interval one for new data; with `Point.kept` both are for new data.

    Cost: none to speak of.
    Source: the rise is `½ Σ σ²` as that goes to zero, and a power of it between points that are near.

    >>> predict(2.0, [Point(1.0, 3.0, 0.0), Point(4.0, 12.0, 0.0)]).rise
    6.0
    """
    if estimate <= 0:
        return Predicted(0.0, 0.0, 0.0, bool(points))
    known = sorted(p for p in points if p.estimate > 0 and math.isfinite(p.rise))
    if not known:
        return Predicted(estimate, math.nan, math.nan, False)
    upper = next((i for i, p in enumerate(known) if p.estimate >= estimate), len(known) - 1)
    right = known[upper]
    # Below the first point the rise goes to zero with the estimate, in proportion.
    left = known[upper - 1] if upper else Point(0.0, 0.0, 0.0, divergence=0.0)
    rise, error = _between(estimate, left, right)
    outside = max(0.0, math.log(estimate / right.estimate))  # beyond the last point, less is known
    rough = INTERPOLATION if estimate == right.estimate else _roughness(known)
    rough += 0.5 * outside
    half = math.hypot(error, rough * abs(rise))
    if left.divergence is None or right.divergence is None:
        return Predicted(rise, rise - half, rise + half, outside == 0)
    ends = Point(left.estimate, left.divergence, 0.0), Point(right.estimate, right.divergence, 0.0)
    moved, _ = _between(estimate, *ends)
    least, most, beyond = ON_NEW_DATA
    widest = (
        min(rise - half, least * moved),
        rise + half + (most - 1) * moved + (beyond - 1) * max(rise - moved, 0.0),
    )
    if right.kept is None:
        return Predicted(rise, *widest, outside == 0, seen=True)
    low, added, high = _kept(estimate, left, right, right.kept).added(rise - moved, moved)
    half = math.hypot(error, rough * (abs(moved) + abs(added)))
    rise = moved + added
    low, high = rise - math.hypot(half, added - low), rise + math.hypot(half, high - added)
    if right.kept.assumed:  # which may be wrong
        low, high = min(low, widest[0]), max(high, widest[1])
    return Predicted(rise, low, high, outside == 0)


def _between(estimate: float, left: Point, right: Point) -> tuple[float, float]:
    """The rise and half its interval on a line between two points, of logarithms where both have risen."""
    if left.estimate <= 0 or min(left.rise, right.rise) <= 0 or left.estimate == right.estimate:
        if left.estimate > 0 and right.estimate < estimate:
            return right.rise + estimate - right.estimate, right.error  # a line through noise may lead anywhere
        share = (estimate - left.estimate) / max(right.estimate - left.estimate, 1e-300)
        rise = left.rise + share * (right.rise - left.rise)
        return rise, (1 - min(share, 1.0)) * left.error + share * right.error
    share = math.log(estimate / left.estimate) / math.log(right.estimate / left.estimate)
    rise = math.exp((1 - share) * math.log(left.rise) + share * math.log(right.rise))
    return rise, rise * (abs(1 - share) * left.error / left.rise + abs(share) * right.error / right.rise)


def _kept(estimate: float, left: Point, right: Point, last: Kept) -> Kept:
    """What is known of new data between two points; below the first and beyond the last it is as there."""
    if left.kept is None or left.estimate <= 0 or estimate >= right.estimate:
        return last
    share = math.log(estimate / left.estimate) / math.log(right.estimate / left.estimate)
    one, other = left.kept, last
    return last._replace(
        share=(1 - share) * one.share + share * other.share, error=(1 - share) * one.error + share * other.error
    )


def _roughness(known: Sequence[Point]) -> float:
    """How far a rise may be from the line between two points: half as far as points are from their neighbors' line."""
    off = [
        abs(_between(point.estimate, left, right)[0] / point.rise - 1)
        for left, point, right in zip(known, known[1:], known[2:], strict=False)
        if point.rise > 0 and left.estimate < point.estimate < right.estimate
    ]
    return max([INTERPOLATION, *(0.5 * one for one in off)])
