"""What experiments on a loss ask first: what else it takes than outputs, and whether another network is part of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from gramian.batch import mapped
from gramian.inspection.experiments.replay import Asked, Replay
from gramian.inspection.passes.batch_roles import Given, given_of
from gramian.recording.hooks import hooks
from gramian.recording.tracking import tensors_of

__all__ = [
    "along_rows",
    "are_bounded",
    "are_normalized",
    "has_negatives",
    "is_by_sample",
    "labels_of_loss",
    "others",
    "takes_only_outputs",
    "uses_a_network",
]

# Gradients that are equal up to rounding, as a share of the largest.
EQUAL = 1e-5
# The same, where other samples' outputs have changed.
BY_SAMPLE = 1e-4
# Rows whose lengths, sums or logarithms are this much alike, as a share of their size, are normalized.
ALIKE = 1e-3
# Rows that differ by less than this share of their size are alike.
VARIED = 0.1


def uses_a_network(replay: Replay) -> bool:
    """Whether the loss asks a module with parameters about outputs, as a discriminator: it answers otherwise of others.

    A teacher, which is given the inputs alone, says the same whatever the outputs are.

    Args:
        replay: of the model.

    Returns: whether.
    Raises: what the loss raises.
    Cost: that of the loss, twice where it calls such a module.
    """

    def answers(outputs: list[Tensor]) -> list[Tensor]:
        found: list[Tensor] = []

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if module is not replay.model and any(True for _ in module.parameters()):
                found.extend(t.detach() for t in tensors_of((output,)))

        with hooks([register_module_forward_hook(hook)]):
            replay.value(outputs)
        return found

    before = answers(replay.outputs)
    after = answers([t + 1 + t.abs() if t.is_floating_point() else t for t in replay.outputs]) if before else []
    return len(before) != len(after) or not all(map(torch.equal, before, after))


def are_bounded(asked: Asked) -> bool:
    """Whether outputs end with a function that has ends, or their rows have one length, are probabilities or logarithms
    of such, so that outputs cannot go anywhere.

    Args:
        asked: the model, left as it was, and its loss.
    """
    return asked.seen.ends is not None or any(map(are_normalized, asked.replay.outputs))


def are_normalized(out: Tensor) -> bool:
    """Whether rows have one length, or one sum, also of their exponentials.

    Args:
        out: an output.
    """
    if out.ndim < 2 or out.shape[-1] < 2:
        return False
    rows = out.double().flatten(0, -2)
    sizes = (rows.norm(dim=1), rows.sum(1), rows.logsumexp(1))
    differ = float((rows - rows.mean(0)).norm(dim=1).mean()) > VARIED * float(sizes[0].mean())
    if differ:
        return any(float(s.std()) <= ALIKE * float(s.abs().mean() + ALIKE) for s in sizes)
    ends = ((sizes[0], 1.0), (sizes[1], 1.0), (sizes[2], 0.0))  # rows that are alike have all of these in common
    return any(float((s - end).abs().amax()) <= ALIKE for s, end in ends)


def along_rows(out: Tensor, gradient: Tensor) -> Tensor:
    """What of a gradient moves normalized rows: of others, all of it.

    Args:
        out: an output.
        gradient: by it.
    """
    if not are_normalized(out):
        return gradient
    if float(out.double().logsumexp(-1).abs().amax()) <= ALIKE:
        return gradient - out.exp() * gradient.sum(-1, keepdim=True)
    if float((out.double().sum(-1) - 1).abs().amax()) <= ALIKE:
        return gradient - gradient.mean(-1, keepdim=True)
    unit = out / out.norm(dim=-1, keepdim=True)
    return gradient - unit * (unit * gradient).sum(-1, keepdim=True)


def is_by_sample(replay: Replay, i: int) -> bool:
    """Whether another output for every other sample leaves the gradients of the rest as they are.

    Args:
        replay: of the model.
        i: which output.
    """
    values = replay.outputs[i].clone()
    values[::2] += 1.0
    changed = replay.gradients([*replay.outputs[:i], values, *replay.outputs[i + 1 :]])[i]
    rest, before = changed[1::2], replay.slopes[i][1::2]
    return bool(rest.isfinite().all()) and float((rest - before).abs().amax()) <= BY_SAMPLE * float(before.abs().amax())


def others(t: Tensor) -> list[Tensor]:
    """Values that a tensor of a batch might have had: another order, and others of its range.

    Args:
        t: numbers, integers or truth values.
    """
    if t.dtype == torch.bool:
        return [~t, t.flip(0)]
    low, high = t.amin(), t.amax()
    found = [low + high - t, t.roll(1, 0)]
    if t.is_floating_point():
        size = (high - low).clamp(min=1.0)
        found += [t + size, t - size]
    elif bool(low == high):
        found.append(t + 1)
    return found


def labels_of_loss(asked: Asked) -> Iterator[tuple[Given, list[Any]]]:
    """The tensors of the batch that the model is not given and the loss takes, with batches where they are others.

    Args:
        asked: the model, left as it was, and its loss.
    """
    replay = asked.replay
    fed = {g.name for g in given_of(asked.seen.batches[:1], asked.seen.fed, set()) if g.is_input}
    for one in given_of([asked.batch], set(), set()):
        if one.name in fed:
            continue
        t = one.values[0]
        batches = [mapped(asked.batch, lambda v, t=t, new=new: new if v is t else v) for new in others(t)]
        if any(_moves(replay, batch) for batch in batches):
            yield one, batches


def has_negatives(asked: Asked) -> bool:
    """Whether the loss takes a tensor of the batch without a positive number, as costs or rewards below zero: they turn
    its sign.

    Args:
        asked: the model, left as it was, and its loss.
    """
    return any(not bool((one.values[0] > 0).any()) for one, _ in labels_of_loss(asked))


def takes_only_outputs(asked: Asked) -> bool:
    """Whether nothing of the batch takes part in the loss but through outputs.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: whether; true of a contrast of embeddings, false where there are labels or where inputs are restored.
    Raises: what the loss raises.
    Cost: two to four evaluations of it and its gradient for each tensor of the batch.
    """
    for one in given_of([asked.batch], set(), set()):
        t = one.values[0]
        for new in others(t):
            if _moves(asked.replay, mapped(asked.batch, lambda v, t=t, new=new: new if v is t else v)):
                return False
    return True


def _moves(replay: Replay, batch: Any) -> bool:
    """Whether another batch changes a gradient by the outputs, or makes the loss fail."""
    try:
        found = replay.gradients(replay.outputs, batch)
    except Exception:  # indices that there are not
        return True
    size = max((float(g.abs().amax()) for g in replay.slopes if g.numel()), default=0.0)
    pairs = zip(found, replay.slopes, strict=True)
    return any(not float((a - b).abs().amax()) <= EQUAL * size for a, b in pairs if a.numel())
