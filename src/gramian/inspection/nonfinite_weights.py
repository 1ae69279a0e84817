"""Weights that are NaN or infinite: what makes them so, looked for with others in their place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gramian.inspection.causes import Context, ordered
from gramian.inspection.causes.loss import non_finite
from gramian.inspection.causes.wiring import numbers
from gramian.inspection.experiments.replaced_weights import DIVERGES, first_lost_step, forgetful, renew
from gramian.inspection.passes.watched_steps import observe
from gramian.objective import Objective
from gramian.recording.kept_state import keeping
from gramian.report import Finding

__all__ = ["find_loss_of_weights", "lost_in_steps"]

# A loss that rises to this many times its first value, or by this much, diverges.
RISES = 3.0

# Findings that make weights NaN or infinite.
_BREAKING = frozenset((
    "gradient-overflow", "loss-non-finite", "attention-masked", "rate-too-high", "loss-summed", "loss-unbounded",
    "loss-maximized", "loss-term-missing", "input-scale", "labels-scale", "parameter-float16", "gain-above-one",
    "residual-growth", "gradient-explodes", "parameter-scale-large", "embedding-scale",
))  # fmt: skip


def find_loss_of_weights(
    model: nn.Module,
    batches: list[Any],
    objective: Objective,
    optimizer: Optimizer | None,
    look: Callable[[Optimizer | None], list[Finding]],
) -> list[Finding]:
    """The causes found once weights that are not finite are drawn anew, and else in steps from there.

    Args:
        model: its lost weights are replaced in place; what it was is the caller's to keep.
        batches, objective: as in `inspect`.
        optimizer: of the run; it is asked without its moments, which are lost too.
        look: the whole diagnosis, with this optimizer.

    Returns: errors that make weights NaN, the first one first; none where no weight was lost, or no cause is seen.
    Raises: what the diagnosis raises.
    Cost: that of the diagnosis, and up to 60 training steps where it finds nothing.
    """
    lost = renew(model)
    if not lost:
        return []
    fresh = None if optimizer is None else forgetful(optimizer)
    found = [f for f in ordered(look(fresh)) if f.code in _BREAKING and f.severity == "error"]
    when = f"with new values for {len(lost)} parameters that are NaN or infinite"
    if not found and fresh is not None:
        with suppress(Exception):  # a loss that differentiates on its way, or an optimizer that cannot be copied
            found, step = _in_steps(model, batches, objective, fresh)
            when = f"{when}, {step}"
    return [replace(one, evidence=f"{when}: {one.evidence}") for one in found]


def lost_in_steps(
    model: nn.Module, optimizer: Optimizer, batches: list[Any], objective: Objective, losses: Sequence[float]
) -> list[Finding]:
    """What makes the loss of steps not finite that has not risen before.

    Args:
        model, optimizer: neither is changed.
        batches, objective: as in `inspect`.
        losses: of a few steps.

    Returns: one finding, or none.
    Raises: what a step raises.
    Cost: nothing where all are finite; else as many steps once more, and one that is watched.
    """
    before = list(takewhile(math.isfinite, losses))
    if not before or len(before) == len(losses) or max(before) > max(RISES * before[0], before[0] + RISES):
        return []
    found, when = _in_steps(model, batches, objective, optimizer)
    return [replace(one, evidence=f"{when}: {one.evidence}") for one in found]


def _in_steps(
    model: nn.Module, batches: list[Any], objective: Objective, optimizer: Optimizer
) -> tuple[list[Finding], str]:
    """What is seen at the first step whose loss or gradient is not finite, and when that is."""
    end = first_lost_step(model, optimizer, batches, objective)
    if end is None:
        return [], ""
    twin, batch, losses = end
    when = f"in step {len(losses) + 1} of a copy"
    if losses and max(losses) > DIVERGES * abs(losses[0]):
        told = f"the loss rises from {losses[0]:.3g} to {max(losses):.3g} before it is not finite"
        cause = "The rate is too large for this model."
        return [
            Finding(
                "rate-too-high",
                "error",
                "The loss rises in the optimizer's first steps",
                where="optimizer",
                evidence=told,
                cause=cause,
                advice="Divide the rate by 10 or more, or call gm.suggest_lr.",
            )
        ], when
    with keeping(twin, objective.predict, objective.criterion):
        context = Context(twin, observe(twin, [batch], objective))
    return [*non_finite(context), *(f for f in numbers(context) if f.code == "gradient-overflow")], when
