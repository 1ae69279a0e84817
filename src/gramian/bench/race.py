"""Races of optimizers on equal seconds: what a step costs, the tuning of a rate, and the time to a target.

A run has a fixed number of steps, with warm-up and a linear decay to zero, as people train. How many steps an
optimizer gets in a budget follows from what its step costs against AdamW's, measured in turns; after that nothing
depends on the clock, so that a run can be repeated to the bit.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gramian.bench.competitors import Stepper
from gramian.bench.learning_tasks import LADDER, LearningTask
from gramian.objective import as_objective
from gramian.recording import evaluating
from gramian.report.files import write_text
from gramian.training import Task

__all__ = ["Contest", "Cost", "Make", "Runs", "clock", "costs", "grid", "held_out", "share_to_target"]

Make = Callable[[Any, float], Stepper]
"""`make(model, lr)`: a competitor with `rest_lr` filled in."""

WARMUP = 0.05
"""Share of a run's steps over which the rate rises to its highest, from which it falls linearly to zero."""

HALF_DECADE = 10**0.5
MOST_RATES = 9

TURNS, STEPS_A_TURN, UNTIMED_TURNS = 7, 4, 2
"""Steps whose cost is measured: whole cycles of a basis refreshed every ten or twenty, after eight that are not."""

STEEPEST = 2.0
"""Of the budgets beyond the ladder: a target that even its longest run missed counts as reached at so many budgets."""


def clock() -> float:
    """Seconds of the wall clock; on one thread, of the process, which a busy machine does not stretch."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def grid(score: Callable[[float], float], first: float) -> dict[float, float]:
    """Scores of half-decades by rate, from `first` outward until the best lies between two worse ones."""
    scores = {first: score(first)}
    while len(scores) < MOST_RATES:
        best = min(scores, key=lambda rate: (scores[rate], rate))
        outside = [rate for rate in (best / HALF_DECADE, best * HALF_DECADE) if not _known(rate, scores)]
        if not outside:
            break
        scores[outside[0]] = score(outside[0])
    return dict(sorted(scores.items()))


def _known(rate: float, scores: Mapping[float, float]) -> bool:
    return any(abs(math.log(rate / other)) < 1e-6 for other in scores)


class _Training:
    """A model, its optimizer, and its stream of batches."""

    def __init__(self, learning: LearningTask, make: Make, rate: float, seed: int) -> None:
        self.task = learning.make(seed)
        self.objective = as_objective(self.task.objective)
        self.model = self.task.model()
        self.model.train()
        self.optimizer = make(self.model, rate)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.batches = _stream(self.task, torch.Generator().manual_seed(seed))

    def differentiate(self) -> Tensor:
        """The loss of the next batch, whose gradients are set."""
        batch = next(self.batches)
        self.optimizer.zero_grad()
        total, units = self.objective.loss(self.model, batch)
        (total / units).backward()
        return total.detach()

    def step(self, share: float) -> None:
        """A step at `share` of the rates."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        self.optimizer.step()


def _stream(task: Task, generator: torch.Generator) -> Iterator[Any]:
    for epoch in count():
        yield from task.train_batches(epoch, generator)


def share_of_rate(step: int, steps: int) -> float:
    """The share of the highest rate at a step: a short rise, then linearly to zero.

    >>> [round(share_of_rate(step, 40), 3) for step in (0, 1, 2, 21, 39)]
    [0.5, 1.0, 1.0, 0.5, 0.026]
    """
    warm = max(1, round(WARMUP * steps))
    return min((step + 1) / warm, (steps - step) / max(steps - warm, 1), 1.0)


def held_out(learning: LearningTask, make: Make, rate: float, seed: int, steps: int) -> float:
    """The held-out number after a run of so many steps; infinite where it or a loss is not finite."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        training = _Training(learning, make, rate, seed)
        for step in range(steps):
            loss = training.differentiate()
            if step % 16 == 0 and not math.isfinite(float(loss)):
                return math.inf
            training.step(share_of_rate(step, steps))
        with evaluating(training.model), torch.no_grad():
            found = training.task.evaluate(training.model)[learning.metric]
    return found if math.isfinite(found) else math.inf


@dataclass(frozen=True)
class Cost:
    """Seconds of a step: those of batch, forward and backward, the same for all; and the optimizer's own, the mean."""

    around: float
    own: float

    @property
    def total(self) -> float:
        """The whole step's."""
        return self.around + self.own


def costs(learning: LearningTask, entries: Mapping[str, tuple[Make, float]], seed: int) -> dict[str, Cost]:
    """What a step of each costs, `{name: (make, rate)}`: all take turns, so that other load slows them alike.

    The own seconds are the mean without the slowest tenth, which another process caused.
    """
    trainings = {name: _Training(learning, make, rate, seed) for name, (make, rate) in entries.items()}
    around: list[float] = []
    own: dict[str, list[float]] = {name: [] for name in entries}
    for turn in range(-UNTIMED_TURNS, TURNS):
        for name, training in trainings.items():
            for _ in range(STEPS_A_TURN):
                start = clock()
                training.differentiate()
                middle = clock()
                training.step(1e-3)
                if turn >= 0:
                    around.append(middle - start)
                    own[name].append(clock() - middle)
    shared = statistics.median(around)
    return {name: Cost(shared, statistics.fmean(sorted(s)[: math.ceil(0.9 * len(s))])) for name, s in own.items()}


@dataclass
class Runs:
    """Held-out numbers of runs that were made, in the file `path` too, so that a race can be continued."""

    path: Path | None = None
    known: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            self.known = json.loads(self.path.read_text())

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """What is known under `key`, or measured and kept."""
        if key not in self.known:
            self.known[key] = measure()
            if self.path is not None:
                write_text(os.fspath(self.path), json.dumps(self.known, indent=0) + "\n")
        return self.known[key]


@dataclass
class Contest:
    """One competitor on one task: `steps` fill the budget. Numbers are medians over the seeds at the tuned rate."""

    task: str
    name: str
    learning: LearningTask
    make: Make
    steps: int
    runs: Runs
    tell: Callable[[str], None] = lambda what: None

    def measure(self, rate: float, seed: int, share: float = 1.0) -> float:
        """The held-out number of one run of `share` of the budget."""
        steps = max(1, round(share * self.steps))
        key = f"{self.task} | {self.name} | rate {rate:.4g} | seed {seed} | {steps} steps"

        def run() -> float:
            found = held_out(self.learning, self.make, rate, seed, steps)
            self.tell(f"{key}: {found:.4g}")
            return found

        return self.runs.get(key, run)

    def tune(self, start: float, seed: int) -> dict[float, float]:
        """The scores of a grid of rates, from the half-decade nearest to `start`."""
        return grid(lambda rate: self.measure(rate, seed), 10 ** (round(2 * math.log10(start)) / 2))

    def median(self, rate: float, seeds: Sequence[int], share: float = 1.0) -> float:
        """The median over the seeds of the held-out number at `share` of the budget."""
        return statistics.median(self.measure(rate, seed, share) for seed in seeds)


def share_to_target(number: Callable[[float], float], target: float) -> tuple[float, str]:
    """The share of the budget at which a run of its own ends at the target, and a remark where it is a bound.

    `number(share)` is what a run of that share ends at. The ladder is climbed, or descended, from its middle; between
    two rungs the logarithm of the number is taken to be linear in that of the share.

    >>> round(share_to_target(lambda share: 1 / share, 4.0)[0], 9), share_to_target(lambda share: 1.0, 2.0)
    (0.25, (0.125, 'at most'))
    """
    place = LADDER.index(0.5)
    numbers = {place: number(LADDER[place])}
    direction = -1 if numbers[place] <= target else 1
    while 0 <= place + direction < len(LADDER):
        place += direction
        numbers[place] = number(LADDER[place])
        if (numbers[place] <= target) != (direction < 0):
            break
    above = min((p for p in numbers if numbers[p] <= target), default=None)
    if above is None:
        return STEEPEST, "missed at 1.4 budgets, counted as"
    if above - 1 not in numbers:
        return LADDER[0], "at most"
    high, low = numbers[above - 1], numbers[above]
    if not math.isfinite(high) or low <= 0:
        return LADDER[above], "at most"
    part = math.log(high / target) / math.log(high / low)
    return LADDER[above - 1] * (LADDER[above] / LADDER[above - 1]) ** part, ""
