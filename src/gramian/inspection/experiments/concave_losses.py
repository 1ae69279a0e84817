"""Losses that are concave in the outputs: such a function has no minimum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gramian.inspection.experiments.prerequisites import are_bounded, labels_of_loss, uses_a_network
from gramian.inspection.experiments.replay import Asked

__all__ = ["Concave", "is_concave"]

# Lines through the outputs, and places on them, in the outputs' size: the farthest tell what has an end.
LINES, PLACES = 6, (-100.0, -10.0, -3.0, -1.0, 0.0, 1.0, 3.0, 10.0, 100.0)
# A bend below this share of what the loss changes is rounding.
ROUNDING = 1e-4
# Numbers of the outputs that are too many to be asked.
MOST = 200_000


@dataclass(frozen=True)
class Concave:
    """The loss as it is, and on the lowest of the lines, at both of its ends."""

    here: float
    below: float
    above: float


def is_concave(asked: Asked) -> Concave | None:
    """Whether the loss lies above its chords along random lines, and bends somewhere.

    A concave function that is not constant falls without end on one side at least. Of the losses that are minimized
    squares, absolute values, likelihoods of exponential families, hinges and rankings are convex; what comes of other
    networks, of normalized outputs, or with choices or negative rewards may be concave and well.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: a `Concave`, or `None`.
    Raises: what the model raises.
    Cost: two evaluations of the loss where it is convex, else some sixty.
    """
    replay = asked.replay
    outputs = [t for t in replay.outputs if t.numel()]
    if not replay.is_known or not outputs or sum(t.numel() for t in outputs) > MOST or asked.seen.strangers:
        return None
    if are_bounded(asked):
        return None
    size = 1.0 + max(float(t.abs().amax()) for t in outputs)
    generator = torch.Generator().manual_seed(0)
    lowest: Concave | None = None
    bends = 0
    for _ in range(LINES):
        line = _line(replay.outputs, generator)

        def at(by: float, line: list[Tensor] = line) -> float:
            return replay.value([t + by * size * d for t, d in zip(replay.outputs, line, strict=True)])

        if at(-PLACES[-2]) + at(PLACES[-2]) > 2 * replay.here:  # as of most
            return None
        values = [replay.here if by == 0 else at(by) for by in PLACES]
        bent = _bent(values)
        if bent is None:
            return None
        bends += bent
        if lowest is None or min(values) < min(lowest.below, lowest.above):
            lowest = Concave(replay.here, values[0], values[-1])
    if lowest is None or bends < LINES // 2 or uses_a_network(replay):
        return None
    return lowest if _may_be_told(asked) else None


def _line(outputs: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """A random direction; outputs that are the same, of two calls with the same inputs, go the same way."""
    found: list[Tensor] = []
    for i, t in enumerate(outputs):
        same = next((k for k in range(i) if outputs[k].shape == t.shape and torch.equal(outputs[k], t)), None)
        found.append(found[same] if same is not None else torch.randn(t.shape, generator=generator).to(t))
    return found


def _bent(values: Sequence[float]) -> bool | None:
    """Whether losses along a line fall off from a chord; `None` where one lies below a chord."""
    change = max(abs(v - values[len(values) // 2]) for v in values)
    slopes = [(b - a) / (y - x) for (x, a), (y, b) in pairwise(zip(PLACES, values, strict=True))]
    rounding = ROUNDING * change / (PLACES[-1] - PLACES[0])
    near = ROUNDING * max(map(abs, slopes))
    if not all(b <= a + max(near, rounding) for a, b in pairwise(slopes)):
        return None
    return slopes[0] - slopes[-1] > 100 * near


def _may_be_told(asked: Asked) -> bool:
    """Whether neither choices nor rewards are why, nor a generator whose outputs all go one way."""
    labels = [one.values[0] for one, _ in labels_of_loss(asked)]
    if any(not t.is_floating_point() or not bool((t > 0).any()) for t in labels):
        return False
    if labels:
        return True
    slopes = torch.cat([g.flatten() for g in asked.replay.slopes])
    return _both(slopes)


def _both(slopes: Tensor) -> bool:
    return bool((slopes > 0).any()) and bool((slopes < 0).any())
