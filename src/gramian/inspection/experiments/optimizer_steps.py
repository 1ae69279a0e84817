"""A few steps of an optimizer on copies of it and of its model: what happens to the loss and to the matrices."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import cycle, islice
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gramian.inspection.passes.step_records import Observed
from gramian.objective import Objective
from gramian.recording.measuring import training

__all__ = ["FEWEST", "NUM_STEPS", "Steps", "take_steps"]

# Steps, and after how many of them none follows if the loss has not risen by this share: to three times its first value
# it rises over several steps, at a constant factor to one and a half times in the first two. A smaller share is enough
# where the first step changes the median matrix by less than is usual, or some matrix by more.
NUM_STEPS, FEWEST, RISEN, RISEN_UNUSUAL, USUAL = 5, 3, 0.25, 0.05, (1e-3, 0.25)
# A gradient that is this many times what Adam's second moments say belongs to a multiple of the run's loss.
ANOTHER = 4.0


@dataclass
class Steps:
    """What the steps did.

    Attributes:
        losses: mean loss before each step, and after the last; of the first batch where there are several.
        changes: ‖ΔW‖_F / ‖W‖_F in the first step, by parameter of two or more dimensions, of those that are not zero
            and get a gradient that is not.
        gradient: root mean square of the entries of the first gradient, of the median matrix.
    """

    losses: list[float] = field(default_factory=list)
    changes: dict[str, float] = field(default_factory=dict)
    gradient: float = 0.0


def take_steps(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Any],
    objective: Objective,
    *,
    first: Observed | None = None,
) -> Steps:
    """Take a few steps on copies of a model and its optimizer.

    Args:
        model, optimizer: copied together; neither is changed.
        batches: used in turn.
        objective: gives the loss.
        first: what a training step of the first batch showed, from which its gradients are taken if it has them.

    Returns: a `Steps`.
    Raises: what a step or the copy raises.
    Cost: three training steps and a forward pass, of which `first` saves one; up to `NUM_STEPS` steps where the loss
        rises; a copy of the model and of the optimizer's state.
    """
    given = list(batches)
    taken = Steps()
    before: dict[str, Tensor] = {}
    scale = 1.0
    with training(model):
        twin, stepper = copy.deepcopy((model, optimizer))
        names = {n: p for n, p in twin.named_parameters() if p.requires_grad and p.ndim >= 2}
        for i, batch in enumerate(islice(cycle(given), NUM_STEPS)):
            if i >= FEWEST and max(taken.losses) <= (1 + _enough(taken)) * taken.losses[0]:
                break
            stepper.zero_grad()
            if i == 0 and first is not None and first.first_step is not None:
                for n, p in twin.named_parameters():
                    p.grad = first.first_step.gradients.get(n)
                first.first_step.set_random()
                first.first_step = None  # the step may change the gradients, and their memory is free then
                taken.losses.append(first.first_loss)
            else:
                taken.losses.append(_differentiated(twin, batch, objective))
            if i == 0:
                sizes = {n: _size(p.grad) for n, p in names.items() if p.grad is not None}
                taken.gradient = median([size for size in sizes.values() if size != 0.0] or [0.0])
                before = {n: names[n].detach().clone() for n, size in sizes.items() if size != 0.0}
                scale = _of_the_run(stepper)
            for p in twin.parameters() if scale != 1.0 else ():
                if p.grad is not None:
                    p.grad.mul_(scale)
            stepper.step()
            if i == 0:
                for n, old in before.items():
                    size = float(old.float().norm())
                    if size > 0:
                        taken.changes[n] = float((names[n].detach() - old).float().norm()) / size
        taken.losses.append(_loss_of(twin, given[0], objective))
    return taken


def _loss_of(model: nn.Module, batch: Any, objective: Objective) -> float:
    try:
        with torch.no_grad():
            total, units = objective.loss(model, batch)
    except Exception:  # a loss may differentiate on its way
        with torch.enable_grad():
            total, units = objective.loss(model, batch)
    return float(total.detach() / units)


def _differentiated(model: nn.Module, batch: Any, objective: Objective) -> float:
    """The loss, whose gradients are in `.grad` then."""
    with torch.enable_grad():
        total, units = objective.loss(model, batch)
        loss = total / units
        if all(p.grad is None for p in model.parameters()):  # else the loss has done it
            loss.backward()
    return float(loss.detach())


def _enough(taken: Steps) -> float:
    """The share by which a loss has to rise for more steps to tell more."""
    changes, (low, high) = taken.changes.values(), USUAL
    is_usual = bool(changes) and median(changes) >= low and all(change <= high for change in changes)
    return RISEN if is_usual else RISEN_UNUSUAL


def _of_the_run(optimizer: Optimizer) -> float:
    """By what a gradient is to be multiplied to be one of the loss that Adam's second moments come from.

    A sum over outputs is so many times their mean, with which the run may have trained; Adam's steps are the same for
    both, but not the first ones on moments of the other.
    """
    now = seen = 0.0
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            moments, step = state.get("exp_avg_sq"), float(state.get("step", 0.0))
            if p.grad is not None and isinstance(moments, Tensor) and moments.shape == p.shape and step > 0:
                seen += float(moments.detach().double().sum()) / (1 - group["betas"][1] ** step)
                now += float(_values(p.grad).double().square().sum())
    return math.sqrt(seen / now) if 0 < ANOTHER**2 * seen < now < math.inf else 1.0


def _size(gradient: Tensor) -> float:
    values = _values(gradient)
    return float(values.float().norm()) / math.sqrt(gradient.numel()) if values.numel() else 0.0


def _values(gradient: Tensor) -> Tensor:
    return gradient.detach().coalesce().values() if gradient.is_sparse else gradient.detach()
