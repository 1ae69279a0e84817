"""A few steps of an optimizer on copies of it and of its model: what happens to the loss and to the matrices."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gramian.objective import Objective
from gramian.recording.measuring import training

__all__ = ["NUM_STEPS", "Steps", "take_steps"]

NUM_STEPS = 6


@dataclass
class Steps:
    """What the steps did.

    Attributes:
        losses: mean loss before each step, and after the last; of the first batch where there are several.
        changes: ‖ΔW‖_F / ‖W‖_F in the first step, by parameter of two or more dimensions.
        gradient: largest entry of the first gradient.
        rate: the largest rate of the groups.
    """

    losses: list[float] = field(default_factory=list)
    changes: dict[str, float] = field(default_factory=dict)
    gradient: float = 0.0
    rate: float = 0.0


def take_steps(
    model: nn.Module, optimizer: Optimizer, batches: Iterable[Any], objective: Objective, *, num_steps: int = NUM_STEPS
) -> Steps:
    """Take a few steps on copies of a model and its optimizer.

    Args:
        model, optimizer: copied together; neither is changed.
        batches: used in turn.
        objective: gives the loss.
        num_steps: how many steps.

    Returns: a `Steps`.
    Raises: what a step or the copy raises.
    Cost: `num_steps + 1` training steps, and a copy of the model and of the optimizer's state.
    Source: this library's own.
    """
    given = list(batches)
    taken = Steps(rate=max((float(group.get("lr", 0.0)) for group in optimizer.param_groups), default=0.0))
    before: dict[str, Tensor] = {}
    with training(model):
        twin, stepper = copy.deepcopy((model, optimizer))
        names = {n: p for n, p in twin.named_parameters() if p.requires_grad and p.ndim >= 2}
        for i, batch in enumerate(islice(cycle(given), num_steps)):
            stepper.zero_grad()
            with torch.enable_grad():
                total, units = objective.loss(twin, batch)
                loss = total / units
                loss.backward()
            taken.losses.append(float(loss.detach()))
            if i == 0:
                before = {n: p.detach().clone() for n, p in names.items()}
                largest = [
                    float(p.grad.detach().abs().amax()) for p in names.values() if p.grad is not None and p.numel()
                ]
                taken.gradient = max(largest, default=0.0)
            stepper.step()
            if i == 0:
                for n, p in names.items():
                    size = float(before[n].float().norm())
                    if size > 0:
                        taken.changes[n] = float((p.detach() - before[n]).float().norm()) / size
        with torch.no_grad():
            total, units = objective.loss(twin, given[0])
            taken.losses.append(float(total / units))
    return taken
