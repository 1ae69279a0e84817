"""A learning rate before training: the usual one, corrected by a few rehearsed steps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import nn

from gramian.calls import as_model, prepared
from gramian.errors import InputError
from gramian.loader import as_batches, is_one_batch, looks_like_one, no_batches
from gramian.objective import Objective
from gramian.optim.given_optimizer import EXAMPLE, given
from gramian.optim.learning_rate import LearningRate
from gramian.optim.rehearsals import JUDGES, NUM_STEPS, Make, Rehearsals, kept
from gramian.recording.measuring import eager

__all__ = ["suggest_lr"]


def suggest_lr(
    model: nn.Module,
    batch: Any,
    objective: Objective | Callable,
    *,
    optimizer: str | type[torch.optim.Optimizer] | Make = "auto",
    num_steps: int = NUM_STEPS,
    progress: Callable[[float, float], None] | None = None,
) -> LearningRate:
    """A learning rate for a model: the optimizer's usual one, corrected by short rehearsals at a few rates.

    Training is rehearsed for `num_steps` steps at a start and at half-decades above it, until the loss of batches on
    which no step is taken falls by less than 80 % of the most; and below it, where smaller rates gain more. Let t be
    the largest rate that gains 80 %, interpolated.

    - `Muon` and `BalancedMuon` have a usual rate u for each model, which is the start. The suggestion is
      `0.8 · u^⅔ · t^⅓`, at most 0.8 t: what so few steps tell of a longer run is less certain than what is usual.
    - Other matrix optimizers start at their usual rate, and any other optimizer where its first step moves the median
      matrix by a tenth of its norm, whatever the unit of its rate is. The suggestion is `0.5 t`.

    Args:
        model: in the mode in which it is to be trained. Weights, buffers, gradients, mode and random state are restored
            afterwards.
        batch: one batch, or many: a `DataLoader`, a list, or another iterable, of which the first `num_steps + 4` are
            read. The last third of them, at most four, judges, the others train. Give several: with only one, the rate
            is that of a gradient without noise. A tuple and a mapping are one batch, and so is a list `[x, y]` of
            tensors that cannot both be inputs; two of one shape are read as two batches, with a warning.
        objective: `gm.Objective`, or `loss(model, batch) -> scalar mean`.
        optimizer: `"auto"`, as in `gm.train`, another name of `gm.optim.OPTIMIZERS`, a class, or a function
            `(model, lr) -> optimizer`, such as `partial(gm.optim.Muon, scale="match_rms_adamw")`.
        num_steps: number of steps of a rehearsal.
        progress: called after each rehearsal with its rate and the held-out loss after it.
    Returns: a `LearningRate`, whose `lr` is the suggestion.
    Raises:
        InputError: for a model without trainable weights or, for a matrix optimizer, without a matrix; a loss or
            gradient that is not finite, or zero; a loss that no rehearsed rate lowers by more than the noise among the
            batches that judge.
        UnsupportedError: for sharded parameters, and optimizers whose step depends on the weights.
    Cost: usually four rehearsals, at most six where one gains, so 35 to 55 training steps. Accuracy: see
        docs/measured/learning_rates.md.
    Source: this library's own measurements.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> batches = [(x[:32], x[:32, :2]), (x[32:], x[32:, :2])]
    >>> found = suggest_lr(net, batches, Objective.regression(), optimizer="adamw")
    >>> found.range[0] <= found.lr <= found.range[1]
    True
    """
    if num_steps < 1:
        raise InputError(f"suggest_lr: num_steps must be at least 1, got {num_steps}")
    model, make = as_model(model, "suggest_lr"), _maker(optimizer)
    batches = [prepared(model, one) for one in _batches(batch, num_steps + JUDGES)]
    with eager(), kept(model) as restore:
        return Rehearsals(model, batches, objective, make, num_steps, restore, progress).suggestion()


def _batches(batch: Any, num: int) -> list[Any]:
    """At most `num` batches; a tuple is one, and so is a list that looks like one.

    A loader's order does not change the seeds.
    """
    if isinstance(batch, tuple) or is_one_batch(batch) or looks_like_one(batch):
        return [batch]
    with torch.random.fork_rng(devices=[]):
        found = list(islice(as_batches(batch, "suggest_lr"), num))
    if not found:
        raise no_batches(batch, "suggest_lr")
    return found


def _maker(optimizer: Any) -> Make:
    """`(model, lr) -> optimizer` for a name, a class or a function."""
    found = given("suggest_lr", optimizer)
    if not found.takes_rate:
        raise InputError(
            f"suggest_lr: {found.name} takes no rate, so none can be tried. Give a function of the model and the rate: "
            f"{EXAMPLE}"
        )
    return found.make
