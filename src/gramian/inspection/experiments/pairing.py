"""What a loss without labels does with outputs that are all equal, and with pairs whose two sides are the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gramian.batch import first_samples, mapped
from gramian.inspection.experiments.replaying import Replay
from gramian.inspection.passes.given import given_of
from gramian.inspection.passes.observed import Observed
from gramian.objective import Objective
from gramian.recording.keeping import seed_torch

__all__ = ["Pairs", "constant_loss", "falls_together", "unlike_pairs"]

ENOUGH = 16
# Numbers of an embedding; smaller outputs are scores, which are no places of samples.
NARROW = 4
# Random outputs that are tried, and the share of the loss that is no rounding.
DRAWS, EQUAL = 4, 1e-5
# Steps down from random outputs.
STEPS = 12
# Share of its size by which a loss rises where it should fall.
RISES = 0.03


def constant_loss(model: nn.Module, seen: Observed, objective: Objective) -> float | None:
    """The loss of the first samples over that with their outputs' mean in place of each output.

    Args:
        model, seen, objective: as elsewhere.

    Returns: the ratio; `None` where the loss with constant outputs is not positive, or outputs are not by sample.
    Raises: what the model raises.
    Cost: a forward pass of 16 samples.
    Source: this library's own.
    """
    batch = first_samples(seen.batches[0], ENOUGH)
    replay = Replay(model, batch, objective)
    outputs = replay.outputs
    if not replay.is_known or not outputs or any(t.ndim < 1 or len(t) < 2 for t in outputs):
        return None
    here = replay.value(outputs)
    there = replay.value([t.mean(0, keepdim=True).expand_as(t) for t in outputs])
    return here / there if there > 0 and here >= 0 else None


def falls_together(model: nn.Module, seen: Observed, objective: Objective) -> tuple[float, float] | None:
    """Whether a loss of embeddings has its minimum where all samples have one output.

    It is compared with outputs as they are, with random ones, and with random ones that are the same for all of a
    sample's outputs; and the equal ones must be a place without slope. Outputs without a gradient, as behind a stopped
    one, are why equal outputs need not be reached.

    Args:
        model, seen, objective: as elsewhere.

    Returns: the loss as it is, and there; `None` where it has its minimum elsewhere.
    Raises: what the model raises.
    Cost: a forward pass of 16 samples, and a dozen evaluations of the loss.
    Source: this library's own.
    """
    batch = first_samples(seen.batches[0], ENOUGH)
    replay = Replay(model, batch, objective)
    outputs = replay.outputs
    if not replay.is_known or not outputs or any(t.ndim != 2 or t.shape[1] < NARROW for t in outputs):
        return None
    size = max(float(t.square().mean().sqrt()) for t in outputs)
    if not size > 0:
        return None
    generator = torch.Generator().manual_seed(0)

    def draw(shape: torch.Size, like: Tensor) -> Tensor:
        return torch.randn(shape, generator=generator).to(like) * size

    slopes = [float(g.abs().amax()) for g in replay.gradients([draw(t.shape, t) for t in outputs])]
    if not all(0 < slope < math.inf for slope in slopes):
        return None
    row = {t.shape[1]: draw(t.shape[1:], t) for t in outputs}
    equal = [row[t.shape[1]].expand_as(t).clone() for t in outputs]
    there, slope = replay.value(equal), max(float(g.abs().amax()) for g in replay.gradients(equal))
    here = replay.value(outputs)
    tries = [here]
    for _ in range(DRAWS):
        tries.append(replay.value([draw(t.shape, t) for t in outputs]))
        own = {t.shape: draw(t.shape, t) for t in outputs}
        tries.append(replay.value([own[t.shape] for t in outputs]))
    tries.append(_descended(replay, [draw(t.shape, t) for t in outputs], size))
    near = replay.value([t + 0.1 * draw(t.shape, t) for t in equal])
    bound = EQUAL * max(map(abs, (*tries, there)))
    is_lowest = (
        all(one >= there - bound for one in (*tries, near)) and sum(one > there + bound for one in tries) > DRAWS
    )
    return (here, there) if is_lowest and slope <= 100 * EQUAL * max(slopes) else None


def _descended(replay: Replay, outputs: list[Tensor], size: float) -> float:
    """The lowest loss on a way down from these outputs, each row of which moves by a share of its size."""
    lowest = replay.value(outputs)
    for _ in range(STEPS):
        grads = replay.gradients(outputs)
        rows = [g / g.norm(dim=1, keepdim=True).clamp(min=1e-12) for g in grads]
        outputs = [t - 0.3 * size * t.shape[1] ** 0.5 * g for t, g in zip(outputs, rows, strict=True)]
        lowest = min(lowest, replay.value(outputs))
    return lowest


@dataclass(frozen=True)
class Pairs:
    """Losses with pairs as they are, and with one side, or the other, on both sides."""

    names: tuple[str, str]
    here: float
    first: float
    second: float


def unlike_pairs(model: nn.Module, seen: Observed, objective: Objective) -> Pairs | None:
    """Whether a loss of embeddings of two inputs and nothing else rises where the two of a pair are the same.

    Args:
        model, seen, objective: as elsewhere.

    Returns: a `Pairs`, or `None`.
    Raises: what the model raises.
    Cost: four forward passes of 16 samples.
    Source: this library's own.
    """
    names = [g.name for g in given_of(seen.batches[:1], seen.fed, set()) if g.is_input]
    batch = first_samples(seen.batches[0], ENOUGH)
    given = given_of([batch], set(), set())
    if len(given) != 2 or len(names) != 2:
        return None
    a, b = (g.values[0] for g in given)
    if a.shape != b.shape or a.dtype != b.dtype or len(a) < NARROW:
        return None
    replay = Replay(model, batch, objective)
    outputs = replay.outputs
    if not replay.is_known or len(outputs) < 2 or any(t.ndim != 2 or t.shape[1] < NARROW for t in outputs):
        return None
    if len({t.shape for t in outputs}) > 1:
        return None
    here = replay.value(outputs)

    def loss(left: Tensor, right: Tensor) -> float:
        seed_torch(0)
        changed: Any = mapped(batch, lambda t: left if t is a else right if t is b else t)
        with torch.enable_grad():
            total, units = objective.loss(model, changed)
        return float(total.detach()) / float(units)

    with_a, with_b = loss(a, a), loss(b, b)
    least = here + RISES * abs(here)
    return Pairs((names[0], names[1]), here, with_a, with_b) if min(with_a, with_b) > least else None
