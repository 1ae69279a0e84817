"""Losses that are highest at the labels, and labels that a loss adds up without learning anything from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gramian.batch import mapped
from gramian.inspection.experiments.prerequisites import are_normalized, others
from gramian.inspection.experiments.replay import Asked, Replay
from gramian.inspection.passes.batch_roles import given_of

__all__ = ["Peak", "at_labels"]

# Distances from the labels, in their size, and draws at each.
DISTANCES, DRAWS = (0.03, 0.1, 0.3), 3
# Samples that are too few; changes that are rounding, as a share of the largest.
LEAST, EQUAL = 4, 1e-5
# The share of what the loss differs by elsewhere by which it is higher at the labels.
HIGHER = 0.01


@dataclass(frozen=True)
class Peak:
    """What is wrong.

    Attributes:
        kind: "highest" (the loss falls whichever way outputs leave the labels), "added" (other labels change the loss
            and no gradient, and it is linear in the outputs).
        label: the tensor, as Python reads it off a batch.
        here, there: the loss at the labels, and the highest beside them; of "added", with these labels and with others.
    """

    kind: str
    label: str
    here: float
    there: float


def at_labels(asked: Asked) -> Peak | None:
    """Put the labels in place of the outputs, and others in place of the labels.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: a `Peak`, or `None`.
    Raises: what the model raises.
    Cost: two evaluations of the loss for each tensor of numbers that may be labels; some forty where it is high there.
    """
    replay = asked.replay
    if not replay.is_known or not replay.outputs or asked.seen.strangers:
        return None
    fed = {g.name for g in given_of(asked.seen.batches[:1], asked.seen.fed, set()) if g.is_input}
    is_linear: bool | None = None
    for one in given_of([asked.batch], set(), set()):
        t = one.values[0]
        if (
            not t.is_floating_point()
            or len(t) < LEAST
            or not bool(t.isfinite().all())
            or not float(t.min()) < float(t.max())
        ):
            continue
        if one.name not in fed:
            is_linear = _is_linear(replay) if is_linear is None else is_linear
            if is_linear and (found := _added(replay, t)) is not None:
                return Peak("added", one.name, replay.here, found)
        for i, columns in _places(replay.outputs, t):
            found = _highest(replay, i, columns, t)
            if found is not None and _is_compared(replay, t) and not _is_for_a_reward(replay, i, columns, t):
                return Peak("highest", one.name, *found)
    return None


def _is_compared(replay: Replay, t: Tensor) -> bool:
    """Whether the loss takes a tensor beside what the model makes of it."""
    batches = (mapped(replay.batch, lambda v, new=new: new if v is t else v) for new in others(t))
    return any(float(replay.loss(replay.outputs, b).detach()) != replay.here for b in batches)


def _is_for_a_reward(replay: Replay, i: int, columns: tuple[int, ...], t: Tensor) -> bool:
    """Whether a number of each sample decides if its output is to come near the label, as an advantage does.

    Then outputs of the samples with the largest, or the least, of these numbers do not lower the loss as they leave
    their labels.
    """
    for one in given_of([replay.batch], set(), set()):
        r = one.values[0]
        if r is t or not r.is_floating_point() or r.numel() != len(t) or not float(r.min()) < float(r.max()):
            continue
        above = r.flatten() > r.median()
        if any(_highest(replay, i, columns, t, rows) is None for rows in (above, ~above)):
            return True
    return False


def _is_linear(replay: Replay) -> bool:
    """Whether gradients are the same wherever the outputs are, and not zero."""
    slopes = replay.slopes
    largest = max(float(g.abs().amax()) for g in slopes)
    if not 0 < largest < math.inf:  # of a gradient that is not finite all others differ by nothing, relative to it
        return False
    for by in (-7.0, 0.3, 40.0):
        generator = torch.Generator().manual_seed(0)
        moved = [t + by * torch.randn(t.shape, generator=generator).to(t) for t in replay.outputs]
        pairs = zip(replay.gradients(moved), slopes, strict=True)
        if not all(float((a - b).abs().amax()) <= EQUAL * largest for a, b in pairs):
            return False
    return True


def _added(replay: Replay, t: Tensor) -> float | None:
    """The loss with other labels, where these change it and no gradient by the outputs."""
    largest = max(float(g.abs().amax()) for g in replay.slopes)
    there = replay.here
    for new in others(t):
        batch = mapped(replay.batch, lambda v, new=new: new if v is t else v)
        pairs = zip(replay.gradients(replay.outputs, batch), replay.slopes, strict=True)
        if not all(float((a - b).abs().amax()) <= EQUAL * largest for a, b in pairs):
            return None
        value = float(replay.loss(replay.outputs, batch).detach())
        there = value if abs(value - replay.here) > abs(there - replay.here) else there
    return there if abs(there - replay.here) > 10 * EQUAL * (1 + abs(replay.here)) else None


def _places(outputs: list[Tensor], t: Tensor) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Outputs of the labels' shape; where there are none, columns of outputs where each sample has one label."""
    able = [i for i, out in enumerate(outputs) if out.ndim and not are_normalized(out) and len(out) == len(t)]
    alike = [i for i in able if outputs[i].numel() == t.numel()]
    yield from ((i, ()) for i in alike)
    if not alike and t.numel() == len(t):
        for i in able:
            if outputs[i].ndim == 2 and outputs[i].shape[1] <= LEAST:
                yield from ((i, (c,)) for c in range(outputs[i].shape[1]))


def _highest(
    replay: Replay, i: int, columns: tuple[int, ...], t: Tensor, rows: Tensor | None = None
) -> tuple[float, float] | None:
    """The loss with labels in place of an output, and the highest beside it, where it falls as these rows leave."""
    out = replay.outputs[i]
    generator = torch.Generator().manual_seed(0)
    size = float(t.double().std()) or 1.0

    def at(values: Tensor) -> float:
        moved = out.clone()
        if columns:
            moved[:, columns[0]] = values.flatten().to(out)
        else:
            moved = values.reshape(out.shape).to(out)
        return replay.value([*replay.outputs[:i], moved, *replay.outputs[i + 1 :]])

    here, beside = at(t), []
    for far in reversed(DISTANCES):
        for _ in range(DRAWS):
            noise = torch.randn(t.shape, generator=generator).to(t) * (far * size)
            if rows is not None:
                noise[~rows] = 0.0
            for values in (t + noise, t - noise):
                beside.append(at(values))
                if not beside[-1] < here:
                    return None
    spread = here - min(beside)
    # A mean falls too where labels are no minimum of it, but not on both sides of them, and not ever more.
    return (here, max(beside)) if here - max(beside) > 0 and spread > HIGHER * abs(here) + EQUAL else None
