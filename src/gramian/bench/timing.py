"""Timing on a noisy machine: competitors run in turns, and medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Timing", "computing", "interleaved"]


@dataclass(frozen=True)
class Timing:
    """Seconds of one competitor, round by round, and what its last call returned."""

    seconds: tuple[float, ...]
    result: Any

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)


def interleaved(
    competitors: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every competitor once per round, for `repeats` rounds after an untimed one.

    A slow phase of the machine then affects all of them equally. The order rotates by one each round, so that no
    competitor always runs with cold caches. The `clock` tells seconds.

    >>> times = interleaved({"a": lambda: 1, "b": lambda: 2}, repeats=3)
    >>> times["b"].result, len(times["b"].seconds)
    (2, 3)
    """
    names = list(competitors)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    results: dict[str, Any] = {}
    for turn in range(-1, repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            results[name] = competitors[name]()
            if turn >= 0:
                seconds[name].append(clock() - start)
    return {name: Timing(tuple(seconds[name]), results[name]) for name in names}


def computing(competitors: Mapping[str, Callable[[], Any]], *, repeats: int = 5) -> dict[str, Timing]:
    """`interleaved` by the processor's time where torch has one thread, which other work on the machine hardly changes.

    With several threads the process's time would count those that wait in a loop, and it is the time of day.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    return interleaved(competitors, repeats=repeats, clock=clock)
