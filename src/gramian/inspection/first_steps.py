"""Training steps of a diagnosis: those that are watched, and an optimizer's on the same batches."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gramian.inspection.experiments.optimizer_steps import FEWEST, Steps, take_steps
from gramian.inspection.passes.signal import in_words
from gramian.inspection.passes.step_failures import steps_run
from gramian.inspection.passes.step_records import Observed
from gramian.inspection.passes.watched_steps import observe, observe_left
from gramian.objective import Objective
from gramian.recording.forward_failures import check_runs

__all__ = ["FAILING", "STEPS", "observe_steps"]

# What a report says it looked at, or not.
STEPS = "optimizer's steps"
FAILING = "causes in training steps"


def observe_steps(
    model: nn.Module, few: list[Any], objective: Objective, optimizer: Optimizer | None
) -> tuple[Observed | None, Steps | None, dict[str, str]]:
    """Watch a training step, and take an optimizer's first steps where there is one.

    Args:
        model, objective, optimizer: as in `inspect`; none is changed.
        few: the batches.

    Returns: what was seen, and the steps, each `None` where there is none; and why, by what a report calls it.
    Raises:
        GramianError: the model or the loss does not run.
    Cost: that of `observe`, and of `take_steps` where an optimizer is given.
    Source: this library's own.
    """
    try:
        observed = observe(model, few, objective, num_steps=0 if optimizer is None else FEWEST)
        return observed, *_steps(model, few, objective, optimizer, observed)
    except Exception as error:  # batch norm of one sample, say, which only evaluation mode can run
        check_runs("inspect", model, few[0], objective)
        if steps_run(model, few, objective):
            return None, None, {"causes": f"watching failed, a fault of gramian: {in_words(error)}"}
        return None, None, {FAILING: in_words(error)}


def _steps(
    model: nn.Module, few: list[Any], objective: Objective, optimizer: Optimizer | None, observed: Observed
) -> tuple[Steps | None, dict[str, str]]:
    """An optimizer's first steps, or why there are none. Batches in which they leave something open are run here."""
    if observed.error is not None:
        return None, {}
    if optimizer is None:
        return None, {STEPS: "no optimizer was given"}
    steps, untaken = None, ""
    if math.isfinite(observed.loss):
        try:
            steps = take_steps(model, optimizer, few, objective, first=observed)
        except Exception as error:  # an optimizer that cannot be copied, or a step that fails
            untaken = in_words(error)
    if steps is None or not all(map(math.isfinite, steps.losses)):
        observe_left(model, objective, observed)
    if observed.error is not None:
        return None, {}
    if not math.isfinite(observed.loss):
        return None, {STEPS: "the loss is not finite"}
    return steps, {STEPS: untaken} if untaken else {}
