"""Built-in tasks on real data, and tasks from a user's file."""

from __future__ import annotations

import ast
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
    """scikit-learn's 1,797 handwritten digits of 8 × 8 pixels, labeled odd or even, or (10 classes) by digit.

    Args:
        x_train, x_test: `(samples, 64)`, pixels from 0 to 1.
        y_train, y_test: `(samples,)`, classes.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    @staticmethod
    def load(*, classes: int = 2, seed: int = 0) -> Digits:
        """Return the digits with 30 % held out, and each digit's share the same in both parts.

        Args:
            classes: 2 (is the digit odd?) or 10 (which digit?).
            seed: of the split.
        """
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
        """Yield training batches of 128 in random order; the last, smaller batch is left out.

        Args:
            epoch: not used: the generator alone determines the order.
            generator: for shuffling.
        """
        order = torch.randperm(len(self.x_train), generator=generator)
        for rows in order[: len(order) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
            yield self.x_train[rows], self.y_train[rows]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the share of held-out digits that the model classifies correctly."""
        return {"accuracy": float((model(self.x_test).argmax(-1) == self.y_test).float().mean())}


def plain_tanh_network(depth: int, *, width: int = 64, inputs: int = 64, outputs: int = 2, seed: int = 0) -> nn.Module:
    """Return a plain network: Linear layers with tanh between them, no skips or norms, in PyTorch's initialization.

    Args:
        depth: number of Linear layers, at least 2.
        width: of the hidden layers.
        inputs, outputs: of the network.
        seed: of the initialization.
    Returns: the network.
    Raises:
        InputError: a depth below 2.
    Cost: the random numbers of its weights.
    Source: this library's own.

    >>> len(plain_tanh_network(3))
    5
    """
    if depth < 2:
        raise InputError(f"a plain network needs at least 2 layers, got depth={depth}")
    sizes = [inputs, *[width] * (depth - 1)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [layer for m, n in pairwise(sizes) for layer in (nn.Linear(m, n), nn.Tanh())]
        return nn.Sequential(*layers, nn.Linear(width, outputs))


def digits(*, depth: int = 100, classes: int = 2, seed: int = 0) -> Task:
    """Return a task that is hard because of its depth: handwritten digits with a plain tanh network of width 64.

    Args:
        depth: number of layers.
        classes: 2 (is the digit odd?) or 10 (which digit?).
        seed: of the split and the initialization.
    Returns: the task.
    Raises:
        InputError: another number of classes.
        TaskError: scikit-learn is not installed.
    Cost: reading the digits, a tenth of a second.
    Source: scikit-learn's `load_digits`.

    >>> digits(depth=10).name
    'digits'
    """
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


def load(spec: str, *, write: str = "{}") -> Task:
    """Return a built-in task by name, or a task from a file: `path/file.py:function`, which returns a `gm.Task`.

    The file is run like a program, and can import modules beside it. A task without a name is named after its file and
    function.

    Args:
        spec: a key of `TASKS`, or `path/file.py:function`.
        write: for errors: how a spec is written, as in "gramian train {}".
    Returns: the task.
    Raises:
        TaskError: there is no such task, or its function failed; the message has the line.
    Cost: that of running the file.
    Source: this library's own.

    >>> load("digits-10").name
    'digits-10'
    """
    if spec in TASKS:
        return TASKS[spec]()
    path, colon, function = spec.rpartition(":")
    if spec.endswith(".py"):
        raise TaskError(_without_function(spec, write))
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
        model = ". Put the model into one: gm.Task(lambda: model, objective, train_loader, evaluate)"
        raise TaskError(
            f"task {spec} returned {type(task).__name__}; wanted a gm.Task{model * isinstance(task, nn.Module)}"
        )
    return task if task.name != Task.name else replace(task, name=f"{Path(path).name}:{function}")


def _without_function(path: str, write: str) -> str:
    """The error for a file whose function was not named: those that may return a task, read without running it."""
    if not Path(path).is_file():
        return f"task file {path} does not exist"
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"), path)
    except (SyntaxError, UnicodeDecodeError) as error:
        return f"task file {path} is not Python: {described(error, path)}"
    functions = [f for f in tree.body if isinstance(f, ast.FunctionDef) and not f.name.startswith("_")]
    free = [f for f in functions if len(f.args.defaults) >= len(f.args.posonlyargs + f.args.args) and not _wants(f)]
    likely = [f.name for f in free if _names_task(f)] or [f.name for f in free]
    if len(likely) == 1:
        return f"{path} is a file; name its function that returns the task: {write.format(f'{path}:{likely[0]}')}"
    known = f"one of {', '.join(likely)}, as in {write.format(f'{path}:{likely[0]}')}" if likely else "but it has none"
    return f"{path} is a file; name its function that returns the task: {known}"


def _wants(function: ast.FunctionDef) -> bool:
    """Whether a keyword-only argument has no default."""
    return None in function.args.kw_defaults


def _names_task(function: ast.FunctionDef) -> bool:
    """Whether a function returns a `Task` by its annotation, or makes one."""
    makes = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    found = [node for node in (function.returns, *makes) if node is not None]
    return any(ast.unparse(node).strip("'").split(".")[-1] == "Task" for node in found)
