"""Matrices that started at zero and are as large as the steps that were made: no fault, as at zero they were none."""

from __future__ import annotations

import math

from torch import Tensor

from gramian.inspection.causes.context import Context
from gramian.inspection.causes.sizes import SMALLEST

__all__ = ["grows_from_zero", "opening_matrices"]

# Root mean square of an entry, in steps of Adam's size: at most one for each step made, and at least this share of the
# root of their number, which steps without a direction add up to. The first has room for other optimizers' steps.
MOST, LEAST = 1.5, 0.25


def grows_from_zero(context: Context, name: str, w: Tensor) -> bool:
    """Whether a matrix, still small, was zero when a watch began, or is what the optimizer's steps would have made it.

    Args:
        context: with the optimizer, where there is one.
        name, w: the parameter.

    Returns: false without a gradient, which would let it stay as it is, and for what an optimizer without a count of
        its steps has made since a watch began with other values.
    Cost: reads one number from the device.
    Source: this library's own; steps of Adam: Kingma & Ba 1412.6980, section 2.1.
    """
    rms = float(w.float().square().mean().sqrt())
    if not context.observed.gradients.get(name) or not 0 < rms * math.sqrt(w.numel() // max(1, len(w))) < SMALLEST:
        return False
    if name in context.began_at_zero:
        return True
    if context.optimizer is None or name not in context.groups:
        return False
    num, group = context.optimizer.state.get(context.parameters[name], {}).get("step", 0), context.groups[name]
    rate = max(float(group["lr"]), float(group.get("initial_lr", 0.0)))
    return LEAST * float(group["lr"]) * math.sqrt(float(num)) <= rms <= MOST * rate * float(num)


def opening_matrices(context: Context) -> frozenset[str]:
    """The names of the used parameters that `grows_from_zero` tells, which let little pass so far.

    Args:
        context: as for `grows_from_zero`.
    """
    used = context.observed.used
    return frozenset(b.name for b, w in context.values() if b.name in used and grows_from_zero(context, b.name, w))
