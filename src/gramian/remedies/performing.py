"""Actions, performed: the code that a finding shows is run on copies of what its names stand for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gramian import init
from gramian.errors import InputError
from gramian.objective import Objective
from gramian.report import Action

__all__ = ["Setting", "perform"]


@dataclass(frozen=True)
class Setting:
    """What an action's code may name, as a user has it before the first step.

    Args:
        model: the network.
        batches: a few batches.
        objective: the loss.
        optimizer: made for the model, or `None`.
    """

    model: nn.Module
    batches: list[Any]
    objective: Objective | Callable
    optimizer: Optimizer | None = None

    def copied(self) -> Setting:
        """The same with copies of the model and of its optimizer, which belong together. Batches are shared."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        return replace(self, model=model, batches=list(self.batches), optimizer=optimizer)


def perform(action: Action, setting: Setting) -> Setting:
    """Run an action's code, line by line as a finding shows it, and return what its names stand for afterwards.

    The code comes from the closed table `gramian.report.ACTIONS`, into which names are filled as quoted literals. It is
    run as it stands, rather than a function beside it, so that what is verified is what is shown.

    Args:
        action: of Python.
        setting: its model and optimizer are changed in place: pass `setting.copied()` to keep them.

    Returns:
        The setting afterwards: some actions make new batches.

    Raises:
        InputError: a command line, which no model can be given to; and what the code raises.

    Cost: the action's.
    Source: this library's own.

    >>> setting = Setting(nn.Linear(2, 2), [torch.ones(1, 2)], lambda model, batch: model(batch).sum())
    >>> perform(Action("rescale", {"name": "weight", "factor": 0.0}), setting).model.weight.tolist()
    [[0.0, 0.0], [0.0, 0.0]]
    """
    if action.is_command:
        raise InputError(f"perform: {action.name} is a command line, {action.code}; run it in a shell")
    names = {
        "gm": SimpleNamespace(init=init),  # cures call nothing else of this library
        "torch": torch,
        "model": setting.model,
        "batches": setting.batches,
        "sample": setting.batches[0] if setting.batches else None,
        "objective": setting.objective,
        "optimizer": setting.optimizer,
    }
    exec(action.code, names)
    return Setting(names["model"], names["batches"], names["objective"], names["optimizer"])
