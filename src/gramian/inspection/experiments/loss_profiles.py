"""How a loss changes along each output: whether it has a minimum, and on which side larger labels move it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gramian.batch import mapped
from gramian.inspection.experiments.prerequisites import is_by_sample
from gramian.inspection.experiments.replay import Asked, Replay
from gramian.inspection.passes.batch_roles import Given, given_of

__all__ = ["Profile", "along_outputs"]

# By how much outputs are moved: logits and logarithms saturate within six, and a clamp seldom cuts before.
LEVELS = (-6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0)
# A slope that is below this share of that halfway decays: that of an exponential, from three to six, to a twentieth.
DECAYS = 0.5
# Samples that are too few to be asked.
LEAST = 4
# Columns of an output that are looked at, and its dimensions.
COLUMNS = 4
# How much farther a minimum may be, in a loss that takes labels in another unit.
BEYOND = 1e6
# Gradients that are equal up to rounding, as a share of the largest; of a stationary point, of those beside it.
EQUAL, FLAT = 1e-4, 1e-3


@dataclass(frozen=True)
class Profile:
    """What is wrong along an output.

    Attributes:
        kind: "reversed" (larger labels push the output down, and there is no minimum, or it is at minus the label),
            "linear" (the loss is linear in the output and has no minimum), "endless" (it falls at a slope that stays).
        label: the tensor, as Python reads it off a batch; empty where none is concerned.
        column: of the output.
        shape: of the output.
        slopes: mean gradients at the lowest and highest level.
    """

    kind: str
    label: str
    column: int
    shape: tuple[int, ...]
    slopes: tuple[float, float]


def along_outputs(asked: Asked) -> Profile | None:
    """Move each column of the outputs for all samples at once, and labels to one value, and look at the slopes.

    A sample's slope along its output is that of its own loss, as long as a loss is a mean over samples. A minimum has
    slopes of both signs beside it. Of every loss that draws outputs to labels, a larger label lowers the slope
    (∂²L/∂o∂y ≤ 0: squares, absolute values, likelihoods of a mean or a rate, margins); outputs that stand for the
    opposite of a label, as the rate of a waiting time, have a minimum all the same.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: what is wrong, or `None`.
    Raises: what the model raises.
    Cost: some 30 evaluations of the loss, of outputs of up to 4 columns; of others two or four for each label.
    """
    replay = asked.replay
    if not replay.is_known or not replay.outputs or asked.seen.strangers or asked.seen.ends is not None:
        return None
    given = given_of([asked.batch], set(), set())
    chosen = [g.values[0] for g in given if not g.values[0].is_floating_point()]
    given = [g for g in given if g.values[0].is_floating_point()]
    asked_of = [
        (i, one, rises)
        for i, out in enumerate(replay.outputs)
        if out.ndim and len(out) >= LEAST and not _is_normalized(out) and is_by_sample(replay, i)
        for one in given
        if _columns(one.values[0], out) and (rises := _rises(replay, i, one.values[0]))
    ]
    follows = {one.name for i, one, rises in asked_of if _is_followed(replay, i, one, rises)}
    for i, one, rises in asked_of:
        if one.name not in follows and (found := _reversed(replay, i, one, rises)) is not None:
            return found
    are_choices = any(len(t) == len(asked_of[0][1].values[0]) == t.numel() for t in chosen) if asked_of else False
    if are_choices or len(replay.outputs) > 1:  # each choice moves a column of its own
        return None
    for i, one, _ in asked_of:
        out, t = replay.outputs[i], one.values[0]
        if not _is_of_two(t) and out.ndim <= 2 and (out.ndim == 1 or out.shape[1] <= COLUMNS):
            found = _endless(replay, i, max(LEVELS[-1], 2 * float(t.abs().amax())))
            if found is not None:
                return found
    return None


def _is_of_two(t: Tensor) -> bool:
    return bool(((t == t.min()) | (t == t.max())).all())


def _is_normalized(out: Tensor) -> bool:
    """Whether rows have one length, are probabilities or their logarithms: then each column alone cannot move."""
    if out.ndim < 2 or out.shape[-1] < 2:
        return False
    rows = out.detach().double().flatten(0, -2)
    sizes = (rows.norm(dim=1), rows.sum(1), rows.logsumexp(1))
    return any(float(s.std()) <= 1e-3 * float(s.abs().mean() + 1e-3) for s in sizes)


def _columns(t: Tensor, out: Tensor) -> tuple[int, ...]:
    """The columns of an output that may be compared with numbers; (-1,) for all of it; none where shapes differ."""
    if t.shape == out.shape or t.numel() == out.numel() == len(t) == len(out):
        return (-1,)
    is_vector = t.numel() == len(t) == len(out)
    return tuple(range(out.shape[1])) if is_vector and out.ndim == 2 and out.shape[1] <= COLUMNS else ()


def _moved(replay: Replay, i: int, by: float, column: int = -1) -> list[Tensor]:
    """The outputs, with one of them, or a column of it, moved."""
    values = replay.outputs[i].clone()
    part = values if column < 0 or values.ndim < 2 else values[:, column]
    part += by
    return [*replay.outputs[:i], values, *replay.outputs[i + 1 :]]


def _slopes(replay: Replay, i: int, by: float, column: int = -1, batch: Any = None) -> Tensor:
    return replay.gradients(_moved(replay, i, by, column), batch)[i].double()


def _rises(replay: Replay, i: int, t: Tensor) -> list[Tensor]:
    """By how much gradients are larger with a large label than with a small one for all, at some places; those that are
    numbers, none where the label has no effect."""
    values = t.flatten().sort().values
    low, high = float(values[len(values) // 10]), float(values[-1 - len(values) // 10])
    if not low < high < float("inf"):
        return []
    batches = [mapped(replay.batch, lambda v, to=to: torch.full_like(v, to) if v is t else v) for to in (low, high)]
    out = replay.outputs[i]
    middle = torch.full_like(out, (low + high) / 2)  # as an absolute value needs
    found = []
    for values in (out, out - 1, out + 1, middle):
        outputs = [*replay.outputs[:i], values, *replay.outputs[i + 1 :]]
        one, two = (replay.gradients(outputs, batch)[i].double() for batch in batches)
        found.append(two - one)
    found = [r for r in found if bool(r.isfinite().all())]
    return found if any(bool(r.any()) for r in found) else []


def _views(out: Tensor, label: Given, rises: list[Tensor]) -> list[tuple[int, Tensor]]:
    """What rises of an output, or of each column that a label may be compared with."""
    return [(c, torch.stack([r if c < 0 else r[:, c] for r in rises])) for c in _columns(label.values[0], out)]


def _is_followed(replay: Replay, i: int, label: Given, rises: list[Tensor]) -> bool:
    """Whether an output, or a column of it, is drawn to a label."""
    views = [v for _, v in _views(replay.outputs[i], label, rises)]
    bound = EQUAL * max(float(v.abs().amax()) for v in views)
    return any(bool((v <= bound).all()) and bool((v < -bound).any()) for v in views)


def _reversed(replay: Replay, i: int, label: Given, rises: list[Tensor]) -> Profile | None:
    """Whether larger labels push an output down, which has no minimum, or has it at minus the label."""
    t, out = label.values[0], replay.outputs[i]
    views = _views(out, label, rises)
    bound = EQUAL * max(float(v.abs().amax()) for _, v in views)
    far = float(t.abs().amax()) + LEVELS[-1]
    for c, v in views:
        if not bool((v >= -bound).all()) or not bool((v > bound).any(0).all()):
            continue
        ends = [
            tuple(g if c < 0 else g[:, c] for g in (_slopes(replay, i, at, c) for at in (-by, by)))
            for by in (10 * far, *reversed(LEVELS[-3:]))
        ]  # where an exponential overflows, or has ended, the nearer
        ends = [(low, high) for low, high in ends if bool((low.isfinite() & high.isfinite()).all())]
        if not ends:
            continue
        below, above = ends[0]
        turns = torch.stack([low < 0 for low, _ in ends]).any(0) & torch.stack([high > 0 for _, high in ends]).any(0)
        has_minimum = float(turns.double().mean()) > 0.5
        is_critic = _is_of_two(t) and torch.allclose(below, above, rtol=EQUAL, atol=0.0)
        largest = max(float(torch.maximum(low.abs(), high.abs()).amax()) for low, high in ends)
        falls = float(below.mean()) > FLAT * largest or float(above.mean()) < -FLAT * largest
        is_endless = not has_minimum and (falls or _is_of_two(t))  # else a score of whether there is something at all
        if not is_critic and (is_endless or _is_at_minus(replay, i, t, c)):
            return Profile(
                "reversed", label.name, max(c, 0), tuple(out.shape), (float(below.mean()), float(above.mean()))
            )
    return None


def _is_at_minus(replay: Replay, i: int, t: Tensor, column: int) -> bool:
    """Whether the loss is stationary where outputs, or a column, are minus the labels, and is not beside that."""
    out = replay.outputs[i]

    def slope(by: float) -> Tensor:
        values = out.clone()
        if column < 0:
            values = (by - t).reshape(out.shape).to(out.dtype)
        else:
            values[:, column] = (by - t).flatten().to(out.dtype)
        found = replay.gradients([*replay.outputs[:i], values, *replay.outputs[i + 1 :]])[i].abs()
        return found if column < 0 else found[:, column]

    here, below, above = (slope(by) for by in (0.0, -1.0, 1.0))
    return bool((here <= FLAT * torch.minimum(below, above)).all())


def _endless(replay: Replay, i: int, top: float) -> Profile | None:
    """A column along which the loss falls at a slope that does not end, for all samples, or is linear."""
    out = replay.outputs[i]
    levels = (-top, -top / 2, *LEVELS[2:-2], top / 2, top)
    for c in range(out.shape[1] if out.ndim == 2 else 1):
        slopes = [s if s.ndim < 2 else s[:, c] for s in (_slopes(replay, i, by, c) for by in levels)]
        g = torch.stack(slopes)
        largest = float(g.abs().amax()) if bool(g.isfinite().all()) else 0.0
        if not largest > 0:
            continue
        falls_up, falls_down = bool((g < 0).all()), bool((g > 0).all())
        near, far = (g[1], g[0]) if falls_down else (g[-2], g[-1])
        is_linear = float((g - g[0]).abs().amax()) <= EQUAL * largest
        if not is_linear and not ((falls_up or falls_down) and bool((far.abs() >= DECAYS * near.abs()).all())):
            continue
        ahead = -top if float(far.sum()) > 0 else top
        beyond = _slopes(replay, i, ahead * BEYOND, c)
        beyond = beyond if beyond.ndim < 2 else beyond[:, c]
        if bool((beyond * far < 0).any()):  # the loss gives the labels another unit
            continue
        fallen = replay.here - replay.value(_moved(replay, i, ahead, c))
        if fallen >= DECAYS * top * float(far.sum().abs()):  # the loss does what its slope says
            told = (c, tuple(out.shape), (float(g[0].mean()), float(g[-1].mean())))
            return Profile("linear" if is_linear else "endless", "", *told)
    return None
