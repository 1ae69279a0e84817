"""What goes into a training and what comes out of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gramian.errors import GramianError, TaskError
from gramian.objective import Objective

__all__ = ["Run", "Task", "asking", "described"]

LIBRARY = str(Path(__file__).parents[1])


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
        with asking(self, "train_batches(0, generator)"):
            batches = list(islice(self.train_batches(0, torch.Generator().manual_seed(0)), num))
        if not batches:
            raise TaskError(f"task {self.name!r}: train_batches(0, generator) gave no batches")
        return batches


@dataclass
class Run:
    """A training: the model, what was measured on the way, and where it was written.

    `history` has one row for each evaluation: `step`, `seconds` (of training alone, without evaluation), `loss` (mean
    since the last row), and the task's numbers. `diverged` is set where the loss stopped being finite. `optimizer` is
    the name of the one that was taken, `lr` its learning rate and `rate` that of the last step; `init` says what was
    done to the model's own initialization. `resumed` is the step from which it went on.
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


@contextmanager
def asking(task: Task, function: str) -> Iterator[None]:
    """Inside, a function of the task is called: what it raises becomes a `TaskError` of one line."""
    try:
        yield
    except GramianError:
        raise
    except Exception as error:
        raise TaskError(f"task {task.name!r}: {function} raised {described(error)}") from error


def described(error: BaseException, path: str | None = None) -> str:
    """The error's type, message, and the last line of the user's file that it passed through.

    The file is `path`, or the first one outside of this library.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if path is None:
        path = next((frame.filename for frame in frames if not frame.filename.startswith(LIBRARY)), "")
    lines = [frame.lineno for frame in frames if frame.filename == path]
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" + (f" (line {lines[-1]})" if lines else "")
