"""Masks that leave what is padding and hide what is not."""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.batch import mapped
from gramian.inspection.experiments.replay import Asked, Replay
from gramian.inspection.passes.batch_roles import given_of

__all__ = ["inverted_mask"]

# Samples that must have padding, and others beside it.
FEW = 4


def inverted_mask(asked: Asked) -> tuple[str, str, int] | None:
    """Whether outputs depend on vectors of a sequence where they are padding, and nowhere else.

    Padding is where all numbers of an input are zero, at the ends of sequences of several lengths, and a mask of ones
    and zeros, another input, is zero.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: the names of the input and the mask, and how many samples have padding; or `None`.
    Raises: what the model raises.
    Cost: two forward passes of 16 samples, where there are such inputs.
    """
    fed = {g.name for g in given_of(asked.seen.batches[:1], asked.seen.fed, set()) if g.is_input}
    given = [g for g in given_of([asked.batch], set(), set()) if g.name in fed]
    for mask in given:
        m = mask.values[0]
        if m.ndim != 2 or not bool(((m == 0) | (m == 1)).all()):
            continue
        for one in given:
            x = one.values[0]
            if x.ndim != 3 or not x.is_floating_point() or x.shape[:2] != m.shape:
                continue
            padding = (x == 0).all(-1)
            rows = padding.any(1) & ~padding.all(1)
            if int(rows.sum()) < FEW or not torch.equal(padding, m == 0):
                continue
            generator = torch.Generator().manual_seed(0)
            drawn = x + float(x.std()) * torch.randn(x.shape, generator=generator).to(x)
            at_padding, elsewhere = (
                _moves(asked, x, torch.where(where[..., None], drawn, x)) for where in (padding, ~padding)
            )
            if at_padding and not elsewhere:
                return one.name, mask.name, int(rows.sum())
    return None


def _moves(asked: Asked, x: Tensor, other: Tensor) -> bool:
    """Whether outputs change with another input."""
    before = asked.replay.outputs
    after = Replay(asked.model, mapped(asked.batch, lambda t: other if t is x else t), asked.objective).outputs
    return len(before) == len(after) and not all(map(torch.equal, before, after))
