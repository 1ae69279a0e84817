"""A learning rate before training: curvature along the optimizer's own direction, and a rehearsal of a few steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn

from gramian.calls import as_model, prepared
from gramian.errors import InputError
from gramian.loader import as_batches, is_one_batch, looks_like_one, no_batches
from gramian.objective import Objective
from gramian.optim.given import EXAMPLE, given
from gramian.optim.learning_rate import LearningRate
from gramian.optim.rehearsals import NUM_STEPS, Make, Rehearsals, kept
from gramian.recording.measuring import eager

__all__ = ["is_confirmed", "suggest_lr"]

JUDGES = 4
"""Batches that judge a suggested rate in turn."""
T_95 = {2: 6.314, 3: 2.920, 4: 2.353}
"""The 0.95 quantile of Student's t for the mean of so many."""


def suggest_lr(
    model: nn.Module,
    batch: Any,
    objective: Objective | Callable,
    *,
    optimizer: str | type[torch.optim.Optimizer] | Make = "auto",
    num_steps: int = NUM_STEPS,
    progress: Callable[[float, float], None] | None = None,
) -> LearningRate:
    """A learning rate for a model, from the curvature along the optimizer's own direction and short rehearsals.

    With D the optimizer's first direction (of all parameters whose rate follows `lr`) and G the Gauss–Newton matrix,
    `η* = gᵀD / (DᵀGD)` is where the loss along D is lowest to second order. Training is then rehearsed for `num_steps`
    steps at η*, with a warm-up over the first quarter, and at three half-decades above and below, and further until the
    best rate lies between worse ones, judged by the loss of a batch on which no step was taken. The suggestion is 0.7
    of the best rehearsed rate (interpolated by a parabola over its logarithm), since a short run tolerates larger steps
    than a long one; or the best rate itself, where that gains less than half as much. A gain of less than 1e-5 of the
    loss is taken for rounding, and is none.

    What a matrix optimizer steps at a rate of its own (embeddings, the head, vectors) may learn all in so few steps.
    Where no rate adds a hundredth to that, it is rehearsed again with these moving in every fourth step only, and at
    last not at all; `why` says so.

    Args:
        model: in the mode in which it is to be trained. Weights, buffers, gradients, mode and random state are restored
            afterwards.
        batch: one batch, or many: a `DataLoader`, a list, or another iterable, of which the first `num_steps + 1` are
            read. The last one read judges, the others train. Give several: with only one, the rate is that of a
            gradient without noise. A tuple and a mapping are one batch, and so is a list `[x, y]` of tensors that
            cannot both be inputs; two of one shape are read as two batches, with a warning.
        objective: `gm.Objective`, or `loss(model, batch) -> scalar mean` (the Hessian then takes G's place).
        optimizer: `"auto"`, as in `gm.train`, another name of `gm.optim.OPTIMIZERS`, a class, or a function
            `(model, lr) -> optimizer`, such as `partial(gm.optim.Muon, scale="match_rms_adamw")`.
        num_steps: number of steps of a rehearsal. Much fewer than 16 mislead: rates that are too small then look best.
        progress: called after each rehearsal with its rate and the held-out loss after it.
    Returns: a `LearningRate`, whose `lr` is the suggestion.
    Raises:
        InputError: for a model without trainable weights or, for a matrix optimizer, without a matrix; a loss or
            gradient that is not finite, or zero; a direction along which the loss does not fall at any rate.
        UnsupportedError: for an operation without a second derivative, sharded parameters, and optimizers whose step
            depends on the weights.
    Cost: about `9 · num_steps` training steps. Accuracy: see docs/measured/learning_rates.md.
    Source: the line minimum under Gauss–Newton: Martens (1412.1193), §6.4; held-out batches against noise: this
    library's own measurements.

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
    batches = [prepared(model, one) for one in _batches(batch, num_steps + 1)]
    with eager(), kept(model) as restore:
        return Rehearsals(model, batches, objective, make, num_steps, restore, progress).suggestion()


def is_confirmed(
    model: nn.Module, batches: Sequence[Any], objective: Objective | Callable, *, optimizer: Any, lr: float
) -> bool:
    """Whether a suggested rate gains on other batches than the one that chose it, by more than their noise.

    The best of many rehearsals gains on its held-out batch even where all differences are noise. So up to four of the
    other batches judge in turn, with the rest to train on, and the mean of the gains must be above zero by a one-sided
    t-test at 95 % (one gain alone: above zero), at one of the paces of the rest of the model.

    Args:
        model, objective, optimizer: as of `suggest_lr`.
        batches: those that it had; two or more.
        lr: its suggestion.
    Returns: whether the rate gains.
    Cost: four rehearsals for a vector optimizer; up to twenty for a matrix optimizer.
    """
    make = _maker(optimizer)
    batches = [prepared(model, one) for one in batches]
    judged = []
    with eager():
        for k in range(1, min(JUDGES, len(batches) - 1) + 1):
            turned = [*batches[k:], *batches[:k]]
            with kept(model) as restore:
                judged.append(Rehearsals(model, turned, objective, make, NUM_STEPS, restore).gains(lr))
    return any(_is_above_zero(gains) for gains in zip(*judged, strict=True))


def _is_above_zero(gains: Sequence[float]) -> bool:
    if not all(math.isfinite(gain) for gain in gains):
        return False
    if len(gains) == 1:
        return gains[0] > 0
    return fmean(gains) > T_95[len(gains)] * stdev(gains) / len(gains) ** 0.5


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
