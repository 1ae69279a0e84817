"""What goes into a training and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gramian.errors import TaskError
from gramian.objective import Objective

__all__ = ["Run", "Task"]


@dataclass(frozen=True)
class Task:
    """What to train on and how to tell whether it worked.

    Args:
        model: a factory of fresh models.
        objective: `gm.Objective`, or `loss(model, batch) -> scalar mean`.
        train_batches: `train_batches(epoch, generator)`, the batches of one epoch; the generator shuffles.
        evaluate: `evaluate(model) -> {"accuracy": …}`, held-out numbers by name.
        name: for reports.
    """

    model: Callable[[], nn.Module]
    objective: Objective | Callable[..., Any]
    train_batches: Callable[[int, torch.Generator], Iterable[Any]]
    evaluate: Callable[[nn.Module], dict[str, float]]
    name: str = "task"

    def batches(self, num: int | None = None) -> list[Any]:
        """The first `num` training batches (all of an epoch by default), in the order of epoch 0 and seed 0."""
        batches = []
        for batch in self.train_batches(0, torch.Generator().manual_seed(0)):
            if num is not None and len(batches) >= num:
                break
            batches.append(batch)
        if not batches:
            raise TaskError(f"task {self.name!r}: train_batches(0, generator) gave no batches")
        return batches


@dataclass
class Run:
    """A training: the model, what was measured on the way, and where it was written.

    `history` has one row for each evaluation: `step`, `seconds` (of training alone, without evaluation), `loss` (mean
    since the last row), and the task's numbers. `diverged` is set where the loss stopped being finite. `optimizer` is
    the name of the one that was taken, `lr` its learning rate and `rate` that of the last step; `init` says what was
    done to the model's own initialisation. `resumed` is the step from which it went on.
    """

    model: nn.Module
    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    diverged: bool = False
    out: Path | None = None
    optimizer: str = ""
    lr: float = 0.0
    rate: float = 0.0
    init: str = ""
    resumed: int = 0

    @property
    def metrics(self) -> dict[str, float]:
        """The last row of the history."""
        return self.history[-1] if self.history else {}
