"""Losses of overlap with classes, as Dice's: whether one is lowest where outputs name other classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.batch import mapped
from gramian.inspection.experiments.replay import Replay

__all__ = ["opposed"]

# Scores that are clear, and far beyond: a loss of overlap has little more to gain there.
CLEAR, FAR = 6.0, 60.0
# Probabilities of what is named, and in sum of the rest.
SURE = 0.98
# Values of a term that are equal, as a share of what it may change by, and those that are not; and by how much it may
# change beyond clear scores if it is bounded.
EQUAL, CLEARLY, BOUNDED = 0.02, 0.1, 0.5


def opposed(replay: Replay, t: Tensor, i: int, dim: int) -> tuple[float, float, float] | None:
    """A term that is highest with outputs as classes say, and equally low with any others.

    Energies and distances too are low for the right class; but with them a wrong class is worse than none, and far
    numbers are worse than clear ones. A term of which that cannot be told, as of two classes, is none.

    Args:
        replay: the loss as a function of the outputs.
        t: classes, of the shape of the output without its classes; others than its numbers do not count.
        i: which output.
        dim: of its classes, three or more.

    Returns: the term as it is, with outputs as the labels say, and with others; `None` where there is none.
    Raises: what the loss raises.
    Cost: seven evaluations of the loss.
    Source: this library's own; Milletari et al. 1606.04797 for the loss.
    """
    out = replay.outputs[i]
    num = out.shape[dim]
    if num < 3 or out.shape[:dim] + out.shape[dim + 1 :] != t.shape or not bool(((t >= 0) & (t < num)).any()):
        return None
    are_probabilities = bool((out >= 0).all()) and bool(((out.sum(dim) - 1).abs() < 1e-3).all())

    def terms(classes: Tensor, size: float = CLEAR, labels: Tensor = t) -> list[float]:
        named = F.one_hot(classes.long().remainder(num), num).movedim(-1, dim).to(out)
        values = named * size
        if are_probabilities:
            share = SURE if size > 0 else 0.0
            values = named * share + (1 - named) * (1 - share) / (num - 1)
        batch = replay.batch if labels is t else mapped(replay.batch, lambda v: labels if v is t else v)
        return replay.terms([*replay.outputs[:i], values, *replay.outputs[i + 1 :]], batch)

    moved = torch.where((t >= 0) & (t < num), (t + 1).remainder(num), t).to(t.dtype)
    right, far, of_others = terms(t), terms(t, FAR), terms(t, labels=moved)
    wrong = [terms(t + 1), terms(t + 2), terms(t, -CLEAR)]
    now = replay.terms(replay.outputs)
    if len({len(run) for run in (right, far, of_others, now, *wrong)}) > 1:
        return None
    for k, here in enumerate(now):
        low = [run[k] for run in wrong]
        span = right[k] - min(low)
        is_reversed = span > 0 and right[k] > here + CLEARLY * span and max(low) < here - CLEARLY * span
        is_even = max(low) - min(low) <= EQUAL * span and abs(far[k] - right[k]) <= BOUNDED * span
        if is_reversed and is_even and right[k] - of_others[k] > CLEARLY * span:
            return here, right[k], max(low)
    return None
