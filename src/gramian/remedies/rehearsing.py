"""A rehearsal: some training steps on copies, and the loss on the way."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from gramian.objective import Objective, as_objective
from gramian.recording.hooks import hooks
from gramian.recording.measuring import batch_statistics, eager, evaluating
from gramian.remedies.performing import Setting, perform
from gramian.report import Action
from gramian.seeding import seeded

__all__ = ["MOMENTS", "Measure", "Rehearsed", "rehearse"]

# Steps after which the loss is measured: faults of a trained network show at once, small networks overcome some others.
MOMENTS = (0, 12, 50)

# From so many batches on, the last quarter is held out, and the loss is measured there.
HELD_OUT = 4

FAILURES = (RuntimeError, ValueError, IndexError, ArithmeticError)


@dataclass(frozen=True)
class Measure:
    """How the loss is measured, so that trainings with and without a remedy are measured alike.

    Args:
        stored: whether batch norms use their stored statistics before any step, as for a finding about these, and not
            the batch's. Else a remedy that only renews the statistics seems to lower the loss, which a few steps do as
            well. After some steps they always use the stored ones, which both trainings have then renewed.
        after: an action that changes the loss itself, which is done to a copy of what is measured.
    """

    stored: bool = False
    after: Action | None = None

    def loss(self, setting: Setting, batches: Sequence[Any], step: int) -> float:
        """The mean loss over units in evaluation mode after so many steps; infinity where there is none."""
        measured = Setting(setting.model, list(batches), setting.objective)
        try:
            if self.after is not None:
                measured = perform(self.after, measured.copied())
            stored = self.stored or step > 0
            return loss_of(measured.model, measured.batches, as_objective(measured.objective), stored=stored)
        except FAILURES:
            return math.inf


class Rehearsed(list[float]):
    """The losses of a rehearsal, and beside them what the trained copy reaches without looking at its inputs.

    Attributes:
        plain: the loss at the end with each output in place of the mean output over samples; infinity where the outputs
            are no tensor, or the loss does not depend on them so.
    """

    plain: float = math.inf


def rehearse(
    setting: Setting, *, moments: Sequence[int] = MOMENTS, seed: int = 0, measure: Measure | None = None
) -> Rehearsed:
    """Train a copy for a few steps, and return its loss in evaluation mode after so many of them.

    The loss is measured on the last quarter of the batches, which are not trained on, where there are at least four;
    on all of them where there are fewer. The model trains in the mode in which it is; one that is in evaluation mode as
    a whole and has no optimizer is set to training.

    Args:
        setting: left as it is: the model, its optimizer, the random state. Without an optimizer, AdamW at torch's
            default rate is taken.
        moments: numbers of steps, increasing.
        seed: of the random state; the batches are used in their order for 0, and in a random order for others.
        measure: how the loss is measured.

    Returns:
        The mean loss over units at each moment; infinity where training or evaluation raises or gives what is not
        finite.

    Raises: nothing of its own.

    Cost: the training steps, a copy of the model and optimizer, and an evaluation at each moment.
    Source: this library's own.

    >>> torch.manual_seed(0) and None
    >>> x = torch.randn(8, 4)
    >>> net = nn.Linear(4, 2)
    >>> setting = Setting(net, [(x, x[:, :2])], Objective.regression(), torch.optim.SGD(net.parameters(), 0.1))
    >>> first, last = rehearse(setting, moments=(0, 20))
    >>> last < first
    True
    """
    objective = as_objective(setting.objective)
    num_held = len(setting.batches) // 4 if len(setting.batches) >= HELD_OUT else 0
    used = setting.batches[: len(setting.batches) - num_held]
    held = setting.batches[len(used) :] or used
    measure = measure or Measure()
    model, optimizer = copy.deepcopy((setting.model, setting.optimizer))
    trained = replace(setting, model=model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if optimizer is None and trainable:
        optimizer = AdamW(trainable)
        if not model.training:
            model.train()
    if optimizer is None:
        return Rehearsed([measure.loss(trained, held, 0)] * len(moments))
    order = torch.Generator().manual_seed(seed)
    losses = Rehearsed([measure.loss(trained, held, 0)] if 0 in moments else [])
    with seeded(seed), eager(), torch.enable_grad():
        try:
            for step in range(max(moments)):
                if step % len(used) == 0 and seed:
                    used = [used[i] for i in torch.randperm(len(used), generator=order).tolist()]
                optimizer.zero_grad()
                total, units = objective.loss(model, used[step % len(used)])
                (total / units).backward()
                optimizer.step()
                if step + 1 in moments:
                    losses.append(measure.loss(trained, held, step + 1))
        except FAILURES:  # as it would end the user's training
            pass
    if len(losses) == len(moments) and math.isfinite(losses[-1]):
        losses.plain = _plain(measure, trained, held, max(moments), losses[-1])
    losses.extend([math.inf] * (len(moments) - len(losses)))
    return losses


def _plain(measure: Measure, trained: Setting, batches: Sequence[Any], step: int, loss: float) -> float:
    """The loss of a model that gives each sample the mean output."""

    def averaged(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Tensor) and output.is_floating_point() and output.ndim:
            return output.mean(0, keepdim=True).expand_as(output)
        return None

    with hooks([trained.model.register_forward_hook(averaged)]):
        found = measure.loss(trained, batches, step)
    return found if found != loss else math.inf


def loss_of(model: nn.Module, batches: Sequence[Any], objective: Objective, *, stored: bool = False) -> float:
    """The mean loss over units in evaluation mode, with the stored statistics of batch norms or the batch's."""
    total, units = 0.0, 0.0
    with nullcontext() if stored else batch_statistics(model), evaluating(model), torch.enable_grad():
        for batch in batches:
            loss, count = objective.loss(model, batch)
            total, units = total + float(loss.detach()), units + float(count)
    mean = total / units if units else math.inf
    return mean if math.isfinite(mean) else math.inf
