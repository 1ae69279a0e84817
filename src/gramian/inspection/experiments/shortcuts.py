"""Losses that outputs can make as small as they like without a look at the inputs or the labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gramian.inspection.experiments.prerequisites import (
    along_rows,
    are_bounded,
    are_normalized,
    labels_of_loss,
    takes_only_outputs,
    uses_a_network,
)
from gramian.inspection.experiments.replay import Asked, Replay

__all__ = ["OneWay", "Shortcut", "one_way", "shortcut"]

# How far all outputs are moved, or how much larger they become.
LEVELS = (-60.0, -6.0, -1.0, 0.0, 1.0, 6.0, 60.0)
SIZES = (1.0, 3.0, 10.0, 30.0)
# Numbers of an embedding, draws of random ones, and samples that are too few.
NARROW, DRAWS, LEAST = 4, 4, 4
# A slope below this share of the largest has ended; losses that are equal up to rounding.
ENDED, EQUAL, ROUNDING = 1e-3, 1e-4, 1e-6
# Columns of an output that are looked at one by one, and in halves or thirds; what may be left of what labels change of
# the loss, and of its gradient.
COLUMNS, WIDE, KEPT, STILL = 4, 48, 0.02, 0.1
# How far a column is moved: through an exponential, and through a softplus.
FAR = (12.0, 1000.0)
# Where a column may have to be for the loss to be least at the labels.
LEVELS_OF_PART = (-6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0)


@dataclass(frozen=True)
class OneWay:
    """The loss as it is, and with large outputs that are the same for all samples, where it is least."""

    here: float
    there: float
    is_up: bool
    are_embeddings: bool = False


def one_way(asked: Asked) -> OneWay | None:
    """Whether a loss that takes outputs and nothing else is least where all samples have one large output.

    Single scores: all are moved together, and all slopes have one sign wherever they are, up to where they end.
    Embeddings: all are one random row, which grows, and the loss falls to below what others reach.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: a `OneWay`, or `None`.
    Raises: what the model raises.
    Cost: a few evaluations of the loss and its gradient; some forty more of embeddings without a slope elsewhere.
    """
    replay = asked.replay
    outputs = replay.outputs
    if not replay.is_known or not outputs or are_bounded(asked) or asked.seen.strangers:
        return None
    if any(t.ndim < 1 or len(t) < LEAST for t in outputs) or any(not p.requires_grad for p in asked.model.parameters()):
        return None
    if any(replay.depends_on(i, outputs[i].roll(1, 0)) for i in replay.stopped):
        return None  # a target, which no gradient brings along
    if all(t.numel() == len(t) for t in outputs):
        found = _of_scores(replay)
    elif all(t.ndim == 2 and t.shape[1] >= NARROW for t in outputs):
        found = _of_embeddings(replay)
    else:
        return None
    return found if found is not None and takes_only_outputs(asked) and not uses_a_network(replay) else None


def _of_scores(replay: Replay) -> OneWay | None:
    slopes = [torch.cat([g.flatten() for g in replay.gradients([t + by for t in replay.outputs])]) for by in LEVELS]
    g = torch.stack(slopes).double()
    if not bool(g.isfinite().all()) or not bool(g[LEVELS.index(0.0)].any()):
        return None
    is_up = bool((g <= 0).all())
    if not is_up and not bool((g >= 0).all()):
        return None
    far, largest = g[-1] if is_up else g[0], float(g.abs().amax())
    if float(far.abs().amax()) > ENDED * largest:
        return None  # linear, as that of a density that the model gives itself
    there = replay.value([torch.full_like(t, LEVELS[-1] if is_up else LEVELS[0]) for t in replay.outputs])
    return OneWay(replay.here, there, is_up) if there < replay.here else None


def _of_embeddings(replay: Replay) -> OneWay | None:
    outputs = replay.outputs
    size = max(float(t.square().mean().sqrt()) for t in outputs)
    if not size > 0 or len({t.shape[1] for t in outputs}) > 1:
        return None
    generator = torch.Generator().manual_seed(0)

    def draw(shape: Sequence[int], like: Tensor) -> Tensor:
        return torch.randn(shape, generator=generator).to(like)

    ends: list[float] = []
    for _ in range(DRAWS):
        row = draw(outputs[0].shape[1:], outputs[0])
        row = row * (row.numel() ** 0.5 / row.norm())
        values = [replay.value([(row * by).expand_as(t).clone() for t in outputs]) for by in SIZES]
        bound = EQUAL * max(map(abs, values))
        if not all(b <= a + bound for a, b in pairwise(values)) or not values[0] > values[-1] + 10 * bound:
            return None
        if values[-2] - values[-1] > 0.1 * (values[0] - values[-1]):
            return None  # it falls on, as a linear one
        ends.append(values[-1])
    tries = [replay.here]
    for by in (size, *SIZES):
        tries.append(replay.value([draw(t.shape, t) * by for t in outputs]))
    there = max(ends)
    if not all(one > there for one in tries):
        return None
    return OneWay(replay.here, there, True, are_embeddings=True)


@dataclass(frozen=True)
class Shortcut:
    """A part of the outputs that makes the loss small whatever the labels are.

    Attributes:
        output, columns: which; all of the output where `columns` is empty.
        shape: of the output.
        is_up: whether it is to grow.
        label: the tensor of numbers that no longer counts, as Python reads it off a batch.
        here, there: the loss as it is, and with this part moved far.
    """

    output: int
    columns: tuple[int, ...]
    shape: tuple[int, ...]
    is_up: bool
    label: str
    here: float
    there: float


def shortcut(asked: Asked) -> Shortcut | None:
    """Whether a column of the outputs, or one of several outputs, makes the loss small for all labels.

    It is moved far for all samples; there, labels in another order, mirrored or shifted hardly change the loss, no
    gradient is left, and it is as low as where other outputs are as the labels say.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: a `Shortcut`, or `None`.
    Raises: what the model raises.
    Cost: two evaluations of the loss and its gradient for each column of up to 4; some twenty more where one falls.
    """
    replay = asked.replay
    if not replay.is_known or asked.seen.strangers or any(len(t) < LEAST for t in replay.outputs if t.ndim):
        return None
    falling = [(part, sign) for part in _parts(replay.outputs) for sign in (1.0, -1.0) if _falls(replay, part, sign)]
    if not falling:
        return None
    for label, batches in labels_of_loss(asked):
        if not label.values[0].is_floating_point():
            continue
        batches = [asked.batch, *batches]
        for part, sign in falling:
            found = _drowns(replay, part, sign, batches, label.values[0])
            if found is not None:
                i = part.output
                return Shortcut(
                    i, part.columns, tuple(replay.outputs[i].shape), sign > 0, label.name, replay.here, found
                )
    return None


@dataclass(frozen=True)
class _Part:
    """Some columns of an output, or all of it."""

    output: int
    columns: tuple[int, ...] = ()

    def of(self, t: Tensor) -> Tensor:
        return t[:, list(self.columns)] if self.columns else t

    def moved(self, outputs: Sequence[Tensor], by: float) -> list[Tensor]:
        values = outputs[self.output].clone()
        if self.columns:
            values[:, list(self.columns)] += by
        else:
            values += by
        return [*outputs[: self.output], values, *outputs[self.output + 1 :]]


def _parts(outputs: Sequence[Tensor]) -> list[_Part]:
    """What of the outputs may be moved for itself: a column, a half, a third, or one of several."""
    found: list[_Part] = []
    for i, t in enumerate(outputs):
        if are_normalized(t):
            continue
        wide = t.shape[1] if t.ndim == 2 else 0
        if 2 <= wide <= COLUMNS:
            found += [_Part(i, (c,)) for c in range(wide)]
        for num in (2, 3) if COLUMNS <= wide <= WIDE else ():
            step = wide // num
            found += [_Part(i, tuple(range(k * step, (k + 1) * step))) for k in range(num) if step * num == wide]
        if t.ndim and len(outputs) > 1:
            found.append(_Part(i))
    return found


def _falls(replay: Replay, part: _Part, sign: float) -> bool:
    """Whether the loss falls for all samples where they are moved a little that way, or somewhat."""
    for by in (0.0, 2.0 * sign):
        slope = part.of(replay.gradients(part.moved(replay.outputs, by))[part.output]) * sign
        if not bool((slope <= 0).all()) or not bool((slope < 0).any()):
            return False
    return True


def _drowns(replay: Replay, part: _Part, sign: float, batches: Sequence[Any], label: Tensor) -> float | None:
    """The loss far along a part, where it is small for all of these batches and has no gradient left."""

    def values(outputs: list[Tensor]) -> list[float]:
        return [float(replay.loss(outputs, batch).detach()) for batch in batches]

    here = values(replay.outputs)
    spread = max(here) - min(here)
    slope = max(float(g.abs().amax()) for g in replay.slopes)
    for far in FAR:
        outputs = part.moved(replay.outputs, sign * far)
        there = values(outputs)
        if not all(map(math.isfinite, there)):
            continue
        pairs = zip(outputs, replay.gradients(outputs), strict=True)
        left = max(float(along_rows(t, g).abs().amax()) for t, g in pairs)
        if max(there) - min(there) <= KEPT * spread and left <= STILL * slope and max(there) < here[0]:
            return there[0] if _never_returns(replay, part, sign, label, (here[0], there[0])) else None
    return None


def _never_returns(replay: Replay, part: _Part, sign: float, label: Tensor, ends: tuple[float, float]) -> bool:
    """Whether, also where other columns are as the labels say, the loss never rises along a part, nor is it lower."""
    here, there = ends
    for values in _as_labels_say(replay, part, sign, label):
        if any(b > a + ROUNDING * abs(here) for a, b in pairwise(values)):
            return False
        if there - min(values) > KEPT * (here - min(values)):
            return False
    return True


def _as_labels_say(replay: Replay, part: _Part, sign: float, label: Tensor) -> list[list[float]]:
    """Losses with the labels in place of other columns, one by one and all, and this part at some levels."""
    choices: list[tuple[int, list[int]]] = []
    for k, t in enumerate(replay.outputs):
        if are_normalized(t) or (k == part.output and not part.columns):
            continue
        if t.ndim == 2 and label.numel() == len(t):
            free = [c for c in range(t.shape[1]) if k != part.output or c not in part.columns]
            choices += [(k, free), *((k, [c]) for c in free if len(free) > 1)]
        elif t.numel() == label.numel():
            choices.append((k, []))
    found: list[list[float]] = []
    for k, columns in choices:
        run = []
        for by in LEVELS_OF_PART:
            outputs = part.moved(replay.outputs, sign * by)
            values = outputs[k].clone()
            if columns:
                values[:, columns] = label.reshape(-1, 1).to(values)
            else:
                values = label.reshape(values.shape).to(values)
            run.append(replay.value([*outputs[:k], values, *outputs[k + 1 :]]))
        found.append([v for v in run if math.isfinite(v)])
    return [run for run in found if run]
