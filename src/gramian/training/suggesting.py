"""The rate that is suggested for a run, from the model that it would start with."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch

from gramian.errors import InputError
from gramian.objective import as_objective
from gramian.optim.learning_rate import LearningRate
from gramian.optim.rehearsals import NUM_STEPS
from gramian.optim.suggestion import suggest_lr
from gramian.recording.keeping import seeded
from gramian.training import start
from gramian.training.checks import check_model
from gramian.training.task import Task, as_task, calling

__all__ = ["suggested"]


def suggested(
    task: Task, optimizer: str, init: str, seed: int, progress: Callable[[float, float], None] | None = None
) -> LearningRate:
    """`gm.suggest_lr` of a task's initialized model and first batches, drawn as a run of this seed would draw them."""
    task = as_task(task)
    start.check(init)
    with seeded(seed):
        with calling(task, "model()"):
            model = task.model()
        check_model(model, task)
        with calling(task, f"the initialization ({init}) of the model"):
            start.initialize(init, model, task, as_objective(task.objective), seed)
        with calling(task, "train_batches(0, generator)"):
            batches = list(islice(task.train_batches(0, torch.Generator().manual_seed(seed)), NUM_STEPS + 1))
        if len(batches) < 2:
            raise InputError(f"train: a rate is suggested from two batches or more, and the task has {len(batches)}")
        return suggest_lr(model.train(), batches, task.objective, optimizer=optimizer, progress=progress)
