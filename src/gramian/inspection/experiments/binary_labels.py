"""Losses of labels of two values: what they do far on the right side, and with one of the two alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gramian.batch import mapped
from gramian.inspection.experiments.prerequisites import are_bounded, uses_a_network
from gramian.inspection.experiments.replay import Asked, Replay
from gramian.inspection.passes.batch_roles import Given, given_of

__all__ = ["TwoValues", "of_two_values"]

# Scores that are clearly right or wrong, and far.
CLEAR, FAR = 6.0, 60.0
# Slopes beside that on the wrong side: above the first the loss falls on, below the second it has an end.
FALLS, ENDS = 0.02, 1e-3
# Losses that are equal up to rounding, as a share of the largest.
EQUAL = 1e-5


@dataclass(frozen=True)
class TwoValues:
    """What is wrong.

    Attributes:
        kind: "encoded" (the loss has an end on the right side with 0 and 1 in place of the labels, and none with
            these), "endless" (it has none), "alone" (outputs at one of the values have no effect, and at the other one
            all are pushed one way), "even" (outputs of the right sign and of the wrong one give one loss).
        label: the tensor, as Python reads it off a batch.
        values: the two labels.
        losses: as it is, clearly right, and far on the right side; for "even" clearly wrong in the end.
        target: for "alone", the value without effect.
    """

    kind: str
    label: str
    values: tuple[float, float]
    losses: tuple[float, ...]
    target: float = 0.0


def of_two_values(asked: Asked) -> TwoValues | None:
    """Put outputs where labels of two values say, near and far, and on the wrong side.

    A mask has two values too, and what it hides has no effect: so one value alone is told only where outputs at the
    other one have no minimum.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: a `TwoValues`, or `None`.
    Raises: what the model raises.
    Cost: four evaluations of the loss for each tensor of two values of an output's size; some ten where it is wrong.
    """
    replay = asked.replay
    if not replay.is_known or not replay.outputs or asked.seen.strangers or are_bounded(asked):
        return None
    fed = {g.name for g in given_of(asked.seen.batches[:1], asked.seen.fed, set()) if g.is_input}
    labels = [g for g in given_of([asked.batch], set(), set()) if g.name not in fed and fed]
    for one in labels:
        t = one.values[0]
        low, high = float(t.min()), float(t.max())
        if not t.is_floating_point() or not low < high or not bool(((t == low) | (t == high)).all()):
            continue
        for i, out in enumerate(replay.outputs):
            if out.numel() != t.numel() or len(out) != len(t) or out.shape[-1] == 0:
                continue
            found = _asked_of(replay, one, i, (low, high), is_only=len(labels) == 1)
            if found is not None:
                return found if not uses_a_network(replay) else None
    return None


def _asked_of(replay: Replay, label: Given, i: int, values: tuple[float, float], *, is_only: bool) -> TwoValues | None:
    t, out = label.values[0], replay.outputs[i]
    is_high = (t == values[1]).reshape(out.shape)
    side = torch.where(is_high, 1.0, -1.0).to(out)

    def at(size: float, which: Tensor | None = None) -> list[Tensor]:
        moved = side * size if which is None else torch.where(which, side * size, out)
        return [*replay.outputs[:i], moved, *replay.outputs[i + 1 :]]

    right, far, wrong, far_wrong = (replay.value(at(size)) for size in (CLEAR, FAR, -CLEAR, -FAR))
    on, off = (right - far) / (FAR - CLEAR), (far_wrong - wrong) / (FAR - CLEAR)
    told = {"label": label.name, "values": values}
    size = max(map(abs, (right, far, wrong, far_wrong, replay.here)))
    if not math.isfinite(size):
        return None
    goes_on = right - far > abs(replay.here)  # where both ends are flat, their slopes tell nothing
    if is_only and goes_on and FALLS * off < on < 0.99 * off:
        return _endless(replay, label, at(CLEAR), at(FAR), off, values, (replay.here, right, far))
    if is_only and abs(right - wrong) <= EQUAL * size and abs(far - far_wrong) <= EQUAL * size:
        moves = abs(right - replay.here) > 1e3 * EQUAL * size
        return TwoValues("even", **told, losses=(replay.here, right, far, wrong)) if moves else None
    for which in (True, False):
        rows = is_high if which else ~is_high
        ends = [replay.value(at(by, rows)) for by in (CLEAR, -CLEAR, FAR)]
        if all(abs(v - replay.here) <= EQUAL * abs(replay.here) for v in ends) and _go_one_way(replay, i, ~rows):
            return TwoValues("alone", **told, losses=(replay.here,), target=values[which])
    return None


def _endless(
    replay: Replay,
    label: Given,
    near: list[Tensor],
    far: list[Tensor],
    off: float,
    values: tuple[float, float],
    losses: tuple[float, ...],
) -> TwoValues:
    """Whether 0 and 1 in place of the labels give the loss an end."""
    t = label.values[0]
    encoded = ((t - values[0]) / (values[1] - values[0])).to(t)
    batch = mapped(replay.batch, lambda v: encoded if v is t else v)
    one, two = (float(replay.loss(outputs, batch).detach()) for outputs in (near, far))
    has_end = (one - two) / (FAR - CLEAR) <= ENDS * off and values != (0.0, 1.0)
    return TwoValues("encoded" if has_end else "endless", label.name, values, losses)


def _go_one_way(replay: Replay, i: int, rows: Tensor) -> bool:
    """Whether outputs in these rows are pushed one way, wherever they are."""
    slopes = []
    for by in (-FAR, -CLEAR, 0.0, CLEAR, FAR):
        moved = torch.where(rows, replay.outputs[i] + by, replay.outputs[i])
        slopes.append(replay.gradients([*replay.outputs[:i], moved, *replay.outputs[i + 1 :]])[i][rows])
    g = torch.stack(slopes)
    return bool(g.any()) and (bool((g >= 0).all()) or bool((g <= 0).all()))
