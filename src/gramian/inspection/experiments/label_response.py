"""What a loss does with its labels: it is asked with the outputs that they call for, and with others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gramian.batch import mapped
from gramian.inspection.experiments.overlap_losses import opposed
from gramian.inspection.experiments.replay import Asked, Replay
from gramian.inspection.passes.batch_roles import Given, given_of

__all__ = ["FAR", "Supervision", "against_labels"]

# Gradients and losses that are zero or equal up to rounding, as shares of the largest.
EQUAL = 1e-4
# Labels that are changed until one has an effect.
TRIES = 4
# Scores that are right or wrong: clearly, and far.
CLEAR, FAR = 6.0, 60.0
# Numbers that are far from all targets, in their size.
VERY_FAR = 1e6
# Probabilities that are so.
PROBABLE = (0.3, 0.02)
# The share of the classes that labels must reach for a dimension to be that of the classes.
REACHED = 0.9


@dataclass(frozen=True)
class Supervision:
    """What is wrong between outputs and labels.

    Attributes:
        kind: "shifted" (a sample's output is compared with another's label),
            "dimension" (probabilities over another one), "reversed", "endless", "alone" (the other classes' scores
            have no effect), "one-sided" (outputs of one of two targets have none), "flat" (nor have changes beyond a
            bound), "unsquared".
        label: the tensor, as Python reads it off a batch.
        shape: of the outputs.
        dims: of the classes, and the one in its place.
        losses: as measured.
        target: for "one-sided", which.
    """

    kind: str
    label: str
    shape: tuple[int, ...] = ()
    dims: tuple[int, int] = (0, 0)
    losses: tuple[float, ...] = ()
    target: int = 0


def against_labels(asked: Asked) -> Supervision | None:
    """Whether a loss is lower where outputs are as the labels say; the model's layers do not take part.

    Classes: a label is changed, so that the scores whose gradients change are those that it names. Two values or
    numbers: outputs are put where the labels are, and away from them.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: what is wrong; `None` where nothing is, or where the loss has no labels of the batch.
    Raises: what the model raises.
    Cost: some ten evaluations of the loss.
    """
    seen, replay = asked.seen, asked.replay
    whole = given_of(seen.batches[:1], seen.fed, set())
    fed = {g.name for g in whole if g.is_input}
    given = given_of([asked.batch], set(), set())
    if (not fed and len(given) != 1) or seen.strangers:
        return None
    if not replay.is_known or not replay.outputs:
        return None
    others = [g for g in given if g.name not in fed]
    for one in given:
        t = one.values[0]
        alone = all(g is one for g in others)
        if t.dtype in (torch.int64, torch.int32, torch.uint8):
            largest = max((int(g.max()) for g in _of(one.name, seen.batches)), default=0)
            found = _of_scores(replay, one, largest, alone=alone, is_fed=one.name in fed)
            if found is not None:
                return found[0]
        if one.name not in fed and alone:
            for i, out in enumerate(replay.outputs):
                if _is_like(out, t):
                    return _of_values(replay, one, i, t.reshape(out.shape).to(out.dtype))
    return None


def _of_scores(
    replay: Replay, label: Given, largest: int, *, alone: bool, is_fed: bool
) -> tuple[Supervision | None] | None:
    """What the loss does with a label of classes, in a tuple; `None` where it names scores of no output."""
    t, known = label.values[0], False
    for i, out in enumerate(replay.outputs):
        for dim in _dims(t, out, largest):
            found = None if known else _of_classes(replay, label, i, dim, alone=alone)
            if found is not None and found[0] is not None:
                return found
            may_overlap = alone and not is_fed and (found is None or float(out.min()) >= 0)
            if may_overlap and (losses := opposed(replay, t, i, dim)) is not None:
                return (Supervision("reversed", label.name, tuple(out.shape), losses=losses),)
            known |= found is not None
    return (None,) if known else None


def _is_like(out: Tensor, t: Tensor) -> bool:
    """Whether there is an entry of the labels for each of an output; one may have a dimension of one more."""
    thin = out.squeeze(1).shape if out.ndim > 2 else out.shape
    return t.shape in (out.shape, out.squeeze(-1).shape, thin) or out.shape == t.squeeze(-1).shape


def _of(name: str, batches: Sequence[Any]) -> list[Tensor]:
    return next((g.values for g in given_of(batches, set(), set()) if g.name == name), [])


def _dims(t: Tensor, out: Tensor, largest: int) -> Iterator[int]:
    """The dimensions of an output that may be the classes of these labels; tokens may be shifted by one."""
    for dim in dict.fromkeys((out.ndim - 1, 1)):
        if not 0 < dim < out.ndim or out.shape[dim] < 2:
            continue
        rest = out.shape[:dim] + out.shape[dim + 1 :]
        is_shape = rest == t.shape or (t.ndim == 2 and rest == (len(t), t.shape[1] - 1))
        if is_shape and REACHED * out.shape[dim] <= largest + 1 <= out.shape[dim]:
            yield dim


def _of_classes(replay: Replay, label: Given, i: int, dim: int, *, alone: bool) -> tuple[Supervision | None] | None:
    """What the loss does with a label of classes, in a tuple; `None` where the label does not name scores."""
    t, out = label.values[0], replay.outputs[i]
    num = out.shape[dim]
    before = replay.slopes[i]
    columns, entry, own, other, change = [], (0,) * t.ndim, 0, 0, before
    for sample in range(min(TRIES, len(t))):  # a clipped ratio, or padding, has no gradient
        entry = (sample, t.shape[1] // 2) if t.ndim == 2 else (sample,) + (0,) * (t.ndim - 1)
        own = int(t[entry])
        if not 0 <= own < num:
            continue
        changed = t.clone()
        changed[entry] = other = (own + 1) % num
        try:
            batch = mapped(replay.batch, lambda v, new=changed: new if v is t else v)
            after = replay.gradients(replay.outputs, batch)[i]
        except Exception:  # lengths, or indices of something else
            return None
        change = (after - before).abs().movedim(dim, -1).flatten(0, -2)
        size = float(change.amax())
        if size > 0:
            columns = (change.amax(0) > EQUAL * size).nonzero().flatten().tolist()
            break
    if not columns or columns != sorted((own, other)):
        return None
    row = int(change[:, other].argmax())
    is_one = int((change.amax(1) > EQUAL * float(change.amax())).sum()) == 1  # labels may be mixed on purpose
    if t.ndim == 1 and is_one and row != entry[0]:
        told = {"label": label.name, "shape": tuple(out.shape)}
        return (Supervision("shifted", **told, losses=(float(entry[0]), float(row))),)
    # Which entry of the labels a row of scores has: the one in its place, or, of tokens, the next.
    rest = out.shape[:dim] + out.shape[dim + 1 :]
    shift = entry[1] - row % rest[1] if t.ndim == 2 else 0
    if t.ndim == 2 and not 0 <= shift <= 1:
        return (None,)
    place = t if t.ndim != 2 else t[:, shift : shift + rest[1]]
    if place.shape != rest:
        return (None,)
    told = {"label": label.name, "shape": tuple(out.shape)}
    wide = before.movedim(dim, -1)
    flat = EQUAL * float(before.abs().amax())
    if float(wide.sum(-1).abs().amax()) > 100 * flat:
        for k in range(out.ndim):
            if k != dim and out.shape[k] > 2 and float(before.sum(k).abs().amax()) <= flat:
                return (Supervision("dimension", **told, dims=(dim, k)),)
    counts = (place >= 0) & (place < num)
    index = place.clamp(0, num - 1).long().unsqueeze(-1)

    def of_own(gradient: Tensor) -> Tensor:
        return gradient.movedim(dim, -1).gather(-1, index).squeeze(-1)[counts]

    here = of_own(before)
    # Where the batch has other numbers that the loss takes, such as rewards, they may tell that a score is to fall.
    if not alone or not here.numel() or out.min() >= 0:
        return (None,)
    rows = out.movedim(dim, -1)
    far = torch.full_like(index, FAR, dtype=out.dtype)
    moved = [rows.scatter_add(-1, index, by).movedim(-1, dim) for by in (-far, far)]
    lowered, raised = ([*replay.outputs[:i], values, *replay.outputs[i + 1 :]] for values in moved)
    if float(here.min()) > 0 and bool((of_own(replay.gradients(lowered)[i]) > 0).all()):
        losses = tuple(replay.value(outputs) for outputs in (replay.outputs, lowered, raised))
        return (Supervision("endless", **told, losses=losses),)
    rest_of = wide.scatter(-1, index, 0.0)
    is_normalized = float(rows.float().logsumexp(-1).abs().median()) < 1e-2
    if float(here.max()) < 0 and not bool(rest_of.any()) and not is_normalized:
        there = of_own(replay.gradients(raised)[i])
        if torch.allclose(there, here, rtol=EQUAL, atol=0.0):
            losses = tuple(replay.value(outputs) for outputs in (replay.outputs, raised))
            return (Supervision("alone", **told, losses=losses),)
    return (None,)


def _of_values(replay: Replay, label: Given, i: int, target: Tensor) -> Supervision | None:
    """What the loss does with labels of the outputs' shape: two values, or numbers."""
    out = replay.outputs[i]
    told = {"label": label.name, "shape": tuple(out.shape)}
    low, high = float(target.min()), float(target.max())

    def put(values: Tensor, where: Tensor | None = None) -> list[Tensor]:
        values = values if where is None else torch.where(where, values, out)
        return [*replay.outputs[:i], values, *replay.outputs[i + 1 :]]

    ends = (target == low) | (target == high)
    if not low < high:
        return None
    if not bool(ends.all()):
        return _of_numbers(replay, label, i, target, told) if float(ends.float().mean()) < 0.5 else None
    is_high = target == high
    are_probabilities = bool((out >= 0).all()) and bool((out <= 1).all())

    def at(size: float) -> Tensor:
        """Outputs that are right by a size; negative ones are wrong."""
        sign = torch.where(is_high, 1.0, -1.0).to(out) * (1 if size > 0 else -1)
        if are_probabilities:
            by = PROBABLE[0] if abs(size) < CLEAR else PROBABLE[1]
            return torch.where(sign > 0, 1 - by, by).to(out)
        return sign * abs(size)

    base = replay.here
    right, wrong = (replay.value(put(at(size))) for size in (CLEAR, -CLEAR))
    none = 1e-2 * EQUAL * max(abs(base), abs(right), abs(wrong))

    def is_without_effect(which: bool) -> bool:
        return all(abs(replay.value(put(at(size), is_high == which)) - base) <= none for size in (CLEAR, -CLEAR))

    sided = [which for which in (False, True) if is_without_effect(which)]
    if len(sided) == 1 and abs(right - base) > 1e4 * none:
        return Supervision("one-sided", **told, losses=(base,), target=int(high if sided[0] else low))
    if sided:
        return None
    others = mapped(replay.batch, lambda v: low + high - v if v is label.values[0] else v)
    runs = [replay.terms(put(at(size))) for size in (CLEAR, -CLEAR)] + [replay.terms(replay.outputs)]
    runs.append(replay.terms(put(at(CLEAR)), others))
    if len({len(run) for run in runs}) > 1:
        return None
    for k, (good, bad, now, other) in enumerate(zip(*runs, strict=True)):
        bound = 100 * EQUAL * max(map(abs, (good, bad, now)))
        if abs(good - other) <= bound:
            continue  # what does not depend on the labels: a penalty
        if _is_flat(lambda size, which, k=k: replay.terms(put(at(size), is_high == which))[k], 1e-4 * bound):
            return Supervision("flat", **told, losses=(now,))
        if bad < now - bound and good > now + bound:
            far_bad, far_good = (replay.terms(put(at(size)))[k] for size in (-FAR, FAR))
            losses = (now, good, bad, far_bad)
            falls, rises = bad - far_bad, far_good - good
            if not falls > 5 * (now - bad) or are_probabilities:  # or no number, as log 0 gives
                return Supervision("reversed", **told, losses=losses)
            if abs(rises - falls) > 1e-2 * falls:  # else as that of a critic
                return Supervision("endless", **told, losses=losses)
    return None


def _is_flat(term: Callable[[float, bool], float], bound: float) -> bool:
    """Whether outputs of either target may be moved between clear and middling numbers of one sign without effect."""

    def stays(which: bool, sign: float) -> bool:
        by = sign * CLEAR if which else -sign * CLEAR  # right means up where the target is high
        return abs(term(by / 3, which) - term(by, which)) <= bound

    return any(stays(False, sign) and stays(True, sign) for sign in (1.0, -1.0))


def _of_numbers(replay: Replay, label: Given, i: int, target: Tensor, told: dict[str, Any]) -> Supervision | None:
    """What the loss does with numbers as targets: it has a minimum, or none."""
    far = VERY_FAR * (1.0 + float(target.abs().amax()))  # the loss may give the targets another unit
    moved = [
        [*replay.outputs[:i], target + by, *replay.outputs[i + 1 :]] for by in (far, -far)
    ]  # fmt: skip
    above, below = (replay.gradients(outputs)[i] for outputs in moved)
    is_one_way = bool((above > 0).all()) or bool((above < 0).all())
    is_even = float(above.abs().amax()) <= 1.001 * float(above.abs().amin())  # else by the targets, as of a divergence
    if is_one_way and is_even and torch.allclose(above, below, rtol=1e-3, atol=0.0):
        losses = tuple(replay.value(o) for o in (replay.outputs, *moved))
        return Supervision("unsquared", **told, losses=losses)
    return None
