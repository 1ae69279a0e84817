"""The rate that is suggested for a run, from the model that it would start with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from typing import Any

import torch

from gramian.errors import GramianWarning, InputError
from gramian.objective import as_objective
from gramian.optim.learning_rate import LearningRate
from gramian.optim.rehearsals import JUDGES, NUM_STEPS, NoRateError
from gramian.optim.suggestion import suggest_lr
from gramian.seeding import seeded
from gramian.training import start
from gramian.training.checks import check_model
from gramian.training.task import Task, as_task, calling

__all__ = ["AUTO", "rounded", "suggested"]

AUTO = "auto"
"""The rate that is to be suggested."""


def suggested(
    task: Task,
    optimizer: Any,
    init: str,
    seed: int,
    progress: Callable[[float, float], None] | None = None,
) -> LearningRate | None:
    """`gm.suggest_lr` of a task's initialized model and first batches, drawn as a run of this seed would draw them.

    `None`, with a warning, where the trial steps told nothing, since no rate gained more than noise.
    """
    task = as_task(task)
    start.check(init)
    with seeded(seed):
        with calling(task, "model()"):
            model = task.model()
        check_model(model, task)
        with calling(task, f"the initialization ({init}) of the model"):
            start.initialize(init, model, task, as_objective(task.objective), seed)
        with calling(task, "train_batches(0, generator)"):
            batches = list(islice(task.train_batches(0, torch.Generator().manual_seed(seed)), NUM_STEPS + JUDGES))
        if len(batches) < 2:
            raise InputError(f"train: a rate is suggested from two batches or more, and the task has {len(batches)}")
        model.train()
        with suppress(NoRateError):
            return suggest_lr(model, batches, task.objective, optimizer=optimizer, progress=progress)
    warnings.warn(
        "train: the trial steps told nothing about the rate, since no loss fell by more than noise; the optimizer's "
        "usual rate is kept",
        GramianWarning,
        stacklevel=3,
    )
    return None


def rounded(found: LearningRate | None) -> float | None:
    """The suggested rate to two digits; `None`, the usual one, where there is none."""
    return None if found is None else float(f"{found.lr:.2g}")
