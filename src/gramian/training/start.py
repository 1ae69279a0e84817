"""How a fresh model's weights begin: as its task makes them, or mended before the first step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gramian.errors import InputError
from gramian.init import isometric_
from gramian.inspection import inspect
from gramian.inspection.rules import ISOMETRIC, RETRAIN
from gramian.objective import Objective
from gramian.report import Finding
from gramian.training.task import Task

__all__ = ["INITS", "initialize"]

# Of the training data, for a diagnosis before the first step.
NUM_BATCHES = 4


def initialize(init: str, model: nn.Module, task: Task, objective: Objective, seed: int) -> str:
    """Does what `init`, a name of `INITS`, says, and tells in one line what that was."""
    return INITS[init](model, task, objective, seed)


def check(init: str) -> None:
    """Raises `InputError` for a name that `INITS` lacks."""
    if init not in INITS:
        raise InputError(f"train: init must be one of {', '.join(INITS)}; got {init!r}")


def _default(model: nn.Module, task: Task, objective: Objective, seed: int) -> str:
    return "as the task makes it"


def _isometric(model: nn.Module, task: Task, objective: Objective, seed: int) -> str:
    isometric_(model, task.batches(1)[0], generator=torch.Generator().manual_seed(seed), predict=objective.predict)
    return "isometric"


def _auto(model: nn.Module, task: Task, objective: Objective, seed: int) -> str:
    """Isometric where the network cannot learn as it is, its weights are still random, and it then can."""
    batches = task.batches(NUM_BATCHES)
    before = _troubles(model, batches, objective)
    if not before:
        return "as the task makes it: signals and gradients cross it"
    cause = before[0].title
    structured = [layer.name for layer in inspect(model).layers if layer.above_noise]
    if structured:
        return f"as the task makes it, since {structured[0]} has learned something already; but: {cause}"
    kept = copy.deepcopy(model.state_dict())
    try:
        _isometric(model, task, objective, seed)
    except InputError as error:
        return f"as the task makes it; {cause}; {error}"
    if len(_troubles(model, batches, objective)) < len(before):
        return f"isometric: {cause}"
    model.load_state_dict(kept)
    return f"as the task makes it, since isometric_ did not help; but: {cause}"


def _troubles(model: nn.Module, batches: list[Any], objective: Objective) -> list[Finding]:
    """The errors whose remedy is an isometric initialization."""
    found = inspect(model, batches, objective, quick=True).findings
    return [f for f in found if f.severity == "error" and f.remedy in (ISOMETRIC, RETRAIN)]


INITS: dict[str, Callable[[nn.Module, Task, Objective, int], str]] = {
    "default": _default,
    "isometric": _isometric,
    "auto": _auto,
}
