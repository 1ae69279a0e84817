"""What a loss does with its labels: it is asked with the outputs that they call for, and with others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gramian.batch import first_samples, mapped
from gramian.inspection.given import Given, given_of
from gramian.inspection.observed import Observed
from gramian.inspection.replaying import Replay
from gramian.objective import Objective

__all__ = ["FAR", "Supervision", "against_labels"]

# Samples that are enough; gradients and losses that are zero or equal up to rounding, as shares of the largest.
ENOUGH, EQUAL = 16, 1e-4
# Scores that are right or wrong: clearly, and far.
CLEAR, FAR = 6.0, 60.0
# Probabilities that are so.
PROBABLE = (0.3, 0.02)
# The share of the classes that labels must reach for a dimension to be that of the classes.
REACHED = 0.9


@dataclass(frozen=True)
class Supervision:
    """What is wrong between outputs and labels.

    Attributes:
        kind: "dimension" (probabilities over another one), "reversed", "endless", "alone" (the other classes' scores
            have no effect), "one-sided" (outputs of one of two targets have none), "flat" (nor have changes beyond a
            bound), "unsquared", "mean" (each output is compared with all targets).
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


def against_labels(model: nn.Module, seen: Observed, objective: Objective) -> Supervision | None:
    """Whether a loss is lower where outputs are as the labels say; the model's layers do not take part.

    Classes: a label is changed, so that the scores whose gradients change are those that it names. Two values or
    numbers: outputs are put where the labels are, and away from them.

    Args:
        model: left as it was.
        seen: of this model.
        objective: gives the loss.

    Returns: what is wrong; `None` where nothing is, or where the loss has no labels of the batch.
    Raises: what the model raises.
    Cost: a forward pass of 16 samples, and some ten evaluations of the loss.
    Source: this library's own.
    """
    whole = given_of(seen.batches[:1], seen.fed, set())
    fed = {g.name for g in whole if g.is_input}
    batch = first_samples(seen.batches[0], ENOUGH)
    given = given_of([batch], set(), set())
    if not fed and len(given) != 1 or seen.strangers:
        return None
    replay = Replay(model, batch, objective)
    if not replay.is_known or not replay.outputs:
        return None
    others = [g for g in given if g.name not in fed]
    for one in given:
        t = one.values[0]
        alone = all(g is one for g in others)
        if t.dtype in (torch.int64, torch.int32, torch.uint8):
            largest = max((int(g.max()) for g in _of(one.name, seen.batches)), default=0)
            for i, out in enumerate(replay.outputs):
                for dim in _dims(t, out, largest):
                    found = _of_classes(replay, one, i, dim, alone=alone)
                    if found is not None:
                        return found[0]
        if one.name not in fed and alone:
            for i, out in enumerate(replay.outputs):
                if out.shape == t.shape or out.squeeze(-1).shape == t.shape or out.shape == t.squeeze(-1).shape:
                    return _of_values(replay, one, i, t.reshape(out.shape).to(out.dtype))
    return None


def _of(name: str, batches: Sequence[Any]) -> list[Tensor]:
    return next((g.values for g in given_of(batches, set(), set()) if g.name == name), [])


def _dims(t: Tensor, out: Tensor, largest: int) -> Iterator[int]:
    """The dimensions of an output that may be the classes of these labels; tokens may be shifted by one."""
    for dim in dict.fromkeys((out.ndim - 1, 1)):
        if not 0 < dim < out.ndim or out.shape[dim] < 2:
            continue
        rest = out.shape[:dim] + out.shape[dim + 1 :]
        if rest == t.shape or (t.ndim == 2 and rest == (len(t), t.shape[1] - 1)):
            if REACHED * out.shape[dim] <= largest + 1 <= out.shape[dim]:
                yield dim


def _of_classes(
    replay: Replay, label: Given, i: int, dim: int, *, alone: bool
) -> tuple[Supervision | None] | None:
    """What the loss does with a label of classes, in a tuple; `None` where the label does not name scores."""
    t, out = label.values[0], replay.outputs[i]
    num = out.shape[dim]
    entry = (0, t.shape[1] // 2) if t.ndim == 2 else (0,) * t.ndim
    own = int(t[entry])
    if not 0 <= own < num:
        return None
    changed = t.clone()
    changed[entry] = other = (own + 1) % num
    try:
        before = replay.gradients(replay.outputs)[i]
        after = replay.gradients(replay.outputs, mapped(replay.batch, lambda v: changed if v is t else v))[i]
    except Exception:  # lengths, or indices of something else
        return None
    moved = (after - before).abs().movedim(dim, -1).flatten(0, -2)
    size = float(moved.amax())
    columns = (moved.amax(0) > EQUAL * size).nonzero().flatten().tolist() if size > 0 else []
    if columns != sorted((own, other)):
        return None
    row = int(moved[:, other].argmax())
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
    lowered, raised = (
        [*replay.outputs[:i], out.movedim(dim, -1).scatter_add(-1, index, torch.full_like(index, by, dtype=out.dtype))
         .movedim(-1, dim), *replay.outputs[i + 1 :]]
        for by in (-FAR, FAR)
    )  # fmt: skip
    if float(here.min()) > 0 and bool((of_own(replay.gradients(lowered)[i]) > 0).all()):
        losses = tuple(replay.value(outputs) for outputs in (replay.outputs, lowered, raised))
        return (Supervision("endless", **told, losses=losses),)
    rows = out.movedim(dim, -1)
    rest_of = wide.scatter(-1, index, 0.0)
    is_normalized = float(rows.float().logsumexp(-1).abs().median()) < 1e-2
    if float(here.max()) < 0 and not bool(rest_of.any()) and not is_normalized:
        there = of_own(replay.gradients(raised)[i])
        if torch.allclose(there, here, rtol=EQUAL):
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
        return _of_numbers(replay, i, target, told) if float(ends.float().mean()) < 0.5 else None
    is_high = target == high
    are_probabilities = bool((out >= 0).all()) and bool((out <= 1).all())

    def at(size: float) -> Tensor:
        """Outputs that are right by a size; negative ones are wrong."""
        sign = torch.where(is_high, 1.0, -1.0).to(out) * (1 if size > 0 else -1)
        if are_probabilities:
            by = PROBABLE[0] if abs(size) < CLEAR else PROBABLE[1]
            return torch.where(sign > 0, 1 - by, by).to(out)
        return sign * abs(size)

    base = replay.value(replay.outputs)
    right, wrong = (replay.value(put(at(size))) for size in (CLEAR, -CLEAR))
    scale = EQUAL * max(abs(base), abs(right), abs(wrong))
    sided = [
        which
        for which in (0, 1)
        if all(abs(replay.value(put(at(size), is_high == bool(which))) - base) <= scale * 1e-2 for size in (CLEAR, -CLEAR))
    ]
    if len(sided) == 1 and abs(right - base) > 100 * scale:
        return Supervision("one-sided", **told, losses=(base,), target=int(high if sided[0] else low))
    if not sided:
        steps = [(sign, replay.value(put(at(sign * CLEAR / 3), is_high == which)),
                  replay.value(put(at(sign * CLEAR), is_high == which))) for which in (False, True) for sign in (1, -1)]  # fmt: skip
        # In the order low right, low wrong, high right, high wrong: outputs down, up, up, down.
        is_flat = [abs(one - two) <= scale * 1e-2 for _, one, two in steps]
        if (is_flat[0] and is_flat[3]) or (is_flat[1] and is_flat[2]):
            return Supervision("flat", **told, losses=(base, *steps[1][1:]))
    if wrong < base - 100 * scale and right > base + 100 * scale:
        far_wrong, far_right = (replay.value(put(at(size))) for size in (-FAR, FAR))
        losses = (base, right, wrong, far_wrong)
        falls, rises = wrong - far_wrong, far_right - right
        if falls > 5 * (base - wrong) and not are_probabilities:
            is_linear = abs(rises - falls) <= 1e-2 * falls  # as that of a critic
            return None if is_linear else Supervision("endless", **told, losses=losses)
        return Supervision("reversed", **told, losses=losses)
    return None


def _of_numbers(replay: Replay, i: int, target: Tensor, told: dict[str, Any]) -> Supervision | None:
    """What the loss does with numbers as targets: it has its minimum near them, or near their mean, or none."""
    far = FAR * (1.0 + float(target.abs().amax()))
    moved = [
        [*replay.outputs[:i], target + by, *replay.outputs[i + 1 :]] for by in (far, -far)
    ]  # fmt: skip
    above, below = (replay.gradients(outputs)[i] for outputs in moved)
    if any(bool((above * sign > 0).all()) and bool((below * sign > 0).all()) for sign in (1, -1)):
        losses = tuple(replay.value(o) for o in (replay.outputs, *moved))
        return Supervision("unsquared", **told, losses=losses)
    means = target.mean(0, keepdim=True).expand_as(target)
    at, mean = (replay.value([*replay.outputs[:i], v, *replay.outputs[i + 1 :]]) for v in (target, means))
    if not at > mean * (1 + 1e-3) > 0:
        return None
    # That a target of one sample moves the gradients of others tells this from what is added to the outputs.
    other = next(t for t in (g.values[0] for g in given_of([replay.batch], set(), set())) if t.shape.numel() == target.numel() and torch.equal(t.reshape(target.shape).to(target), target))  # fmt: skip
    changed = other.clone()
    changed[0] = other[-1] + float(other.std())
    one, two = (
        replay.gradients([*replay.outputs[:i], means, *replay.outputs[i + 1 :]], batch)[i]
        for batch in (None, mapped(replay.batch, lambda v: changed if v is other else v))
    )
    if len(one) > 2 and bool(((one - two).flatten(1).abs().amax(1) > 0).all()):
        return Supervision("mean", **told, losses=(at, mean))
    return None
