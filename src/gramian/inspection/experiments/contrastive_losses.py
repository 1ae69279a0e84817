"""What a loss of embeddings pulls together, and whether that is what is alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gramian.batch import mapped
from gramian.inspection.experiments.replay import Asked, Replay
from gramian.inspection.passes.batch_roles import Given, given_of

__all__ = ["Contrast", "pulled_apart"]

# Numbers of an embedding, and draws of random ones.
NARROW, DRAWS = 4, 3
# Share of its size by which a loss differs between two ways of pairing.
DIFFERS = 0.03
# Standard errors beyond which one of two inputs is more like a third: p < 1e-6.
CERTAIN = 5.0
# Standard errors up to which two are no more like a third than each other; they are like it from FAR on, one by the
# share EQUALLY of the other.
NO_MORE, FAR, EQUALLY = 2.0, 4.5, 0.5


@dataclass(frozen=True)
class Contrast:
    """Losses of embeddings that are paired in the order of the batch, and otherwise.

    Attributes:
        kind: "pairs" (of two, the loss is lower with those of other samples), "triplets" (of three, it pulls
            together the two whose inputs are less alike), "alike" (it pulls apart two that are as alike as the others),
            "labels" (it pulls together pairs of the label that are less alike than those that it pushes apart).
        here, there: the loss with equal embeddings in each pair, and in other pairs; of triplets, of the two pairs; of
            labels, how much nearer pairs' inputs are than others, where they are pulled and where they are pushed.
        shift: of the pairs with which it is lowest; of labels, that of which pairs are pulled together.
    """

    kind: str
    here: float
    there: float
    shift: int = 0


def pulled_apart(asked: Asked) -> Contrast | None:
    """Ask a loss of two or three embeddings, and of two of nothing else but a label, which it pulls together.

    Random embeddings are put in, those of one side being the other's, in the order of the batch and shifted by each
    number of samples. Of three, the inputs say which two are alike, by their distances.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: what is wrong, or `None`.
    Raises: what the model raises.
    Cost: some 50 evaluations of the loss, of embeddings.
    """
    replay = asked.replay.of_samples
    outputs = replay.outputs
    if not replay.is_known or not 2 <= len(outputs) <= 3 or len({t.shape for t in outputs}) > 1:
        return None
    if outputs[0].ndim != 2 or outputs[0].shape[1] < NARROW or len(outputs[0]) < NARROW:
        return None
    taken = _taken(replay)
    if taken and (len(outputs) != 2 or len(taken) > 1):
        return None
    generator = torch.Generator().manual_seed(0)
    like = outputs[0]
    draws = [torch.randn(like.shape, generator=generator).to(like) for _ in range(2 * DRAWS)]
    draws = [d * like.norm(dim=1).mean() / d.norm(dim=1, keepdim=True) for d in draws]
    if taken:
        return _of_labels(asked, draws[:DRAWS], taken[0])
    if len(outputs) == 2:
        return _of_pairs(replay, draws[:DRAWS])
    return _of_triplets(asked, draws)


def _taken(replay: Replay) -> list[Given]:
    """The tensors of the batch in place of which some in another order change the loss."""
    found = []
    for one in given_of([replay.batch], set(), set()):
        t = one.values[0]
        other = mapped(replay.batch, lambda v, t=t: v.roll(1, 0) if v is t else v)
        if not torch.equal(replay.gradients(replay.outputs, other)[0], replay.slopes[0]):
            found.append(one)
    return found


def _of_labels(asked: Asked, draws: Sequence[Tensor], label: Given) -> Contrast | None:
    """Whether pairs of the label that the loss pulls together are not alike, and those that it pushes apart are."""
    replay, t = asked.replay.of_samples, label.values[0]
    given = [g for g in given_of(asked.seen.batches, asked.seen.fed, set()) if g.is_input]
    labels = [g for g in given_of(asked.seen.batches, set(), set()) if g.name == label.name]
    if len(given) != 2 or len(labels) != 1 or given[0].values[0].shape != given[1].values[0].shape:
        return None
    if not all(g.values[0].is_floating_point() for g in given) or t.numel() != len(t):
        return None
    y = torch.cat([v.detach().cpu().double().flatten() for v in labels[0].values])
    if len(y.unique()) != 2:
        return None
    values = [float(v) for v in y.unique()]

    def pulls(value: float) -> list[float]:
        batch = mapped(replay.batch, lambda v: torch.full_like(v, value) if v is t else v)
        ways = ([replay.loss([d, other], batch) for other in (d, d.roll(1, 0))] for d in draws)
        return [float((there - here).detach()) for here, there in ways]

    low, high = map(pulls, values)
    pulled = values[0] if min(low) > 0 > max(high) else values[1] if min(high) > 0 > max(low) else None
    if pulled is None:
        return None
    one, other = (torch.cat([v.detach().cpu().double().flatten(1) for v in g.values]) for g in given)
    if len(one) != len(y):
        return None
    size = torch.cat((one, other)).std(0).clamp(min=1e-12)
    nearer = _nearer(one / size, other / size)
    (near, z), (far, z_far) = (_mean(nearer[y == pulled]), _mean(nearer[y != pulled]))
    return Contrast("labels", near, far, int(pulled)) if z < NO_MORE and z_far > CERTAIN else None


def _of_pairs(replay: Replay, draws: Sequence[Tensor]) -> Contrast | None:
    num = len(draws[0])
    losses = torch.tensor([[replay.value([d, d.roll(k, 0)]) for k in range(num)] for d in draws])
    if not bool(losses.isfinite().all()):
        return None
    size = float(losses.abs().max())
    lowest = losses[:, 1:].amin(1)
    if not bool((losses[:, 0] > lowest + DIFFERS * size).all()):
        return None
    mean = losses.mean(0)
    return Contrast("pairs", float(mean[0]), float(mean.min()), int(mean.argmin()))


def _of_triplets(asked: Asked, draws: Sequence[Tensor]) -> Contrast | None:
    replay = asked.replay.of_samples
    second, third = [], []
    for one, other in zip(draws[::2], draws[1::2], strict=True):
        second.append(replay.value([one, one, other]))
        third.append(replay.value([one, other, one]))
    size = max(map(abs, (*second, *third)))
    pulls_second = all(b > a + DIFFERS * size for a, b in zip(second, third, strict=True))
    pulls_third = all(a > b + DIFFERS * size for a, b in zip(second, third, strict=True))
    given = [g for g in given_of(asked.seen.batches, asked.seen.fed, set()) if g.values[0].is_floating_point()]
    if not (pulls_second or pulls_third) or len(given) != 3 or len({g.values[0].shape for g in given}) > 1:
        return None
    anchor, one, other = (torch.cat([t.detach().cpu().double().flatten(1) for t in g.values]) for g in given)
    size = torch.cat((anchor, one, other)).std(0).clamp(min=1e-12)
    nearer = ((anchor - other) / size).square().mean(1) - ((anchor - one) / size).square().mean(1)
    error = float(nearer.std()) / math.sqrt(len(nearer))
    z = float(nearer.mean()) / error if error > 0 else 0.0  # positive where the second is more like the first
    if (pulls_third and z > CERTAIN) or (pulls_second and z < -CERTAIN):
        here, there = sum(second) / len(second), sum(third) / len(third)
        return Contrast("triplets", *((here, there) if pulls_third else (there, here)), shift=2 if pulls_third else 1)
    drops = [_drop(anchor / size, t / size) for t in (one, other)]
    are_equal = min(by for by, _ in drops) > EQUALLY * max(by for by, _ in drops) > 0
    if abs(z) < NO_MORE and are_equal and min(certain for _, certain in drops) > FAR:
        return Contrast("alike", drops[0][0], drops[1][0], shift=1 if pulls_third else 2)
    return None


def _drop(one: Tensor, other: Tensor) -> tuple[float, float]:
    """By how much nearer rows are to each other than to the next row, and in how many standard errors."""
    return _mean(_nearer(one, other))


def _nearer(one: Tensor, other: Tensor) -> Tensor:
    return (one - other.roll(1, 0)).square().mean(1) - (one - other).square().mean(1)


def _mean(t: Tensor) -> tuple[float, float]:
    """The mean, and how many of its standard errors it is above zero."""
    error = float(t.std()) / math.sqrt(len(t)) if len(t) > 1 else 0.0
    return float(t.mean()) if len(t) else 0.0, float(t.mean()) / error if error > 0 else 0.0
