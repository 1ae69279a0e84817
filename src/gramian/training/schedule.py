"""The budget of a run, and what depends on the share spent: the learning rate and when to evaluate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from gramian.errors import InputError, plain
from gramian.training.argument_errors import check, is_whole
from gramian.training.task import Run

__all__ = ["NUM_EVALUATIONS", "SCHEDULES", "WARMUP_STEPS", "Schedule", "as_budget", "check_warmup"]

# Evaluations in a run, evenly spread over its budget.
NUM_EVALUATIONS = 20

WARMUP_STEPS = 10

# Of a budget in seconds, the default warm-up takes no more than this share.
LARGEST_WARMUP = 0.1

# "step" and "plateau" divide the rate by these, "exponential" ends at its share of the rate.
STEP_FACTOR, PLATEAU_FACTOR, EXPONENTIAL_END = 0.1, 0.5, 0.01

# Evaluations without a smaller training loss after which "plateau" lowers the rate.
PLATEAU_EVALUATIONS = 2

# Steps or epochs: a trillion of them would take centuries, and so is a mistake.
MOST = 10**12


def _plateaus(share: float, losses: Sequence[float]) -> float:
    """A factor for each time that the loss of the last evaluations was no better than the best before."""
    factor, best, waited = 1.0, math.inf, 0
    for loss in losses:
        waited = 0 if loss < best else waited + 1
        best = min(best, loss) if math.isfinite(loss) else best
        if waited == PLATEAU_EVALUATIONS:
            factor, waited = factor * PLATEAU_FACTOR, 0
    return factor


# The factor of the learning rate after the warm-up, by the share of the budget that is spent and the training losses at
# the evaluations so far. Pure functions: a resumed run has nothing to restore.
SCHEDULES: dict[str, Callable[[float, Sequence[float]], float]] = {
    "linear": lambda share, losses: 1 - share,
    "constant": lambda share, losses: 1.0,
    "cosine": lambda share, losses: (1 + math.cos(math.pi * share)) / 2,
    "step": lambda share, losses: STEP_FACTOR ** min(2, math.floor(3 * share + 1e-9)),
    "exponential": lambda share, losses: EXPONENTIAL_END**share,
    "plateau": _plateaus,
}


def as_budget(steps: int | None, epochs: int | None, seconds: float | None) -> tuple[str, float]:
    """Return the one budget that is given, as its kind and amount."""
    given = {k: v for k, v in (("steps", steps), ("epochs", epochs), ("seconds", seconds)) if v is not None}
    if len(given) != 1:
        raise InputError(f"train: give one of steps=, epochs=, seconds=; got {', '.join(given) or 'none'}")
    ((kind, amount),) = given.items()
    if kind == "steps":
        check(kind, amount, is_whole, "a whole number")
    check(kind, amount, lambda x: not isinstance(x, bool) and x > 0, "positive")
    if kind != "seconds" and amount > MOST:
        raise InputError(f"train: {kind} must be at most {MOST:,}, got {plain(amount, 30)}")
    if not math.isfinite(amount):
        raise InputError(f"train: {kind} must be finite, got {amount}. To train until you stop it, give a large number")
    return kind, amount


def num_steps(budget: tuple[str, float], batches_per_epoch: int, accumulate: int) -> int:
    """Return the steps of a budget; 0 where they are not known: with seconds, or an epoch of unknown length."""
    kind, amount = budget
    if kind == "seconds":
        return 0
    return math.ceil(amount * batches_per_epoch / accumulate if kind == "epochs" else amount)


def check_warmup(warmup: int | None, budget: tuple[str, float], batches_per_epoch: int, accumulate: int) -> None:
    """Raise `InputError` for a warm-up that was asked for and is longer than the run, where its steps are known."""
    steps = num_steps(budget, batches_per_epoch, accumulate)
    if warmup is not None and 0 < steps < warmup:
        raise InputError(
            f"train: warmup is {warmup:,} steps, and the run has {steps:,}, so that the rate would never be reached. "
            "Give fewer"
        )


class Schedule:
    """A run's budget, learning rate, and times of evaluation.

    Args:
        kind, amount: the budget.
        optimizer: its groups' rates are those that the schedule multiplies.
        name: of `SCHEDULES`.
        warmup: steps over which the rate rises at the beginning; where none is given, 10.
        accumulate: batches in a step.
    """

    def __init__(
        self,
        kind: str,
        amount: float,
        optimizer: torch.optim.Optimizer,
        *,
        name: str = "linear",
        warmup: int | None = None,
        accumulate: int = 1,
    ) -> None:
        self.kind, self.amount, self.optimizer = kind, amount, optimizer
        self.factor, self.accumulate = SCHEDULES[name], accumulate
        self.asked_warmup, self.warmup = warmup, WARMUP_STEPS if warmup is None else warmup
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.set_epoch(0)
        self.evaluations = 0
        self._losses: list[float] = []  # of the history

    def set_epoch(self, num_batches: int) -> None:
        """Note how many batches an epoch has; 0 where that is not known, as before the first one is counted."""
        self.batches_per_epoch = num_batches
        self.steps = num_steps((self.kind, self.amount), num_batches, self.accumulate)

    def share(self, run: Run) -> float:
        """Return the share of the budget that is spent; 1 at the end."""
        if self.kind == "seconds":
            return min(1.0, run.seconds / self.amount)
        return min(1.0, run.steps / self.steps) if run.steps else 0.0

    def num_batches(self, run: Run) -> int:
        """Return how many batches the next step takes: fewer where an epoch's end is that of the budget."""
        if self.kind != "epochs" or not self.batches_per_epoch:
            return self.accumulate
        left = math.ceil(self.amount * self.batches_per_epoch) - run.steps * self.accumulate
        return max(1, min(self.accumulate, left))

    def set_rates(self, run: Run, share: float) -> None:
        """Set each group's learning rate for the next step, at this share of the budget."""
        factor = min(1.0, (run.steps + 1) / self.warmup) if self.warmup else 1.0
        if self.kind == "seconds" and self.asked_warmup is None:  # steps may take so long that there are fewer
            factor = max(factor, min(1.0, share / LARGEST_WARMUP))
        if len(run.history) != len(self._losses):
            self._losses = [row["loss"] for row in run.history]
        factor *= self.factor(share, self._losses)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        run.rate = run.lr * factor

    def due(self, share: float) -> bool:
        """Whether the run, at this share of its budget, passed another twentieth since the last evaluation."""
        passed = math.floor(share * NUM_EVALUATIONS + 1e-9)
        if passed <= self.evaluations:
            return False
        self.evaluations = passed
        return True
