"""Which tensors of a batch the loss takes beside the model's inputs, and whether it pairs two of these row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gramian.batch import mapped
from gramian.inspection.experiments.replay import Asked, Replay
from gramian.inspection.passes.batch_roles import given_of, key, taken_of
from gramian.recording.measuring import training

__all__ = ["Together", "made_into_inputs", "rows_together"]

# Numbers of an embedding, draws of random ones, and the share of its size by which a loss is lower for pairs.
NARROW, DRAWS, LOWER = 4, 3, 0.03
# How much larger than the outputs they are made: beside small ones, terms of each side may be all that counts.
LARGER = (1.0, 4.0, 16.0)


@dataclass(frozen=True)
class Together:
    """What the rows of a batch are to the model and its loss.

    Attributes:
        inputs: the tensors that the model is called with, which is called with nothing else.
        taken: those that the loss takes beside them, with an effect on the outputs' gradients.
        are_pairs: whether the loss takes embeddings of two inputs and nothing else, and is lower where those of a row
            are equal than where they are those of other rows.
        are_copies: whether these two are the same for all rows, in training too: nothing drops or moves any of them.
    """

    inputs: tuple[str, ...]
    taken: tuple[str, ...]
    are_pairs: bool = False
    are_copies: bool = False


def rows_together(asked: Asked) -> Together | None:
    """Ask what the loss makes of the rows of a batch.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: a `Together`; `None` where the model is called with something else than tensors of the batch, where it has
        parts that the loss calls, or where some tensors have no effect.
    Raises: what the model raises.
    Cost: one evaluation of the loss and its gradient for each tensor that the model is not called with; six of the loss
        where there is none.
    """
    replay, seen = asked.replay.of_samples, asked.seen
    whole = seen.batches[0]
    given = [one.name for one in taken_of(whole, seen.fed)]
    known = {key(one.values) for one in taken_of(whole, seen.fed)}
    if not given or not seen.fed <= known or seen.strangers:
        return None
    others = [one for one in given_of([asked.batch], set(), set()) if one.name not in given]
    if not replay.is_known:  # objects of the model's own, beside which labels may be given
        return Together(tuple(given), tuple(one.name for one in others)) if all(g.is_label for g in others) else None
    if not replay.outputs:
        return None
    taken = []
    for one in others:
        t = one.values[0]
        other = mapped(replay.batch, lambda v, t=t: v.roll(1, 0) if v is t else v)
        after = replay.gradients(replay.outputs, other)
        if all(torch.equal(a, b) for a, b in zip(replay.slopes, after, strict=True)):
            return None
        taken.append(one.name)
    are_pairs = not taken and len(given) == 2 and _are_pairs(asked, given)
    return Together(tuple(given), tuple(taken), are_pairs, are_pairs and _are_copies(asked))


def made_into_inputs(asked: Asked) -> tuple[str, ...]:
    """The tensors of which the loss makes what it gives the model, as noise that is added: other values move outputs.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: names; none where the model is called with tensors of the batch alone.
    Raises: what the model raises.
    Cost: a forward pass of 16 samples for each tensor that the model is not called with as it is.
    """
    whole = asked.seen.batches[0]
    taken = taken_of(whole, asked.seen.fed)
    if asked.seen.fed <= {key(one.values) for one in taken} or not asked.replay.outputs:
        return ()
    given = {one.name for one in taken}
    found = []
    for one in given_of([asked.batch], set(), set()):
        t = one.values[0]
        if one.name not in given:
            other = mapped(asked.batch, lambda v, t=t: v.roll(1, 0) if v is t else v)
            after = Replay(asked.model, other, asked.objective).outputs
            before = asked.replay.outputs
            if len(after) == len(before) and not all(map(torch.equal, before, after)):
                found.append(one.name)
    return tuple(found)


def _are_pairs(asked: Asked, names: Sequence[str]) -> bool:
    """Whether the loss of embeddings of two inputs is lower where those of each row are equal."""
    replay = asked.replay.of_samples
    outputs = replay.outputs
    if len(outputs) < 2 or len({t.shape for t in outputs}) > 1 or outputs[0].ndim != 2:
        return False
    like = outputs[0]
    if like.shape[1] < NARROW or len(like) < NARROW:
        return False
    are_first = [True, False] if len(outputs) == 2 else _sides(asked, names)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(like.shape, generator=generator).to(like) for _ in range(DRAWS)]
    drawn = [d * like.norm(dim=1).mean() / d.norm(dim=1, keepdim=True) for d in drawn]

    def is_lower(d: Tensor) -> bool:
        here, there = (replay.value([d if first else two for first in are_first]) for two in (d, d.roll(1, 0)))
        return there > here + LOWER * max(abs(here), abs(there))

    return bool(are_first) and any(all(is_lower(by * d) for d in drawn) for by in LARGER)


def _sides(asked: Asked, names: Sequence[str]) -> list[bool]:
    """For each output whether it is the first input's; none where one is neither's alone, as with several heads."""
    replay = asked.replay.of_samples
    moved = []
    for name in names:
        (t,) = (g.values[0] for g in given_of([replay.batch], set(), set()) if g.name == name)
        other = mapped(replay.batch, lambda v, t=t: v.roll(1, 0) if v is t else v)
        after = Replay(asked.model, other, asked.objective).of_samples.outputs
        if len(after) != len(replay.outputs):
            return []
        moved.append([not torch.equal(a, b) for a, b in zip(replay.outputs, after, strict=True)])
    first, second = moved
    return first if all(a != b for a, b in zip(first, second, strict=True)) and any(first) and any(second) else []


def _are_copies(asked: Asked) -> bool:
    """Whether the two embeddings of each row are the same, also in training, where dropout makes two of one."""
    outputs = asked.replay.of_samples.outputs
    if len(outputs) != 2 or not torch.equal(*outputs):
        return False
    with training(asked.model):
        one, other = Replay(asked.model, asked.batch, asked.objective).of_samples.outputs
    return torch.equal(one, other)
