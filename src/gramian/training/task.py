"""The input and the output of training: `Task` and `Run`."""

from __future__ import annotations

import html
import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gramian.errors import GramianError, InputError, TaskError, plain
from gramian.loader import as_batches
from gramian.misuse import known_names
from gramian.objective import Objective
from gramian.report import Document, HeatMap, Picture, Section, Table
from gramian.report.serial import jsonable
from gramian.rows import Rows
from gramian.training.interrupts import is_interruption

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Run", "Task", "as_numbers", "as_task", "calling", "described", "is_of_user", "named"]

LIBRARY = str(Path(__file__).parents[1])

STDLIB = str(Path(traceback.__file__).parent)

PACKAGES = {"site-packages", "dist-packages"}

LONGEST = 500  # characters of an error's message


@dataclass(frozen=True)
class Task:
    """What to train: a model, an objective, training batches, and an evaluation on held-out data.

    Args:
        model: a function that returns a fresh model.
        objective: `gm.Objective`, or `loss(model, batch) -> scalar mean`.
        train_batches: `train_batches(epoch, generator)` gives the batches of one epoch; the generator is for shuffling.
            Or what gives them in every epoch: a `DataLoader` or a list.
        evaluate: `evaluate(model) -> {"accuracy": …}` returns held-out numbers by name. Names but `loss`, `step` and
            `seconds`, which are the run's own: `held_out_loss`.
        name: for reports.
        source: what tells the task from others when a run is resumed, as its file's path and function; by default its
            name.
        pictures: `pictures(model)` draws what the model does, for the report of a run; side by side.
    """

    model: Callable[[], nn.Module]
    objective: Objective | Callable[..., Any]
    train_batches: Callable[[int, torch.Generator], Iterable[Any]]
    evaluate: Callable[[nn.Module], dict[str, float]]
    name: str = "task"
    source: str = ""
    pictures: Callable[[nn.Module], Sequence[Picture | HeatMap | Table]] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.model, nn.Module) or not callable(self.model):
            raise TaskError(
                f"{named(self)}: model must be a function that returns a fresh model, got "
                f"{_kind(self.model)}. Write model=lambda: {type(self.model).__name__}(…), or model=the class"
            )
        if not callable(self.train_batches):
            given = as_batches(self.train_batches, named(self))
            if isinstance(given, Iterator):
                raise TaskError(
                    f"{named(self)}: train_batches is {_kind(given)}, which serves one epoch only. Pass a "
                    "DataLoader, list(...), or a function train_batches(epoch, generator) that makes it"
                )
            object.__setattr__(self, "train_batches", lambda epoch, generator: given)
        elif not _takes_two(self.train_batches):
            name = getattr(self.train_batches, "__name__", "function").replace("<lambda>", "…")
            raise TaskError(
                f"{named(self)}: train_batches must take the epoch and a generator for shuffling. Write "
                f"def train_batches(epoch, generator): …, or train_batches=lambda epoch, generator: {name}()"
            )
        for field_name in ("name", "source"):
            if not isinstance(getattr(self, field_name), str):
                raise TaskError(f"task: {field_name} must be text, got {getattr(self, field_name)!r}")
        if self.pictures is not None and not callable(self.pictures):
            raise TaskError(
                f"{named(self)}: pictures must be a function pictures(model) -> [gm.report.Picture, …], got "
                f"{_kind(self.pictures)}"
            )
        if not callable(self.evaluate):
            raise TaskError(
                f"{named(self)}: evaluate must be a function evaluate(model) -> {{'accuracy': …}}, got "
                f"{_kind(self.evaluate)}"
            )

    def __repr__(self) -> str:
        made = getattr(self.model, "func", self.model)  # of a partial function
        name = getattr(made, "__qualname__", type(made).__name__).rpartition(".<locals>.")[2]
        loss = self.objective if isinstance(self.objective, Objective) else getattr(self.objective, "__name__", "loss")
        return f"<Task {self.name!r}: model {name}, {loss}>"

    def batches(self, num: int | None = None) -> list[Any]:
        """Return the first `num` training batches (by default all) of epoch 0, shuffled with seed 0."""
        with calling(self, "train_batches(0, generator)"):
            batches = list(islice(self.train_batches(0, torch.Generator().manual_seed(0)), num))
        if not batches:
            raise TaskError(f"{named(self)}: train_batches(0, generator) gave no batches")
        return batches


Task.__init__ = known_names("Task", batches="train_batches", loader="train_batches", loss="objective")(Task.__init__)


@dataclass
class Run:
    """A training run: the model, the evaluations, and the settings used.

    Args:
        model: the trained model.
        history: one row per evaluation: `step`, `seconds` (of training alone, without evaluation), `loss` (mean since
            the last row), and the task's numbers.
        steps: steps taken.
        seconds: time of training alone.
        diverged: whether the loss stopped being finite, so that the run is not finished.
        out: the folder it was written to.
        optimizer: name of the optimizer.
        lr: its learning rate.
        rate_from: where that comes from: `"given"`, `"suggested"`, or `"the usual one"`, with the number of steps where
            it depends on them.
        rate: the learning rate of the last step.
        init: what was done to the model's own initialization, and why.
        resumed: the step at which the run was resumed; 0 if it was not.
        skipped: steps that were skipped, since the loss or a gradient was not finite.
        stopped: why the run ended before its budget; empty if it did not.
        start: the loss of the first step; NaN before it.
        best_step: whose weights the model has, where `best` was asked; `None` where they are the last ones.
        findings: what the watch found, a row for each code and place: the `step`, and a finding's `severity`, `code`,
            `where`, `title`, `evidence`, `cause` and `remedy`. Empty without a watch.
        looks: how many full looks a watch made; in a resumed run, since then.
    """

    model: nn.Module
    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    diverged: bool = False
    out: Path | None = None
    optimizer: str = ""
    lr: float = 0.0
    rate_from: str = ""
    rate: float = 0.0
    init: str = ""
    resumed: int = 0
    skipped: int = 0
    stopped: str = ""
    start: float = math.nan
    findings: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    looks: int = 0

    def __repr__(self) -> str:
        numbers = ", ".join(
            f"{key} {value:.4g}" for key, value in self.metrics.items() if key not in ("step", "seconds")
        )
        how = f"{self.optimizer} at lr {self.lr:.3g}" if self.optimizer else "no optimizer"
        ended = "; diverged" if self.diverged else f"; stopped: {self.stopped}" if self.stopped else ""
        return f"<Run: {self.steps:,} steps in {self.seconds:.1f} s by {how}: {numbers or 'not evaluated'}{ended}>"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{Rows(self.history)._repr_html_()}"

    def figures(self) -> dict[str, Figure]:
        """Return the curve of each number as matplotlib's figure, by title, to change or to save (`figure.savefig`)."""
        from gramian.training.page import curves

        return Document("Training", repr(self), sections=[Section("Curves", items=curves({"": self}))]).figures()

    @property
    def metrics(self) -> dict[str, float]:
        """The last evaluation."""
        return self.history[-1] if self.history else {}

    def to_dict(self) -> dict[str, Any]:
        """Return all but the model, as strict JSON can hold it; NaN and infinity become `None`."""
        plain = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "model"}
        return jsonable(plain | {"out": None if self.out is None else str(self.out)})


def as_task(task: Any) -> Task:
    """A task as it is.

    Args:
        task: what `train` was given.

    Returns: the task.
    Raises:
        InputError: it is no `Task`, with what to write.

    >>> as_task(nn.Linear(2, 1))
    Traceback (most recent call last):
    gramian.errors.InputError: train: expected a gm.Task, got the model Linear. Write gm.Task(...
    """
    if isinstance(task, Task):
        return task
    write = "gm.Task(lambda: model, gm.Objective.classification(), train_loader, lambda model: {'accuracy': …})"
    if isinstance(task, str):
        raise InputError(f"train: expected a gm.Task, got the text {task!r}. Write gm.tasks.load({task!r})")
    if callable(task) and not isinstance(task, (nn.Module, type)):
        raise InputError(f"train: expected a gm.Task, got {_kind(task)}. If it makes the task, call it; else {write}")
    raise InputError(f"train: expected a gm.Task, got {_kind(task)}. Write {write}")


def _takes_two(function: Any) -> bool:
    """Whether a function can be called with two arguments, as far as can be told."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(0, None)
    except TypeError:
        return False
    return True


def _kind(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, nn.Module):
        return f"the model {type(value).__name__}"
    return f"the function {value.__name__}" if hasattr(value, "__name__") else f"a {type(value).__name__}"


def named(task: Task) -> str:
    """A task in an error's line.

    >>> named(Task(nn.Identity, Objective.regression(), [], dict, name="mine"))
    "task 'mine'"
    """
    return "the task" if task.name == Task.name else f"task {plain(task.name, 100)!r}"


class calling:
    """A context that turns any exception from a function of the task, or without one of the user's, into a `TaskError`.

    So it does with `sys.exit()`, which would end one rank and leave the others waiting; an interruption passes.
    """

    def __init__(self, task: Task | None, function: str) -> None:
        self.task, self.function = task, function

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, GramianError) and not is_interruption(error):
            whose = "train" if self.task is None else named(self.task)
            raise TaskError(f"{whose}: {self.function} raised {described(error)}") from error


def described(error: BaseException, path: str | None = None) -> str:
    """Return the error's type, its message, and the file and line where the user's code raised or called what did.

    That is the innermost line in the file `path`, or in any that is neither of this library nor installed.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) and error.filename and error.lineno:  # the error is where the parser was
        frames.append(traceback.FrameSummary(error.filename, error.lineno, ""))
    own = [frame for frame in frames if frame.filename == path or not _is_installed(frame.filename)]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {_one_line(error)}{place}"


def is_of_user(error: BaseException) -> bool:
    """Whether the user's code raised an exception, or what it called did: its last frame is inside the library's."""
    if is_interruption(error):
        return False
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    own = [file.startswith(LIBRARY) for file in files if file.startswith(LIBRARY) or not _is_installed(file)]
    return bool(own) and not own[-1]


def _one_line(error: BaseException) -> str:
    """The message without line breaks; of an exception in a DataLoader's worker, its last line and not the trace."""
    try:
        text = str(error)
    except Exception:  # the error's own text is the user's code too
        text = "(it has no text)"
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1]
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


def _is_installed(file: str) -> bool:
    """Whether a file is of this library, of Python's own, or of an installed package."""
    return file.startswith((LIBRARY, STDLIB, "<frozen")) or not PACKAGES.isdisjoint(Path(file).parts)


def as_numbers(found: Any, task: Task) -> dict[str, float]:
    """What `evaluate` returned, as Python's numbers: numpy's and tensors of one element are taken too."""
    if isinstance(found, dict):
        measured = {name: _number(value) for name, value in found.items()}
        if all(isinstance(name, str) and value is not None for name, value in measured.items()):
            return {name: value for name, value in measured.items() if value is not None}
    raise TaskError(f"{named(task)}: evaluate(model) must return a dict of floats, got {_short(found)}")


def _number(value: Any) -> float | int | None:
    """A real number as an int or a float; `None` for anything else."""
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        value = None if getattr(value, "is_meta", False) else value.item()
    try:
        real = float(value) if isinstance(value, numbers.Real) else None
    except OverflowError:  # an integer or a fraction that no float can hold
        return None
    return int(value) if isinstance(value, numbers.Integral) else real


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:100]}…"
