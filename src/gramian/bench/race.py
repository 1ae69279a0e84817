"""Training until a held-out target: one run, the tuning of its rate, and races of several runs in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor

from gramian.bench.competitors import Stepper
from gramian.bench.learning_tasks import RATES, LearningTask
from gramian.objective import as_objective
from gramian.recording import evaluating
from gramian.training import WARMUP_STEPS, Task

__all__ = ["Result", "Run", "Score", "clock", "order_of_rates", "race", "tune"]

Make = Callable[[Any, float], Stepper]
"""`make(model, lr)`: a competitor with `rest_lr` filled in."""

STALLED = 1 / 3
"""Share of its seconds after which a run that is not half-way from where it began to the target is given up."""

PATIENCE = 2
"""Rates in a row that do no better, after which tuning leaves that side of the grid."""

NO_LIMIT = 2**31


def clock() -> float:
    """Seconds of the wall clock; on one thread, of the process, which a busy machine does not stretch."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@dataclass(frozen=True)
class Result:
    """How a run ended.

    `ended` is `"target"`, `"time"`, `"stalled"` (never half-way in a third of the time), `"steps"` (as many as were
    allowed) or `"not finite"`; `seconds` are of training alone, `median_step` and `mean_step` seconds of one step:
    batch, forward, backward and optimizer.
    """

    rate: float
    seed: int
    ended: str
    steps: int
    seconds: float
    median_step: float
    mean_step: float
    held_out: float

    @property
    def reached(self) -> bool:
        """Whether it reached the target."""
        return self.ended == "target"


@dataclass
class Run:
    """One training run: `advance()` until it has `ended`.

    The rate rises over the first 10 steps and then stays. Only the target on held-out data stops a run early;
    evaluations are not timed.
    """

    learning: LearningTask
    make: Make
    rate: float
    seed: int
    max_steps: int = NO_LIMIT
    ended: str = ""
    held_out: float = math.inf
    best: float = math.inf
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.task = self.learning.make(self.seed)
        self.objective = as_objective(self.task.objective)
        self.model = self.task.model()
        self.model.train()
        self.optimizer = self.make(self.model, self.rate)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.batches = _stream(self.task, torch.Generator().manual_seed(self.seed))
        self.half_way = (self._evaluate() + self.learning.target) / 2

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return sum(self.times)

    def advance(self) -> None:
        """Trains until the next evaluation, and evaluates."""
        loss = torch.zeros(())
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed + len(self.times))  # for dropout: runs take turns
            for _ in range(min(self.learning.every, self.max_steps - len(self.times))):
                start = clock()
                loss = self._step()
                self.times.append(clock() - start)
        if not math.isfinite(float(loss)):
            self.ended = "not finite"
            return
        self.held_out = self._evaluate()
        self.best = min(self.best, self.held_out)
        if self.held_out <= self.learning.target:
            self.ended = "target"
        elif not math.isfinite(self.held_out):
            self.ended = "not finite"
        elif len(self.times) >= self.max_steps:
            self.ended = "steps"
        elif self.seconds >= self.learning.limit:
            self.ended = "time"
        elif self.seconds >= self.learning.limit * STALLED and self.best > self.half_way:
            self.ended = "stalled"

    def _evaluate(self) -> float:
        with evaluating(self.model), torch.no_grad():
            return self.task.evaluate(self.model)[self.learning.metric]

    def _step(self) -> Tensor:
        batch = next(self.batches)
        warm = min(1.0, (len(self.times) + 1) / WARMUP_STEPS)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * warm
        self.optimizer.zero_grad()
        total, units = self.objective.loss(self.model, batch)
        (total / units).backward()
        self.optimizer.step()
        return total.detach()

    def result(self) -> Result:
        """How it ended."""
        median, mean = statistics.median(self.times), statistics.fmean(self.times)
        return Result(self.rate, self.seed, self.ended, len(self.times), self.seconds, median, mean, self.held_out)


def _stream(task: Task, generator: torch.Generator) -> Iterator[Any]:
    for epoch in count():
        yield from task.train_batches(epoch, generator)


def order_of_rates(start: float, rates: Sequence[float] = RATES) -> tuple[list[float], list[float]]:
    """The rates from the one nearest to `start` upwards, and those below it downwards.

    >>> order_of_rates(0.01, (0.001, 0.01, 0.1, 1.0))
    ([0.01, 0.1, 1.0], [0.001])
    """
    first = min(range(len(rates)), key=lambda i: abs(math.log(rates[i] / start)))
    return list(rates[first:]), list(rates[:first][::-1])


def tune(
    learning: LearningTask,
    make: Make,
    start: float,
    *,
    seed: int,
    rates: Sequence[float] = RATES,
    tell: Callable[[str], None] = lambda what: None,
) -> tuple[Result | None, list[Result]]:
    """The run of the grid that reaches the target in the fewest steps, and all runs; `None` where none reaches it.

    A step costs the same at every rate, so fewest steps is least time, without the clock's noise. Rates are tried from
    `start` outwards, sides in turn; no run gets more steps than the best so far took, and a side is left after two
    rates in a row that did no better than one nearer to the start. Until a first run has reached the target, no side is
    left.
    """
    up, down = order_of_rates(start, rates)
    sides, failures = [up, down], [0, 0]
    best: Result | None = None
    tried: list[Result] = []
    turn = 0
    while any(sides):
        turn = turn if sides[turn] else 1 - turn
        rate = sides[turn].pop(0)
        run = Run(learning, make, rate, seed, NO_LIMIT if best is None else best.steps)
        while not run.ended:
            run.advance()
        result = run.result()
        tried.append(result)
        tell(f"{rate:g}: {result.ended} after {result.steps} steps, {result.seconds:.1f} s, at {result.held_out:.4g}")
        better = result.reached and (best is None or result.steps < best.steps)
        if better:
            best = result
        failures[turn] = 0 if better else failures[turn] + 1
        if best is not None and failures[turn] >= PATIENCE:
            sides[turn] = []
        turn = 1 - turn
    return best, tried


@dataclass(frozen=True)
class Score:
    """One competitor's runs at its best rate, one number for each seed.

    `seconds` are the steps times the mean step while all competitors were still racing in turns, so that other load on
    the machine slowed all of them alike. `own_seconds` is what the run itself took. A run that missed the target counts
    with the steps and seconds after which it was stopped, which is too little.
    """

    seconds: tuple[float, ...]
    own_seconds: tuple[float, ...]
    steps: tuple[int, ...]
    num_reached: int
    median_step: float
    mean_step: float

    @property
    def median_seconds(self) -> float:
        """The median over the seeds."""
        return statistics.median(self.seconds)

    @property
    def median_steps(self) -> float:
        """The median over the seeds."""
        return statistics.median(self.steps)

    def as_text(self) -> str:
        """Steps and seconds by seed, and the median and mean step in ms."""
        steps = "/".join(f"{s}" for s in self.steps)
        own = "/".join(f"{s:.3g}" for s in self.own_seconds)
        step = f"median {1e3 * self.median_step:.3g}, mean {1e3 * self.mean_step:.3g} ms"
        missed = len(self.steps) - self.num_reached
        return f"{steps} steps; step {step}; own clock {own} s" + (f"; {missed} missed the target" if missed else "")


def race(
    learning: LearningTask,
    entries: Mapping[str, tuple[Make, float]],
    *,
    seeds: Sequence[int],
    tell: Callable[[str], None] = lambda what: None,
) -> dict[str, Score]:
    """Every competitor at its rate, `{name: (make, rate)}`, on every seed: all take turns, `every` steps each."""
    runs: dict[str, list[Run]] = {name: [] for name in entries}
    shared: dict[str, list[float]] = {name: [] for name in entries}
    for seed in seeds:
        running = {name: Run(learning, make, rate, seed) for name, (make, rate) in entries.items()}
        while not all(run.ended for run in running.values()):
            for run in running.values():
                if not run.ended:
                    run.advance()
        together = min(len(run.times) for run in running.values())
        for name, run in running.items():
            runs[name].append(run)
            shared[name] += run.times[:together]
            tell(f"seed {seed}: {name}: {run.ended} after {len(run.times)} steps, {run.seconds:.1f} s")
    return {name: _score(runs[name], shared[name]) for name in entries}


def _score(runs: Sequence[Run], shared: Sequence[float]) -> Score:
    mean, median = statistics.fmean(shared), statistics.median(shared)
    steps = tuple(len(run.times) for run in runs)
    reached = sum(run.ended == "target" for run in runs)
    return Score(tuple(s * mean for s in steps), tuple(run.seconds for run in runs), steps, reached, median, mean)
