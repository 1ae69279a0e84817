"""Numbers to which a loss draws outputs, and which these cannot reach."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gramian.inspection.experiments.replay import Asked, Replay
from gramian.inspection.passes.batch_roles import given_of
from gramian.inspection.passes.records import Ends

__all__ = ["Beyond", "beyond_range"]

# Share of the targets outside of the range from which on it is told, and samples that are too few.
OUTSIDE, LEAST = 0.2, 4
# By how much slopes may miss those of a binary cross-entropy, which may have an ε in its logarithms.
NEARLY = 1e-2
# A gradient at the labels below this share of that beside them is none.
FLAT = 1e-3


@dataclass(frozen=True)
class Beyond:
    """An output whose range ends before the labels to which the loss draws it.

    Attributes:
        label: the tensor, as Python reads it off a batch.
        ends: of the output.
        share: of the labels outside of it.
        low, high: the smallest and largest label.
        is_binary: whether the loss is a binary cross-entropy, which has no minimum at such labels.
    """

    label: str
    ends: Ends
    share: float
    low: float
    high: float
    is_binary: bool = False


def beyond_range(asked: Asked) -> Beyond | None:
    """Look for labels outside of the range of an output at which the loss, written in whatever way, is stationary.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: a `Beyond`, or `None`.
    Raises: what the model raises.
    Cost: up to five evaluations of the loss and its gradient where labels are outside.
    """
    replay, ends = asked.replay, asked.seen.output_ends
    if not replay.is_known or len(ends) != len(replay.outputs) or asked.seen.strangers:
        return None
    fed = {g.name for g in given_of(asked.seen.batches[:1], asked.seen.fed, set()) if g.is_input}
    for one in given_of([asked.batch], set(), set()):
        t = one.values[0]
        if one.name in fed or t.dtype == torch.bool or t.is_complex() or t.ndim < 1 or len(t) < LEAST:
            continue
        for i, end in enumerate(ends):
            if end is None:
                continue
            share = float(((t < end.low) | (t > end.high)).float().mean())
            if share <= OUTSIDE:
                continue
            told = one.name, end, share, float(t.min()), float(t.max())
            if t.is_floating_point() and _is_drawn(replay, i, t):
                return Beyond(*told)
            if (end.low, end.high) == (0.0, 1.0) and _is_binary(replay, i, t):
                return Beyond(*told, is_binary=True)
    return None


def _is_drawn(replay: Replay, i: int, t: Tensor) -> bool:
    """Whether the loss is stationary where an output is as the labels, and not beside that."""
    out = replay.outputs[i]
    if out.shape != t.shape and t.numel() != len(out):
        return False
    target = t if out.shape == t.shape else t.reshape(-1, *[1] * (out.ndim - 1)).expand_as(out)
    size = float(t.std()) or 1.0

    def slope(by: float) -> float:
        values = (target + by).to(out.dtype).clone()
        return float(replay.gradients([*replay.outputs[:i], values, *replay.outputs[i + 1 :]])[i].abs().amax())

    here, below, above = (slope(by) for by in (0.0, -size, size))
    return here <= FLAT * min(below, above) and torch.isfinite(torch.tensor(here)).item() is True


def _is_binary(replay: Replay, i: int, t: Tensor) -> bool:
    """Whether the loss's slope by a probability p is (p − t) / (p (1 − p)), up to a factor, wherever p is."""
    out = replay.outputs[i]
    if t.numel() != out.numel():
        return False
    target = t.reshape(out.shape).double().cpu()
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(2):
        p = (0.2 + 0.6 * torch.rand(out.shape, generator=generator)).to(out)
        slope = replay.gradients([*replay.outputs[:i], p, *replay.outputs[i + 1 :]])[i].double().cpu()
        p = p.double().cpu()
        wanted = (p - target) / (p * (1 - p))
        ratios.append((slope * wanted).sum() / wanted.square().sum())
        if not float((slope - ratios[-1] * wanted).norm()) <= NEARLY * float(slope.norm()) > 0:
            return False
    return bool(ratios[0] > 0) and math.isclose(ratios[0], ratios[1], rel_tol=NEARLY)
