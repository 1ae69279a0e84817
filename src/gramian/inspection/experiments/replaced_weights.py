"""A model whose weights are lost, with others in their place, and the step at which these are lost again."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gramian.objective import Objective
from gramian.recording.measuring import training
from gramian.seeding import seed_torch

__all__ = ["first_lost_step", "forgetful", "renew"]

# Steps that are tried, and how many times its first value a loss is that diverges.
STEPS, DIVERGES = 60, 100.0


@torch.no_grad()
def renew(model: nn.Module) -> list[str]:
    """Draw the modules anew whose parameters or statistics are not finite, as torch draws them.

    Args:
        model: changed in place; what it was is the caller's to keep.

    Returns: the names of the parameters that were not finite.
    Cost: a pass over the weights.

    >>> net = nn.Linear(2, 2)
    >>> _ = nn.init.constant_(net.bias, float("nan"))
    >>> renew(net), bool(net.bias.isfinite().all())
    (['bias'], True)
    """
    seed_torch(0)
    lost = [n for n, p in model.named_parameters() if not _is_finite(p)]
    for module in model.modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if all(_is_finite(t) for _, t in own):
            continue
        reset: Any = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        for name, t in own:
            if not _is_finite(t) and isinstance(t, nn.Parameter):
                _draw(name, t)
            elif not _is_finite(t) and name.startswith("running_"):
                t.fill_(float("var" in name))
    return lost


def forgetful(optimizer: Optimizer) -> Optimizer:
    """An optimizer of the same parameters and groups that has taken no step.

    Args:
        optimizer: left as it was.
    """
    found = copy.copy(optimizer)
    found.state = defaultdict(dict)
    return found


def first_lost_step(
    model: nn.Module, optimizer: Optimizer, batches: Iterable[Any], objective: Objective
) -> tuple[nn.Module, Any, list[float]] | None:
    """Take steps on a copy until the loss or a gradient is not finite.

    Args:
        model, optimizer: copied together; neither is changed.
        batches: used in turn.
        objective: gives the loss.

    Returns: the copy before that step, the batch, and the losses up to it; `None` where no step loses it.
    Raises: what a step or the copy raises.
    Cost: up to 60 training steps.
    """
    losses: list[float] = []
    with training(model):
        twin, stepper = copy.deepcopy((model, optimizer))
        for batch in islice(cycle(list(batches)), STEPS):
            stepper.zero_grad()
            with torch.enable_grad():
                total, units = objective.loss(twin, batch)
                loss = total / units
                if not math.isfinite(float(loss.detach())):
                    return twin, batch, losses
                if all(p.grad is None for p in twin.parameters()):
                    loss.backward()
            losses.append(float(loss.detach()))
            if not all(_is_finite(p.grad) for p in twin.parameters() if p.grad is not None):
                return twin, batch, losses
            stepper.step()
    return None


def _draw(name: str, p: Tensor) -> None:
    """The usual first values: by the fan of a matrix; of a vector ones where it multiplies, else zeros."""
    if p.ndim > 1:
        p.normal_(0.0, p[0].numel() ** -0.5)
    else:
        p.fill_(float(name.endswith("weight")))


def _is_finite(t: Tensor) -> bool:
    return not t.is_floating_point() or bool(t.isfinite().all())
