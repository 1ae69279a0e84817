"""What is refused before a run begins: it must not take a diagnosis, or a twentieth of the run, to be noticed."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gramian.autograd import Ungraded
from gramian.checkpoint.names import as_path
from gramian.checkpoint.trees import pack_tree
from gramian.errors import GramianWarning, InputError, TaskError, UnsupportedError, plain, some
from gramian.recording import evaluating
from gramian.training.argument_errors import check
from gramian.training.augmentation import augmented, mixed
from gramian.training.optimizers import Choice
from gramian.training.options import Options, best_row
from gramian.training.randomness import restore_python, state_of_python
from gramian.training.task import Task, calling, named

__all__ = [
    "check_best",
    "check_inputs",
    "check_model",
    "check_path",
    "check_state",
    "holding",
    "identity_of",
    "plain_numbers",
    "warn_of_plain_numbers",
]


def check_inputs(task: Task, options: Options) -> None:
    """Raise where the task's first batch cannot be augmented."""
    if options.augment:
        mixed(augmented(task.batches(1)[0], options.augment, (0,)), options.augment, (0,))


def plain_numbers(model: nn.Module) -> dict[str, float]:
    """The modules' attributes that are Python's own numbers, by name; not of modules that save extra state."""
    found: dict[str, float] = {}
    for place, module in model.named_modules():
        if getattr(type(module), "get_extra_state", None) is nn.Module.get_extra_state:
            for name, value in vars(module).items():
                if type(value) in (bool, int, float) and name != "training":
                    found[f"{place}.{name}".lstrip(".")] = value
    return found


def warn_of_plain_numbers(task: Task, before: dict[str, float], after: dict[str, float]) -> None:
    """Warn where a step changes numbers of the model that no checkpoint has."""
    changed = [name for name, value in after.items() if before.get(name, value) != value and value == value]
    if changed:
        warnings.warn(
            f"{named(task)}: training changes {some(changed)} of the model, plain Python, which no checkpoint "
            "has: a resumed run would go on otherwise. Make a tensor of it and register_buffer it, or define "
            "get_extra_state and set_extra_state",
            GramianWarning,
            stacklevel=4,
        )


def check_best(task: Task, model: nn.Module, options: Options) -> None:
    """Raise `InputError` where an evaluation lacks the number that is to improve."""
    if options.best is None:
        return
    python = state_of_python()
    with evaluating(model), torch.no_grad(), calling(task, "evaluate(model)"):
        found: Any = Ungraded()(task.evaluate, model)
    restore_python(python)
    if isinstance(found, Mapping):  # or the first evaluation says what is wrong
        best_row(options.best, [{"loss": math.nan} | dict.fromkeys(found, math.nan)])


def check_model(model: object, task: Task) -> None:
    """Raise `TaskError` for what cannot be trained."""
    if not isinstance(model, nn.Module):
        raise TaskError(f"{named(task)}: model() must return a torch.nn.Module, got {type(model).__name__}")
    with calling(task, "looking for the parameters of its model"):  # whose class may define anything
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    if not any(p.requires_grad for p in parameters.values()):
        raise TaskError(f"{named(task)}: no parameter of the model requires a gradient, so nothing can be trained")
    for name, p in (parameters | buffers).items():
        why = ""
        if isinstance(p, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
            why = "has no shape yet (a lazy module). Call the model on one batch in model()"
        elif p.is_meta:
            why = "is on the meta device, without numbers. Make the model outside torch.device('meta')"
        elif name in parameters and not p.is_leaf:
            why = "is computed from other tensors, so that it cannot be trained. Make it an nn.Parameter"
        if why:
            raise TaskError(f"{named(task)}: {name} of the model {why}")


def check_state(model: nn.Module, task: Task) -> None:
    """Raise for a model whose state no checkpoint can hold, before anything is written."""
    with calling(task, "state_dict() of its model"):
        state: Any = model.state_dict()
    if not isinstance(state, Mapping):
        raise TaskError(f"{named(task)}: state_dict() of its model must return a dict, got {type(state).__name__}")
    with holding():
        pack_tree(dict(state))


@contextmanager
def holding() -> Iterator[None]:
    """A context in which a state that contains itself is told in one line."""
    try:
        yield
    except RecursionError:
        raise UnsupportedError(
            "train: the state of the model or the optimizer contains itself, or is nested too deeply, so that no "
            "checkpoint can hold it. What does get_extra_state() return?"
        ) from None


def check_path(path: object) -> None:
    """Raise `InputError` for the path of a folder or report that is none, or cannot stand in files of UTF-8."""
    if path is None:
        return
    check("out or report", path, lambda p: p != "", "a path, and not empty")
    text = str(as_path(path, "train"))
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"train: a path that is not UTF-8: {plain(text)}; rename it") from None


def identity_of(
    task: Task, model: nn.Module, choice: Choice, init: str, seed: int, budget: tuple[str, float]
) -> dict[str, str]:
    """Return the settings, as text, that a run must share with a checkpoint to resume it."""
    return {
        "task": task.source or task.name,
        "model": _fingerprint(model),
        "optimizer": choice.name,
        "learning rate": "usual" if choice.lr is None else _number(choice.lr),
        "init": init,
        "seed": f"{seed}",
        "budget": f"{_number(budget[1])} {budget[0]}",
    }


def _fingerprint(model: nn.Module) -> str:
    """Return a text that differs for models whose parameters have other names or shapes."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]
    return f"{type(model).__name__} of {sum(map(math.prod, shapes.values())):,} parameters ({digest})"


def _number(value: float) -> str:
    """Return the same text for an int and an equal float."""
    return f"{int(value)}" if float(value).is_integer() else repr(float(value))
