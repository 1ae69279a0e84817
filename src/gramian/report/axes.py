"""The scale of one axis: its limits, its ticks, and which values it can show.

Logarithms are taken here and not by matplotlib, whose log axes warn and stay empty at values such as 1e-300.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .formatting import power_of_ten, tick_labels

# A span below these would magnify rounding noise into structure: ±5 % on a linear axis, a factor 1.25 on a log axis.
_LEAST_LINEAR_SPAN = 0.1
_LEAST_LOG_SPAN = math.log10(1.25)


@dataclass(frozen=True)
class Axis:
    """Limits and ticks in drawing units, which are the values or their decimal logarithms."""

    log: bool
    low: float
    high: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]

    def position(self, value: float) -> float:
        """Return the position of a value in drawing units; the value must be one that `shows` accepts."""
        return math.log10(value) if self.log else float(value)

    def fraction(self, value: float) -> float:
        """Return where a value lies between the limits, 0 to 1."""
        return (self.position(value) - self.low) / (self.high - self.low)

    def thinned(self, least: float) -> Axis:
        """Return the axis with ticks at least a share of its length apart; of a decade's, the round ones stay.

        >>> make_axis([0.25, 1], log=True, num_ticks=3).thinned(0.25).labels
        ('0.3', '0.5', '1')
        """
        kept: list[int] = []
        for place in sorted(range(len(self.ticks)), key=self._rank):
            if all(abs(self.ticks[place] - self.ticks[other]) >= least * (self.high - self.low) for other in kept):
                kept.append(place)
        kept.sort()
        return replace(
            self, ticks=tuple(self.ticks[place] for place in kept), labels=tuple(self.labels[place] for place in kept)
        )

    def _rank(self, place: int) -> int:
        """Which of the ticks goes before others: those of decades, then 5, 2 and 3 times them."""
        if not self.log:
            return 0
        mantissa = round(10 ** (self.ticks[place] % 1), 6)
        return {1.0: 0, 10.0: 0, 5.0: 1, 2.0: 2, 3.0: 3}.get(mantissa, 4)


def shows(value: float, log: bool) -> bool:
    """Whether an axis can show a value."""
    return math.isfinite(value) and (value > 0 or not log)


@dataclass
class LeftOut:
    """The number of values that could not be drawn, by reason."""

    not_finite: int = 0
    not_positive: int = 0

    def count(self, values: Iterable[float], log: bool) -> None:
        """Count the values that an axis cannot show."""
        for value in values:
            if not math.isfinite(value):
                self.not_finite += 1
            elif log and value <= 0:
                self.not_positive += 1

    def __str__(self) -> str:
        total = self.not_finite + self.not_positive
        if not total:
            return ""
        reasons = [
            f"{count:,} {reason}"
            for count, reason in (
                (self.not_finite, "not finite"),
                (self.not_positive, "not positive, on a logarithmic scale"),
            )
            if count
        ]
        return f"{total:,} {'value' if total == 1 else 'values'} left out: {', '.join(reasons)}."


def make_axis(
    values: Iterable[float],
    *,
    log: bool = False,
    num_ticks: int = 6,
    margin: float = 0.0,
    from_zero: bool = False,
    integer: bool = False,
) -> Axis:
    """Return an axis that spans the values; `margin` is the share of the span left free at each end."""
    positions = [math.log10(v) if log else float(v) for v in values]
    low, high = (min(positions), max(positions)) if positions else (0.0, 1.0)
    if from_zero and not log:
        low, high = min(low, 0.0), max(high, 0.0)
    least = _LEAST_LOG_SPAN if log else max(_LEAST_LINEAR_SPAN * max(abs(low), abs(high)), 1e-300)
    if high - low < least:
        middle = (low + high) / 2
        low, high = middle - least / 2, middle + least / 2
        if low == high == 0:
            low, high = -1.0, 1.0
    span = high - low
    ends_at_zero = from_zero and not log
    low -= 0 if ends_at_zero and low == 0 else margin * span
    high += 0 if ends_at_zero and high == 0 else margin * span
    ticks, labels = _log_ticks(low, high, num_ticks) if log else _linear_ticks(low, high, num_ticks, integer)
    return Axis(log, low, high, tuple(ticks), tuple(labels))


def _linear_ticks(low: float, high: float, count: int, integer: bool) -> tuple[list[float], list[str]]:
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(nbins=max(count, 2), steps=[1, 2, 5, 10], integer=integer)
    slack = 1e-9 * (high - low)
    ticks = [float(t) for t in locator.tick_values(low, high) if low - slack <= t <= high + slack]
    ticks = [0.0 if abs(t) < slack else t for t in ticks]
    return ticks, tick_labels(ticks)


def _log_ticks(low: float, high: float, count: int) -> tuple[list[float], list[str]]:
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    if last - first >= 2:  # decades, every k-th of them; k such that the ticks stay few and the steps even
        step = next(k for k in (1, 2, 3, 5, 10, 20, 50, 100, 200) if (last - first) / k <= count)
        exponents = [e for e in range(first, last + 1) if e % step == 0]
        powers = any(not -3 <= e <= 3 for e in exponents)
        return [float(e) for e in exponents], [power_of_ten(e) if powers else f"{10.0**e:g}" for e in exponents]
    for multiples in ((1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        values = [m * 10.0**e for e in range(first - 1, last + 1) for m in multiples]
        values = [v for v in values if v > 0 and low <= math.log10(v) <= high]
        if len(values) >= 3:
            return [math.log10(v) for v in values], [f"{v:.4g}" for v in values]
    values, _ = _linear_ticks(10**low, 10**high, min(count, 4), integer=False)
    values = [v for v in values if v > 0]
    return [math.log10(v) for v in values], tick_labels(values)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move positions apart to a distance of at least `gap`, as little as possible, within limits and in order.

    >>> spread([10, 11, 50], gap=12, low=0, high=100)
    [4.5, 16.5, 50.0]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[float]] = []  # sum of (wanted - offset), members: least squares by pooling neighbors
    for rank, index in enumerate(order):
        groups.append([wanted[index] - rank * gap, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] >= groups[-1][0] / groups[-1][1]:
            total, members = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += members
    places: list[float] = []
    for total, members in groups:
        places += [total / members] * int(members)
    top = high - (len(wanted) - 1) * gap
    result = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        result[index] = min(max(places[rank], low), max(top, low)) + rank * gap
    return result
