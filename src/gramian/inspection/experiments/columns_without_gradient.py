"""Columns of the outputs that get no gradient, though the loss depends on them."""

from __future__ import annotations

import math

import torch

from gramian.inspection.experiments.replay import Asked

__all__ = ["silent_columns"]

# Losses that are equal up to rounding, as a share of the largest.
EQUAL = 1e-4
# Columns of an output that are looked at, and by how much they are moved, in their size.
COLUMNS, STEP = 16, 0.05
# The size that a loss is given, so that none of its gradients that count are zero in half precision.
LARGE = 2.0**10


def silent_columns(asked: Asked) -> tuple[int, int] | None:
    """A column of the outputs whose gradient is zero for all samples, though the loss changes smoothly with it.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: which, and of how many; `None` where there is none.
    Raises: what the model raises.
    Cost: a few evaluations of the loss.
    Source: this library's own.
    """
    replay = asked.replay
    if not replay.is_known or len(replay.outputs) != 1 or replay.outputs[0].ndim != 2:
        return None
    out = replay.outputs[0]
    num = out.shape[1]
    if not 2 <= num <= COLUMNS:
        return None
    here = replay.here
    scale = LARGE / abs(here) if here and math.isfinite(here) else 1.0
    still = ~replay.gradients([out], scale=scale)[0].ne(0).any(0)
    if bool(still.all()) or not bool(still.any()):
        return None
    for column in still.nonzero().flatten().tolist():
        step = torch.zeros_like(out)
        step[:, column] = STEP * (1.0 + float(out[:, column].abs().mean()))
        up, down = replay.value([out + step]) - here, replay.value([out - step]) - here
        if min(abs(up), abs(down)) > EQUAL * abs(here):  # not at a step that nothing but a count has
            return column, num
    return None
