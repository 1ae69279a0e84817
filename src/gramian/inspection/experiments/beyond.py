"""Whether a loss has its minimum beyond the ends between which the outputs are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gramian.inspection.experiments.replaying import Asked
from gramian.inspection.passes.given import given_of

__all__ = ["beyond_ends"]

# How far beyond an end the minimum is looked for, in the span of the labels.
FAR = 2.0


def beyond_ends(asked: Asked) -> tuple[float, str] | None:
    """The share of the first output's numbers whose loss falls up to the end of their range, and rises far beyond it.

    All are set to the end, and then to a number beyond all labels, with the slope of the loss by each. A logarithm of a
    probability falls on beyond its end, and does not count.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: the share of the numbers on which the loss depends, and the labels' name; `None` where the outputs have no
        ends, or the batch no numbers beside the inputs that lie beyond them.
    Raises: what the model raises.
    Cost: up to six evaluations of the loss and its gradient.
    Source: this library's own.
    """
    replay, seen, ends = asked.replay, asked.seen, asked.seen.ends
    if ends is None or not replay.is_known or not replay.outputs or seen.strangers:
        return None
    fed = {g.name for g in given_of(seen.batches[:1], seen.fed, set()) if g.is_input}
    others = [g for g in given_of([asked.batch], set(), set()) if g.name not in fed]
    numbers = [g for g in others if g.values[0].is_floating_point() and bool(g.values[0].isfinite().all())]
    lowest = min((float(g.values[0].min()) for g in numbers), default=math.inf)
    highest = max((float(g.values[0].max()) for g in numbers), default=-math.inf)
    if lowest >= ends.low and highest <= ends.high:
        return None
    first, rest = replay.outputs[0], replay.outputs[1:]
    span = max(highest - lowest, 1.0)

    def slopes(value: float) -> Tensor:
        outputs = [first.new_full(first.shape, value), *rest]
        found = replay.gradients(outputs)[0]
        return found if math.isfinite(replay.value(outputs)) else torch.zeros_like(found)  # a logarithm, below zero

    counted = replay.slopes[0] != 0
    wrong = counted & False
    for end, side, far in ((ends.low, 1, lowest - FAR * span), (ends.high, -1, highest + FAR * span)):
        if math.isfinite(end) and (far < end if side > 0 else far > end):
            here, there = slopes(end), slopes(far)
            counted = counted | (here != 0)
            wrong = wrong | ((side * here > 0) & (side * there < 0))
    num = int(counted.sum())
    farthest = max(numbers, key=lambda g: float(g.values[0].abs().max())).name
    return (int(wrong.sum()) / num, farthest) if num else None
