"""Which tensors of a batch the loss compares outputs with, and which it takes beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gramian.batch import mapped
from gramian.inspection.experiments.replay import Asked, Replay
from gramian.inspection.passes.batch_roles import given_of

__all__ = ["label_names"]

# Differences of gradients that are no rounding, as a share of the largest.
EQUAL = 1e-4


def label_names(asked: Asked) -> tuple[str, ...]:
    """The tensors that the model is not given, and with which alone an output is compared.

    Each is given to the loss in another order of the samples, with the outputs as they were. Beside numbers as labels,
    weights that are not negative may move the same output; beside classes they may be rewards.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: names, as Python reads them off a batch; none where a tensor is neither given to the model nor has an
        effect, so that inputs may be made of it.
    Raises: what the model raises.
    Cost: two or four evaluations of the loss and its gradient for each tensor that the model is not given.
    """
    replay, seen = asked.replay, asked.seen
    fed = {g.name for g in given_of(seen.batches[:1], seen.fed, set()) if g.is_input}
    if not fed or not replay.is_known or not replay.outputs or seen.strangers:
        return ()
    given = {g.name: g.values[0] for g in given_of([asked.batch], set(), set()) if g.name not in fed}
    moved: dict[str, set[int]] = {}
    generator = torch.Generator().manual_seed(0)  # on both sides of the labels, as an absolute value needs
    size = max((float(t.abs().amax()) for t in given.values() if t.is_floating_point()), default=1.0)
    drawn = [size * torch.randn(t.shape, generator=generator).to(t) for t in replay.outputs]
    for name, t in given.items():
        other = t.roll(1, 0)
        if torch.equal(other, t):
            return ()
        batch = mapped(replay.batch, lambda v, t=t, other=other: other if v is t else v)
        moved[name] = _moved(replay, replay.outputs, batch) or _moved(replay, drawn, batch)
        if not moved[name]:
            return ()

    def are_weights(name: str, of: str) -> bool:
        one, t = given[name], given[of]
        if one.numel() > t.numel() or bool((one < 0).any()):
            return False
        if one.shape == t.shape and one.ndim > 1:  # of sequences, ones up to their ends
            return bool(((one == 0) | (one == 1)).all()) and bool((one.diff(dim=1) <= 0).all())
        return one.is_floating_point() and t.is_floating_point() and bool((t < 0).any())

    return tuple(
        name
        for name, places in moved.items()
        if all(other == name or not places & also or are_weights(other, name) for other, also in moved.items())
    )


def _moved(replay: Replay, outputs: list[Tensor], batch: Any) -> set[int]:
    """Which outputs' gradients are others with another batch."""
    runs = zip(replay.gradients(outputs), replay.gradients(outputs, batch), strict=True)
    return {i for i, (a, b) in enumerate(runs) if float((a - b).abs().amax()) > EQUAL * float(a.abs().amax())}
