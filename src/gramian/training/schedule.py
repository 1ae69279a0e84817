"""The budget of a run, and what depends on the share spent: the learning rate and when to evaluate."""

from __future__ import annotations

import math

import torch

from gramian.errors import InputError
from gramian.training.task import Run

__all__ = ["NUM_EVALUATIONS", "WARMUP_STEPS", "Schedule", "as_budget"]

# Evaluations in a run, evenly spread over its budget.
NUM_EVALUATIONS = 20

WARMUP_STEPS = 10


def as_budget(steps: int | None, epochs: int | None, seconds: float | None) -> tuple[str, float]:
    """Return the one budget that is given, as its kind and amount."""
    given = {k: v for k, v in (("steps", steps), ("epochs", epochs), ("seconds", seconds)) if v is not None}
    if len(given) != 1:
        raise InputError(f"train: give one of steps=, epochs=, seconds=; got {', '.join(given) or 'none'}")
    ((kind, amount),) = given.items()
    if not amount > 0:
        raise InputError(f"train: {kind} must be positive, got {amount}")
    return kind, amount


class Schedule:
    """A run's budget, learning rate, and times of evaluation."""

    def __init__(self, kind: str, amount: float, optimizer: torch.optim.Optimizer) -> None:
        self.kind, self.amount, self.optimizer = kind, amount, optimizer
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.batches_per_epoch = 0
        self.evaluations = 0

    def share(self, run: Run) -> float:
        """Return the share of the budget that is spent; 1 at the end."""
        if self.kind == "seconds":
            return min(1.0, run.seconds / self.amount)
        total = self.amount * self.batches_per_epoch if self.kind == "epochs" else self.amount
        return min(1.0, run.steps / math.ceil(total)) if run.steps else 0.0

    def set_rates(self, run: Run) -> None:
        """Set each group's learning rate for the next step."""
        factor = min(1.0, (run.steps + 1) / WARMUP_STEPS) * (1 - self.share(run))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        run.rate = run.lr * factor

    def due(self, run: Run) -> bool:
        """Whether the run passed another twentieth of its budget since the last evaluation."""
        passed = math.floor(self.share(run) * NUM_EVALUATIONS + 1e-9)
        if passed <= self.evaluations:
            return False
        self.evaluations = passed
        return True
