"""How a new run initializes its model: as the task builds it, or repaired before the first step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import nn

from gramian.errors import InputError
from gramian.init import isometric_, signs_of_training
from gramian.inspection import inspect
from gramian.objective import Objective
from gramian.recording.measuring import training
from gramian.report import Finding
from gramian.training.argument_errors import one_of
from gramian.training.task import Task, calling

__all__ = ["INITS", "INIT_OF_ACTION", "initialize", "leaves_error"]

# What the line about an initialization says before an error that is still there.
UNREPAIRED, REMAINS = "since no initialization repairs this: ", "; but: "

# Training batches for the diagnosis before the first step.
NUM_BATCHES = 4

# Among so many first ones they are sought where the labels of those are all ignored.
MOST_BATCHES = 64


def initialize(init: str, model: nn.Module, task: Task, objective: Objective, seed: int) -> str:
    """Apply `init`, a name of `INITS`, to the model and return one line that says what was done."""
    return INITS[init](model, task, objective, seed)


def leaves_error(init: str) -> bool:
    """Whether the line that `initialize` gave names an error that is still there when the training begins."""
    return UNREPAIRED in init or REMAINS in init


def check(init: str) -> None:
    """Raise `InputError` for a name that is not in `INITS`."""
    one_of("init", init, INITS)


def _default(model: nn.Module, task: Task, objective: Objective, seed: int) -> str:
    return "as the task makes it"


def _isometric(model: nn.Module, task: Task, objective: Objective, seed: int) -> str:
    isometric_(model, task.batches(1)[0], generator=torch.Generator().manual_seed(seed), predict=objective.predict)
    return "isometric"


def _auto(model: nn.Module, task: Task, objective: Objective, seed: int) -> str:
    """Apply the actions of the errors found, if all weights are still random and fewer errors remain afterwards."""
    batches = _with_units(model, task, objective)
    if not batches:
        return f"as the task makes it, not diagnosed: none of the first {MOST_BATCHES} batches has a row that counts"
    found = inspect(model, batches, objective, quick=True).findings
    errors = [finding for finding in found if _keeps_from_learning(finding)]
    if not errors:
        noted = [f for f in found if f.severity == "warning" or f.code == "labels-independent"]
        told = f"; a {'warning' if noted[0].severity == 'warning' else 'remark'}: {noted[0].title}" if noted else ""
        return f"as the task makes it: no error was found before the first step{told}"
    wanted = _inits_for(errors)
    if not wanted:
        return f"as the task makes it, {UNREPAIRED}{errors[0].title}"
    before = [finding for finding in errors if _init_for(finding)]
    cause = before[0].title
    learned = signs_of_training(model)
    if learned:
        return f"as the task makes it, since {learned[0].name} has learned something already{REMAINS}{cause}"
    kept = copy.deepcopy(model.state_dict())
    try:
        for init in wanted:
            INITS[init](model, task, objective, seed)
    except InputError as error:
        model.load_state_dict(kept)
        return f"as the task makes it{REMAINS}{cause}; {error}"
    found = filter(_keeps_from_learning, inspect(model, batches, objective, quick=True).findings)
    if sum(_init_for(finding) is not None for finding in found) < len(before):
        return f"{', '.join(wanted)}: {cause}"
    model.load_state_dict(kept)
    return f"as the task makes it, since {', '.join(wanted)} did not help{REMAINS}{cause}"


def _with_units(model: nn.Module, task: Task, objective: Objective) -> list[Any]:
    """The first batches that have a unit, at most `NUM_BATCHES`, sought among the first `MOST_BATCHES`.

    A forward pass or a loss that raises is told as in the first step.
    """

    def has_units(batch: Any) -> bool:
        with training(model), calling(task, "the forward pass or the loss"):
            return bool(objective.loss(model, batch, empty=True)[1] > 0)

    found = list(filter(has_units, task.batches(NUM_BATCHES)))
    return found or list(islice(filter(has_units, task.batches(MOST_BATCHES)), NUM_BATCHES))


def _keeps_from_learning(finding: Finding) -> bool:
    """Whether it is an error, or what an initialization repairs though it is a warning."""
    return finding.severity == "error" or _is_of_size(finding)


def _init_for(finding: Finding) -> str | None:
    """Return the initialization that the finding's action asks for, a name of `INITS`."""
    if finding.action is None or finding.action.name not in INIT_OF_ACTION:
        return None
    return INIT_OF_ACTION[finding.action.name](finding.action.arguments)


def _is_of_size(finding: Finding) -> bool:
    """Whether fresh weights are too large for the softmax of an attention, which takes long to unlearn."""
    return finding.code == "attention-saturated" and finding.severity != "info"


def _inits_for(findings: list[Finding]) -> list[str]:
    """Return the initializations that the findings' actions ask for, each once."""
    return list(dict.fromkeys(init for finding in findings if (init := _init_for(finding))))


INITS: dict[str, Callable[[nn.Module, Task, Objective, int], str]] = {
    "default": _default,
    "isometric": _isometric,
    "auto": _auto,
}

# Actions of `gramian.report.ACTIONS` that a new run can apply before its first step, and the name of `INITS` that each
# stands for. The others, such as a cast or a compression, are for the user to decide.
INIT_OF_ACTION: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "isometric_": lambda arguments: "isometric",
    "reset": lambda arguments: "isometric",  # of all, since none has learned anything yet
}
