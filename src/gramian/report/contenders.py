"""The forms of a model that a compression compares, and what became of its layers, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["AS_CUT", "FOUR_BITS", "Contender", "PlannedLayer", "Ratio", "times"]

FOUR_BITS = "4 bits"
"""The name of the form in which all layers have integers of four bits."""

AS_CUT = "before the refit"
"""The name of the compressed model as the plan cuts it, where the one that is delivered is refit."""


class Ratio(NamedTuple):
    """How many times as fast one thing is measured to be as another.

    Attributes:
        median: of pairs that were measured one after the other.
        low: the lower end of an interval of 95 %.
        high: its upper end.
    """

    median: float
    low: float
    high: float

    @property
    def seen(self) -> bool:
        """Whether there is a difference at all: the interval excludes 1."""
        return self.low > 1 or self.high < 1

    @property
    def ends(self) -> str:
        """The interval."""
        return f"{times(self.low)}–{times(self.high)}"

    def __str__(self) -> str:
        return f"{times(self.median)}× ({self.ends})" if self.seen else f"no difference seen ({self.ends})"


@dataclass(frozen=True)
class Contender:
    """One form of the model: dense, compressed, bfloat16, int8.

    Args:
        name: of the form.
        parameters: how many.
        bytes: of its weights.
        quality: the held-out measure; `None` where it could not be evaluated.
        latency_one, latency_many: milliseconds of a forward pass, at batch 1 and at the larger batch.
        speed_one, speed_many: how many times as fast as the dense model it is, at batch 1 and at the larger batch.
        beside_one, beside_many: how many times as fast as the compressed model.
        note: why something was not measured, or what must be known of it.
        others: the evaluation's other numbers, such as those of a second domain.
    """

    name: str
    parameters: int | None
    bytes: int | None
    quality: float | None = None
    latency_one: float | None = None
    latency_many: float | None = None
    speed_one: Ratio | None = None
    speed_many: Ratio | None = None
    beside_one: Ratio | None = None
    beside_many: Ratio | None = None
    note: str = ""
    others: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of the model and what was decided about it.

    Args:
        name: of the module.
        shape: (m, n), empty where the layer could not be factored.
        rank: that it keeps; `None` where it stays dense.
        saved: parameters that it loses.
        why: the reason.
        energy: the share of what the layer means to the loss that it keeps; `None` where it stays as it is.
        units: of its input, how many heads, units or channels stay, and of how many; where the model is narrowed.
    """

    name: str
    shape: tuple[int, ...]
    rank: int | None
    saved: int
    why: str
    energy: float | None = None
    units: tuple[int, int] | None = None


def times(value: float) -> str:
    """How many times as fast, with three digits where it is below ten."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.0f}"
