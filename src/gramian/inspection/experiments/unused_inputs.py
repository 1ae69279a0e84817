"""Inputs that have no effect: whole ones, and half of the positions, channels, rows or columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gramian.batch import mapped
from gramian.inspection.experiments.filled_zeros import unzeroed
from gramian.inspection.experiments.gradient_reach import gradient_by
from gramian.inspection.experiments.replay import Asked, Replay, loss_of
from gramian.inspection.passes.batch_roles import Given, given_of, key, taken_of
from gramian.samples import first_samples

__all__ = ["Idle", "Unused", "idle_half", "idle_targets", "without_columns", "without_effect"]

# Samples that are enough for a property of the model.
ENOUGH = 8
# Columns of an input that are tried one by one.
COLUMNS = 8
# Samples that must differ from their neighbors in a half of an input.
FEW = 4
# How much larger outputs are made.
LARGER = (10.0, 100.0)
# Share of the largest slope below which a gradient fades along a dimension, and does not end.
FADED = 1e-12


@dataclass(frozen=True)
class Unused:
    """Inputs that the model does not use.

    Attributes:
        names: as Python reads them off a batch.
        hides_others: whether the others, which are used, have no effect either.
    """

    names: tuple[str, ...]
    hides_others: bool = False


@dataclass(frozen=True)
class Idle:
    """A half of an input, along one of its dimensions, that has no effect.

    Attributes:
        name: of the input, as Python reads it off a batch.
        start, stop: which of its entries along the dimension.
        length: how many there are.
        dim: which dimension; the samples are along the first, 0.
    """

    name: str
    start: int
    stop: int
    length: int
    dim: int = 1


def without_effect(asked: Asked) -> Unused | None:
    """The inputs of which each sample can be given another's, and the loss stays the same to the last bit.

    One sample's value is lost and another's comes twice, since a loss may be the same for samples in another order. A
    mask that shows a causal model more of the padding behind the text has no effect, so that each gets the values of
    the one before, of the one after, and its own in reverse order. A triplet that is satisfied stays so, so that the
    input gets values ten times as far, and those of others of its shape. Where outputs change and the loss does not,
    it may leave them out as they are, as those that are not sure: it is asked of larger outputs.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: an `Unused`; `None` where all have an effect, or there is one input.
    Raises: what the model raises.
    Cost: up to three passes of 8 samples for each input; some more, and all again, where one has no effect.
    """
    model, seen, objective = asked.model, asked.seen, asked.objective
    batch = first_samples(seen.batches[0], ENOUGH)
    compared = {key(c.target) for c in seen.criteria}
    whole_batch = given_of(seen.batches[:1], seen.fed, compared)
    keys = [key(g.values[0]) for g in whole_batch]  # of a tensor that is given twice, one may be used
    whole_values = {g.name: g.values[0] for g in whole_batch}
    fed = [g.name for g, own in zip(whole_batch, keys, strict=True) if g.is_input and keys.count(own) == 1]
    given = [g for g in given_of([batch], set(), set()) if g.name in fed]
    if len(given) < 2 or seen.first_loss == 0.0:  # a hinge that is satisfied, say, stays so with other inputs
        return None

    def far(x: Tensor) -> Iterator[Any]:
        """Batches at which a hinge that this input of numbers satisfies is active: far values, and those of others."""
        alike = (g.values[0] for g in given if g.values[0] is not x)
        values = [10 * x, -10 * x, *(t for t in alike if (t.shape, t.dtype) == (x.shape, x.dtype))]
        values = values if x.is_floating_point() else []
        return (mapped(batch, lambda t, other=other: other if t is x else t) for other in values)

    def silent(inputs: Sequence[Given]) -> list[Given]:
        whole = loss_of(model, batch, objective)
        found = []
        for one in inputs:
            x = one.values[0]
            others = [torch.cat((x[:1], x[:-1])), torch.cat((x[1:], x[-1:]))]
            others += [_reversed(x, whole_values[one.name])] if x.ndim > 1 else []
            varies = bool((x[-1:] != x[:-1]).any()) and bool((others[0] != x).any())
            changed = (mapped(batch, lambda t, x=x, other=other: other if t is x else t) for other in others)
            if varies and all(loss_of(model, b, objective) == whole for b in (*changed, *far(x))):
                found += [] if _is_heard(asked, one.name) else [one]
        return found

    with torch.no_grad():
        inputs = silent(given)
        if inputs:
            with unzeroed(model) as are_others:
                inputs = silent(inputs) if are_others else inputs
        hides_others = len(inputs) == len(given)
        if hides_others:  # the output is one number: of what is used, NaN still arrives
            floats = [g.values[0] for g in inputs if g.values[0].is_floating_point()]
            lost = [mapped(batch, lambda t, x=x: torch.full_like(t, torch.nan) if t is x else t) for x in floats]
            arrive = [math.isnan(loss_of(model, one, objective)) for one in lost]
            unused = {id(x) for x, arrives in zip(floats, arrive, strict=True) if not arrives}
            inputs = [g for g in inputs if id(g.values[0]) in unused] if len(floats) == len(given) else inputs
    return Unused(tuple(one.name for one in inputs), hides_others) if len(inputs) < len(given) else None


def _is_heard(asked: Asked, name: str) -> bool:
    """Whether outputs depend on an input, and the loss on these where all outputs are larger, though not as it is."""
    replay = asked.replay
    x = next((g.values[0] for g in given_of([asked.batch], set(), set()) if g.name == name), None)
    if x is None or not replay.is_known or not replay.outputs:
        return False
    moved = Replay(asked.model, mapped(asked.batch, lambda t: t.roll(1, 0) if t is x else t), asked.objective).outputs
    if [t.shape for t in moved] != [t.shape for t in replay.outputs] or all(map(torch.equal, replay.outputs, moved)):
        return False
    pairs = ([by * t for t in outputs] for by in LARGER for outputs in (replay.outputs, moved))
    losses = [replay.value(outputs) for outputs in pairs]
    return any(math.isfinite(a) and a != b for a, b in zip(losses[::2], losses[1::2], strict=True))


def _reversed(x: Tensor, whole: Tensor) -> Tensor:
    """An input in reverse order; categories stay in the range that they have in their own place, a mask in any."""
    turned = x.flip(1)
    counts = not (x.dtype == torch.bool or x.is_floating_point() or x.is_complex())
    return turned.clamp(whole.amin(0), whole.amax(0)) if counts and int(whole.max()) > 1 else turned


def idle_half(asked: Asked) -> Idle | None:
    """The half of an input, along any of its dimensions, that the samples can exchange, and no output changes by a bit.

    The other half must have an effect, so that not all is hidden by what comes behind; and so it must be with other
    values in place of the parameters that are zero. None is exchanged where the loss has a gradient in both halves, or
    one that fades from the one to the other.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: an `Idle` for the first such input, or `None`.
    Raises: what the model raises.
    Cost: a pass forward and backward of 16 samples for each input of numbers; for each dimension along which a half has
        no gradient two forward passes, and two more where that half has no effect.
    """
    fed = {one.name for one in taken_of(asked.seen.batches[0], asked.seen.fed)}
    if not asked.replay.is_known or not asked.replay.outputs:
        return None
    for given in given_of([asked.batch], set(), set()):
        x = given.values[0]
        if given.name not in fed or len(x) < 2:
            continue
        slopes = _slopes(asked, x)
        for dim in range(1, x.ndim):
            half, length = x.shape[dim] // 2, x.shape[dim]
            spans = [(0, half), (half, length)]
            if half == 0 or (slopes is not None and dim < slopes.ndim and _reaches(slopes, dim, spans)):
                continue
            found = [span for span in spans if _is_idle(asked, asked.replay, x, dim, *span)]
            if len(found) != 1:
                continue
            with unzeroed(asked.model) as are_others:
                if are_others and not _is_idle(
                    asked, Replay(asked.model, asked.batch, asked.objective), x, dim, *found[0]
                ):
                    continue
            return Idle(given.name, *found[0], length, dim)
    return None


def _slopes(asked: Asked, x: Tensor) -> Tensor | None:
    """The sizes of the loss's gradient by an input, or by what is first made of it; scaled up, not to underflow."""
    scale = torch.finfo(x.dtype if x.is_floating_point() else torch.float32).max ** 0.5
    try:
        found = gradient_by(asked, asked.batch, x, scale)
    except RuntimeError:  # a loss without a graph, or that writes into what it is given
        return None
    return None if found is None else found[1].abs()


def _reaches(slopes: Tensor, dim: int, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether there is a gradient in both halves, or one that fades along the dimension, as a recurrence forgets."""
    sizes = slopes.nan_to_num(torch.inf).transpose(0, dim).flatten(1).amax(1)
    some_of = sizes[sizes > 0]
    if len(some_of) and float(some_of.min()) < FADED * float(some_of.max()):
        return True
    return all(bool(sizes[start:stop].any()) for start, stop in spans)


def _part(x: Tensor, dim: int, start: int, stop: int) -> Tensor:
    return x.narrow(dim, start, stop - start)


def _is_idle(asked: Asked, before: Replay, x: Tensor, dim: int, start: int, stop: int) -> bool:
    """Whether samples can get these entries from their neighbors without any effect, where enough differ.

    Zeros may be what fills up, which has none.
    """
    other = x.clone()
    _part(other, dim, start, stop).copy_(_part(x.roll(1, 0), dim, start, stop))
    differ = (other != x).flatten(1).any(1) & _part(x, dim, start, stop).flatten(1).any(1)
    if int(differ.sum()) < FEW:
        return False
    return _gives_the_same(asked, before, mapped(asked.batch, lambda t: other if t is x else t))


def idle_targets(asked: Asked) -> tuple[str, ...] | None:
    """What of a batch neither the model nor the loss takes: with those of other samples, the loss stays as it is.

    It is asked for where a parameter gets no gradient, to which it may belong.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: the names, as Python reads them off a batch; `None` where all parameters get a gradient.
    Raises: what the loss raises.
    Cost: one evaluation of the loss for each tensor that the model is not given, and a forward pass for each that has
        no effect on it: the loss may give the model what it makes of that.
    """
    replay, seen = asked.replay, asked.seen
    if None not in seen.gradients.values() or not replay.is_known or not replay.outputs or replay.here == 0.0:
        return None
    fed = {one.name for one in taken_of(seen.batches[0], seen.fed)}
    found = []
    for given in given_of([asked.batch], set(), set()):
        y = given.values[0]
        other = torch.cat((y[:1], y[:-1]))  # in another order, constant outputs would not see it
        if given.name in fed or len(y) < 2 or bool((other == y).all()):
            continue
        changed = mapped(asked.batch, lambda t, y=y, other=other: other if t is y else t)
        is_idle = float(replay.loss(replay.outputs, changed).detach()) == replay.here
        if is_idle and _gives_the_same(asked, replay, changed):
            found.append(given.name)
    return tuple(found)


def _gives_the_same(asked: Asked, before: Replay, batch: Any) -> bool:
    """Whether the model's outputs on another batch are those of the replay, to the last bit."""
    after = Replay(asked.model, batch, asked.objective).outputs
    return len(before.outputs) == len(after) and all(map(torch.equal, before.outputs, after))


def without_columns(asked: Asked) -> tuple[str, tuple[int, ...], int] | None:
    """The columns of an input of few, of which each sample can be given another's without any effect on the outputs.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: the input's name, the columns, and how many there are; `None` where all have an effect.
    Raises: what the model raises.
    Cost: a forward pass of 16 samples for each column, of up to 8.
    """
    model, seen, batch = asked.model, asked.seen, asked.batch
    fed = {g.name for g in given_of(seen.batches[:1], seen.fed, set()) if g.is_input}
    given = [g for g in given_of([batch], set(), set()) if g.name in fed]
    if len(given) != 1 or given[0].values[0].ndim != 2 or not 2 <= given[0].values[0].shape[1] <= COLUMNS:
        return None
    if any(p.numel() and not bool(p.any()) for p in model.parameters() if p.ndim > 1):
        return None  # behind which nothing has an effect until the first step
    x = given[0].values[0]

    def is_silent(column: int) -> bool:
        other = x.clone()
        other[:, column] = x[:, column].roll(1, 0)
        return _gives_the_same(asked, asked.replay, mapped(batch, lambda t: other if t is x else t))

    if not asked.replay.is_known or not asked.replay.outputs:
        return None
    with torch.no_grad():
        varying = [k for k in range(x.shape[1]) if bool((x[:, k] != x[0, k]).any())]
        silent = tuple(k for k in varying if is_silent(k))
    return (given[0].name, silent, x.shape[1]) if silent and len(silent) < len(varying) else None
