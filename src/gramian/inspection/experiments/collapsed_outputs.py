"""What a loss without labels does with outputs that are all equal, and with pairs whose two sides are the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gramian.batch import mapped
from gramian.inspection.experiments.normalized_outputs import Sphere
from gramian.inspection.experiments.replay import Asked, Replay, loss_of
from gramian.inspection.passes.batch_roles import given_of

__all__ = ["Pairs", "constant_loss", "falls_together", "unlike_pairs"]

# Numbers of an embedding; smaller outputs are scores, which are no places of samples.
NARROW = 4
# Random outputs that are tried, and the share of the loss that is no rounding.
DRAWS, EQUAL = 4, 1e-5
# Steps down from random outputs.
STEPS = 12
# How much larger than the outputs random ones are made until the loss has a slope for some samples.
LARGER = (1.0, 4.0, 16.0)
# Share of the samples that then have one.
ACTIVE = 0.2
# Share of its size by which a loss rises where it should fall.
RISES = 0.03


def _is_one_function(asked: Asked, a: Tensor, b: Tensor) -> bool:
    """Whether outputs change places with the two inputs: else each has an encoder of its own, and they differ."""
    replay = asked.replay.of_samples
    if replay.calls == 2:
        return True
    turned = mapped(replay.batch, lambda t: b if t is a else a if t is b else t)
    outputs = Replay(asked.model, turned, asked.objective).of_samples.outputs
    pairs = zip(outputs, reversed(replay.outputs), strict=True)
    return all(one.shape == two.shape and torch.allclose(one, two, rtol=1e-3, atol=1e-5) for one, two in pairs)


def constant_loss(asked: Asked) -> float | None:
    """The loss of the first samples over that with their outputs' mean in place of each output.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: the ratio; `None` where the loss with constant outputs is not positive, or outputs are not by sample.
    Raises: what the model raises.
    Cost: that of the loss.
    """
    replay = asked.replay.of_samples
    outputs = replay.outputs
    if not replay.is_known or not outputs or any(t.ndim < 1 or len(t) < 2 for t in outputs):
        return None
    there = replay.value([t.mean(0, keepdim=True).expand_as(t) for t in outputs])
    return replay.here / there if there > 0 and replay.here >= 0 else None


def falls_together(asked: Asked) -> tuple[float, float] | None:
    """Whether a loss of embeddings has its minimum where all samples have one output.

    The equal ones must be a place without slope, and it is compared with outputs as they are, with random ones, and
    with random ones that are the same for all of a sample's outputs. Where the model gives all of them one length, only
    such outputs are tried, and slopes are those along the sphere. Outputs without a gradient, as behind a stopped
    one, are why equal outputs need not be reached.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: the loss as it is, and there; `None` where it has its minimum elsewhere.
    Raises: what the model raises.
    Cost: two evaluations of the loss and its gradient; some thirty more where equal outputs have no slope.
    """
    replay = asked.replay.of_samples
    outputs = replay.outputs
    if not replay.is_known or not outputs or any(t.ndim != 2 or t.shape[1] < NARROW for t in outputs):
        return None
    size = max(float(t.square().mean().sqrt()) for t in outputs)
    if not size > 0:
        return None
    generator = torch.Generator().manual_seed(0)
    sphere = Sphere.of(outputs)

    def draw(shape: torch.Size, like: Tensor) -> Tensor:
        return sphere.put(torch.randn(shape, generator=generator).to(like) * size)

    if any(replay.depends_on(i, draw(outputs[i].shape, outputs[i])) for i in replay.stopped):
        return None
    slopes: list[float] = []
    for by in LARGER if sphere.radius is None else LARGER[:1]:  # a margin may hide small ones
        gradients = sphere.slopes(replay, [draw(t.shape, t) * by for t in outputs])
        slopes = [float(g.abs().amax()) for g in gradients]
        if max(float(g.any(1).float().mean()) for g in gradients) >= ACTIVE:
            size *= by
            break
    if not all(slope < math.inf for slope in slopes) or not any(slopes):
        return None
    if any(
        slope == 0 and replay.depends_on(i, draw(t.shape, t))
        for i, (slope, t) in enumerate(zip(slopes, outputs, strict=True))
    ):
        return None
    row = {t.shape[1]: draw(t.shape[1:], t) for t in outputs}
    equal = [row[t.shape[1]].expand_as(t).clone() for t in outputs]
    at_equal = [float(g.abs().amax()) for g in sphere.slopes(replay, equal)]
    # Each by its own size: one that is restored has a slope there, however steep the loss is along another.
    if not all(here <= 100 * EQUAL * (slope or max(slopes)) for here, slope in zip(at_equal, slopes, strict=True)):
        return None
    there, here = replay.value(equal), replay.here
    tries = [here]
    for _ in range(DRAWS):
        tries.append(replay.value([draw(t.shape, t) for t in outputs]))
        own = {t.shape: draw(t.shape, t) for t in outputs}
        tries.append(replay.value([own[t.shape] for t in outputs]))
    tries.append(_descended(replay, [draw(t.shape, t) for t in outputs], size, sphere))
    near = replay.value([sphere.put(t + 0.1 * draw(t.shape, t)) for t in equal])
    bound = EQUAL * max(map(abs, (*tries, there)))
    is_lowest = (
        all(one >= there - bound for one in (*tries, near)) and sum(one > there + bound for one in tries) >= DRAWS
    )
    return (here, there) if is_lowest else None


def _descended(replay: Replay, outputs: list[Tensor], size: float, sphere: Sphere) -> float:
    """The lowest loss on a way down from these outputs, each row of which moves by a share of its size."""
    lowest = replay.value(outputs)
    for _ in range(STEPS):
        grads = sphere.slopes(replay, outputs)
        rows = [g / g.norm(dim=1, keepdim=True).clamp(min=1e-12) for g in grads]
        outputs = [sphere.put(t - 0.3 * size * t.shape[1] ** 0.5 * g) for t, g in zip(outputs, rows, strict=True)]
        lowest = min(lowest, replay.value(outputs))
    return lowest


@dataclass(frozen=True)
class Pairs:
    """Losses with pairs as they are, and with one side, or the other, on both sides."""

    names: tuple[str, str]
    here: float
    first: float
    second: float


def unlike_pairs(asked: Asked) -> Pairs | None:
    """Whether a loss of embeddings of two inputs and nothing else rises where the two of a pair are the same.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: a `Pairs`, or `None`.
    Raises: what the model raises.
    Cost: two forward passes of 16 samples, of pairs.
    """
    names = [g.name for g in given_of(asked.seen.batches[:1], asked.seen.fed, set()) if g.is_input]
    batch = asked.batch
    given = given_of([batch], set(), set())
    if len(given) != 2 or len(names) != 2:
        return None
    a, b = (g.values[0] for g in given)
    if a.shape != b.shape or a.dtype != b.dtype or len(a) < NARROW:
        return None
    replay = asked.replay.of_samples
    outputs = replay.outputs
    if not replay.is_known or len(outputs) < 2 or any(t.ndim != 2 or t.shape[1] < NARROW for t in outputs):
        return None
    if len({t.shape for t in outputs}) > 1:
        return None
    if not _is_one_function(asked, a, b):
        return None
    here = replay.here

    def loss(left: Tensor, right: Tensor) -> float:
        changed = mapped(batch, lambda t: left if t is a else right if t is b else t)
        return loss_of(asked.model, changed, asked.objective)

    with_a, with_b = loss(a, a), loss(b, b)
    least = here + RISES * abs(here)
    return Pairs((names[0], names[1]), here, with_a, with_b) if min(with_a, with_b) > least else None
