"""Built-in tasks on real data, and tasks from a user's file."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from gramian.errors import GramianError, InputError, TaskError
from gramian.objective import Objective
from gramian.training import Task
from gramian.training.task import described

__all__ = ["TASKS", "Digits", "digits", "load", "plain_tanh_network"]

HELD_OUT = 0.3
BATCH_SIZE = 128


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 × 8 pixels in 0…1: is the digit odd, or (10 classes) which is it?"""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    @staticmethod
    def load(*, classes: int = 2, seed: int = 0) -> Digits:
        """The digits with 30 % held out; `seed` splits, the share of each digit kept."""
        if classes not in (2, 10):
            raise InputError(f"digits: classes must be 2 (odd or even) or 10 (which digit), got {classes}")
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError:
            raise TaskError("digits needs scikit-learn: pip install 'gramian[tasks]'") from None
        x, digit = load_digits(return_X_y=True)
        y = digit % 2 if classes == 2 else digit
        parts = train_test_split(x / 16, y, test_size=HELD_OUT, random_state=seed, stratify=digit)
        x_train, x_test = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
        y_train, y_test = (torch.tensor(part, dtype=torch.long) for part in parts[2:])
        return Digits(x_train, y_train, x_test, y_test)

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches of 128 in an order drawn from `generator`; a last smaller one is left out."""
        order = torch.randperm(len(self.x_train), generator=generator)
        for rows in order[: len(order) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
            yield self.x_train[rows], self.y_train[rows]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Share of held-out digits that the model gets right."""
        return {"accuracy": float((model(self.x_test).argmax(-1) == self.y_test).float().mean())}


def plain_tanh_network(depth: int, *, width: int = 64, inputs: int = 64, outputs: int = 2, seed: int = 0) -> nn.Module:
    """`depth` Linear layers with tanh between them, no skips and no norms, as PyTorch initializes them."""
    if depth < 2:
        raise InputError(f"a plain network needs at least 2 layers, got depth={depth}")
    sizes = [inputs, *[width] * (depth - 1)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [layer for m, n in pairwise(sizes) for layer in (nn.Linear(m, n), nn.Tanh())]
        return nn.Sequential(*layers, nn.Linear(width, outputs))


def digits(*, depth: int = 100, classes: int = 2, seed: int = 0) -> Task:
    """Handwritten digits with a plain tanh network of `depth` layers, 64 wide: hard to train because of its depth."""
    data = Digits.load(classes=classes, seed=seed)
    return Task(
        model=partial(plain_tanh_network, depth, outputs=classes, seed=seed),
        objective=Objective.classification(),
        train_batches=data.batches,
        evaluate=data.evaluate,
        name="digits" if classes == 2 else f"digits-{classes}",
    )


TASKS: dict[str, Callable[[], Task]] = {
    "digits": digits,
    "digits-10": partial(digits, classes=10),
}


def load(spec: str) -> Task:
    """A task by name, or from a file: `path/file.py:function`, where `function()` returns a `gm.Task`.

    The file is run as a program is: what lies beside it can be imported. A task without a name of its own is called
    after file and function. Raises `TaskError` with one line that names the place of a failure.
    """
    if spec in TASKS:
        return TASKS[spec]()
    path, colon, function = spec.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise TaskError(f"no task is named {spec!r}; built in: {', '.join(TASKS)}; or give path/file.py:function")
    if not Path(path).is_file():
        raise TaskError(f"task file {path} does not exist")
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        scope = runpy.run_path(path)
        if not callable(scope.get(function)):
            names = [k for k, v in scope.items() if callable(v) and not k.startswith("_") and not isinstance(v, type)]
            raise TaskError(f"{path} has no function {function!r}; it defines {', '.join(names) or 'none'}")
        task = scope[function]()
    except GramianError:
        raise
    except (Exception, SystemExit) as error:
        raise TaskError(f"task {spec} raised {described(error, path)}") from error
    if not isinstance(task, Task):
        raise TaskError(f"task {spec} returned {type(task).__name__}; wanted a gm.Task")
    return task if task.name != Task.name else replace(task, name=f"{Path(path).name}:{function}")
