"""Which share to keep: found by bisection on held-out quality, or on latency that is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gramian.autograd import Ungraded
from gramian.compression.storage.plans import AnyPlan
from gramian.compression.units.narrow_plan import NarrowPlan
from gramian.errors import InputError
from gramian.report.contenders import Ratio

__all__ = ["Quality", "Tried", "by_drop", "by_speed", "shares"]

HALVINGS = 6
"""Steps of a bisection between shares, by their ratio: from 1/50 to 1 the share is found to 6 %."""

GRIDS: dict[str, tuple[float, ...]] = {
    "keep": (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1),
    "size": (0.5, 0.3, 0.25, 0.22, 0.19, 0.16, 0.13, 0.1, 0.07),
}
"""Shares of parameters or bytes at which the curve of quality is measured, as far as they are possible."""


@dataclass(frozen=True)
class Quality:
    """One held-out number of a task, and which direction of it is better.

    Where it is not said, the direction is that of the damage: what the number does when the model keeps the least that
    is possible. From its name it would have to be guessed.

    Args:
        evaluate: `evaluate(model)`, the numbers by name.
        measure: the name of the one that counts.
        dense: its value for the model as it came.
        sign: +1 where higher is better, −1 where lower is, 0 where the damage left it as it was.
    """

    evaluate: Callable[[nn.Module], Mapping[str, float]]
    measure: str
    dense: float
    sign: int = 0

    @property
    def better(self) -> str:
        """The direction in a word."""
        return {1: "higher", -1: "lower", 0: ""}[self.sign]

    def of(self, model: nn.Module) -> float:
        """The number for a model."""
        return self.all_of(model)[self.measure]

    def all_of(self, model: nn.Module) -> dict[str, float]:
        """All numbers for a model, this one first."""
        return measured(self.evaluate, model, self.measure)

    def drop(self, value: float) -> float:
        """How much worse than the dense model a value is; infinite where it is not finite."""
        return self.sign * (self.dense - value) if math.isfinite(value) else math.inf


@dataclass
class Tried:
    """The shares that were evaluated.

    Args:
        plan: at any share.
        quality: what is evaluated.
        points: the held-out number by share.
        tell: called with the share and its number.
        budget: what a share is of: "keep" of the parameters, "size" of the bytes.
    """

    plan: AnyPlan
    quality: Quality
    points: dict[float, float] = field(default_factory=dict)
    tell: Callable[[float, float], None] = lambda share, value: None
    budget: str = "keep"

    def __call__(self, share: float) -> float:
        """The held-out number at a share, evaluated once."""
        if share not in self.points:
            self.points[share] = self.quality.of(self.at(share).apply())
            self.tell(share, self.points[share])
        return self.points[share]

    def at(self, share: float) -> AnyPlan:
        """The plan at a share."""
        return self.plan.at(**{self.budget: share})  # type: ignore[arg-type]


def measured(evaluate: Callable[[nn.Module], Any], model: nn.Module, measure: str = "") -> dict[str, float]:
    """The held-out numbers of a model in evaluation mode, the one that counts first: that asked for, or the first.

    Raises:
        InputError: the evaluation gave no such number.
    """
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            numbers = Ungraded()(evaluate, model)
    finally:
        model.train(was)
    if not isinstance(numbers, Mapping) or not numbers:
        raise InputError(f"compress: the task's evaluate must return numbers by name, got {numbers!r:.60}")
    name = measure or next(iter(numbers))
    if name not in numbers:
        raise InputError(f"compress: the task's evaluate gives no {name!r}; choose one of {', '.join(numbers)}")
    return {key: float(numbers[key]) for key in (name, *(key for key in numbers if key != name))}


def shares(plan: AnyPlan, budget: str = "keep") -> list[float]:
    """The shares of the curve, from large to small."""
    least = smallest(plan, budget)
    return [1.0, *(share for share in GRIDS[budget] if share > least), *([least] if least < 1 else [])]


def smallest(plan: AnyPlan, budget: str) -> float:
    """The smallest possible share."""
    return plan.smallest if budget == "keep" or isinstance(plan, NarrowPlan) else plan.smallest_size


def judged(
    plan: AnyPlan,
    evaluate: Callable[[nn.Module], Mapping[str, float]],
    measure: str = "",
    better: str = "",
    budget: str = "keep",
) -> Tried:
    """The quality of the dense model, and of the smallest plan, which tells the direction where `better` does not.

    Raises:
        InputError: the dense model's number is not finite, or there is none.
    """
    name, dense = next(iter(measured(evaluate, plan.model, measure).items()))
    if not math.isfinite(dense):
        raise InputError(f"compress: {name} of the model as it came is {dense}; gm.inspect finds where that begins")
    least = smallest(plan, budget)
    damaged = Quality(evaluate, name, dense).of(plan.at(**{budget: least}).apply())  # type: ignore[arg-type]
    unmoved = damaged == dense or (not better and not math.isfinite(damaged))
    sign = 0 if unmoved else {"higher": 1, "lower": -1}.get(better) or (1 if damaged < dense else -1)
    return Tried(plan, Quality(evaluate, name, dense, sign), {1.0: dense, least: damaged}, budget=budget)


def by_drop(tried: Tried, max_drop: float) -> float:
    """The smallest share, to a few per cent of itself, whose held-out number is at most `max_drop` worse.

    Raises:
        InputError: no share below 1 is good enough, with the best that was tried.
    """
    low, high = smallest(tried.plan, tried.budget), 1.0
    if tried.quality.drop(tried(low)) <= max_drop:
        return low
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        if tried.quality.drop(tried(middle)) <= max_drop:
            high = middle
        else:
            low = middle
    if high == 1.0:
        keep = max(k for k in tried.points if k < 1)
        raise InputError(
            f"compress: no share below 1 loses at most {max_drop:g} of {tried.quality.measure}; keeping {keep:.3f} "
            f"loses {tried.quality.drop(tried.points[keep]):.4g}. Allow more, or quantize the model instead"
        )
    return high


def by_speed(
    plan: AnyPlan, speed: Callable[[nn.Module], Ratio], wanted: float, tell: Callable[[float, Ratio], None]
) -> float:
    """The largest share, to a few per cent of itself, whose model is measured to be `wanted` times as fast.

    Args:
        plan: at any share.
        speed: how many times as fast as the dense model a model is, measured.
        wanted: at least this, and the interval has to exclude 1.
        tell: called with each share and its speed.

    Raises:
        TooSlowError: no share of the curve is fast enough; it has the best that was reached.
    """
    speeds: dict[float, Ratio] = {}

    def reached(keep: float) -> bool:
        found = speed(plan.at(keep=keep).apply())
        speeds[keep] = min(found, speeds.get(keep, found))
        tell(keep, found)
        return found.median >= wanted and found.low > 1

    # The smallest is usually the fastest, but not where its overhead counts more than its arithmetic.
    low, high = next((keep for keep in reversed(shares(plan)[1:]) if reached(keep)), None), 1.0
    if low is not None:
        for _ in range(HALVINGS):
            middle = math.sqrt(low * high)
            if reached(middle):
                low = middle
            else:
                high = middle
        # Measured again, since the best of several noisy figures is too good.
        for keep in sorted((k for k, found in speeds.items() if found.median >= wanted), reverse=True):
            if reached(keep):
                return keep
    best = max(speeds, key=lambda k: speeds[k])
    raise TooSlowError(best, speeds[best])


class TooSlowError(InputError):
    """No share is fast enough: the share that was fastest, and how fast it is."""

    def __init__(self, keep: float, speed: Ratio) -> None:
        super().__init__(f"compress: the best is {speed}, keeping {keep:.3f}")
        self.keep, self.speed = keep, speed
