"""What a loss itself changes from one evaluation to the next, put back before each: queues, centers, drawn numbers."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gramian.objective import Objective
from gramian.recording.kept_state import Kept
from gramian.recording.measuring import eager, evaluating
from gramian.samples import first_samples
from gramian.seeding import seed_torch

__all__ = ["steady"]

# Samples that are enough to see whether the loss repeats; what holds a queue may only take whole batches.
ENOUGH = 16


def steady(model: nn.Module, objective: Objective, batch: Any, kept: Kept) -> Objective:
    """The objective, or where its loss does not repeat, one that finds at each evaluation what it found at the first.

    What is put back are the parameters and buffers that an evaluation changes (a queue and its position, a center, a
    momentum encoder), objects that the loss holds beside the model, and the generators of Python and NumPy. What else
    was done to the model in between, as an experiment does, stays.

    Args:
        model: in any mode; it is evaluated in evaluation mode.
        objective: gives the loss.
        batch: of which the first samples are taken, or all where these do not run.
        kept: of the model, as it was at first; the model is put back there.

    Returns: the objective itself where two evaluations give the same loss and leave the model alone, or none runs.
    Raises: nothing of its own.
    Cost: two evaluations on 16 samples; with what is put back, a pass over it for each evaluation.
    """
    with evaluating(model), eager():
        for given in (first_samples(batch, ENOUGH), batch):
            with suppress(Exception):  # whoever looks at this batch next tells what fails
                losses = [_loss(model, objective, given) for _ in range(2)]
                moving = kept.changed(model)
                kept.put_back()
                repeats = losses[0] == losses[1] or losses[0] != losses[0]
                return objective if repeats and not moving else _put_back(model, objective, moving)
            kept.put_back()
    return objective


def _loss(model: nn.Module, objective: Objective, batch: Any) -> float:
    seed_torch(0)
    with torch.enable_grad():  # a loss may differentiate on its way
        total, _ = objective.loss(model, batch)
    return float(total.detach())


def _put_back(model: nn.Module, objective: Objective, moving: list[tuple[Tensor, Tensor]]) -> Objective:
    predict = getattr(objective.predict, "prepares", objective.predict)
    beside = Kept(predict, objective.criterion, but=model)
    drawn = random.getstate(), np.random.get_state()  # noqa: NPY002 (what the user's code draws from)

    @wraps(predict)
    def from_the_start(model: nn.Module, batch: Any) -> Any:
        for t, values in moving:
            t.data.copy_(values)
        beside.put_back()
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])  # noqa: NPY002
        return predict(model, batch)

    return replace(objective, predict=from_the_start)
