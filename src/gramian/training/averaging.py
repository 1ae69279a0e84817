"""A moving average of a model's weights over the steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gramian import placement

__all__ = ["Average"]


class Average:
    """The exponential moving average of the parameters: `a ← decay·a + (1 − decay)·w` after each step.

    The decay grows from zero, as `(1 + t) / (10 + t)` up to `decay`, so that the first weights are soon forgotten.
    Buffers are not averaged.

    Args:
        model: whose parameters.
        decay: below one.

    >>> layer = nn.Linear(1, 1)
    >>> average = Average(layer, 0.5)
    >>> with torch.no_grad():
    ...     layer.weight += 1
    >>> average.update()
    >>> kept = layer.weight.item()
    >>> with average.used():
    ...     round(kept - layer.weight.item(), 2)  # the decay is 2/11 at first
    0.18
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self._params: list[Tensor] = [p for p in model.parameters() if p.is_floating_point()]
        self._means = [p.detach().clone() for p in self._params]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(placement.locals_of(self._means), placement.locals_of(self._params), 1 - decay)

    @contextmanager
    def used(self) -> Iterator[None]:
        """A context in which the model has the averaged weights."""
        kept = [p.detach().clone() for p in self._params]
        self.put()
        try:
            yield
        finally:
            self._copy(kept)

    def put(self) -> None:
        """Give the model the averaged weights."""
        self._copy(self._means)

    def state(self) -> dict[str, Any]:
        """Return the average, for `restore`."""
        return {"steps": self.steps, "means": self._means}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.steps = int(state["steps"])
        with torch.no_grad():
            for mean, saved in zip(self._means, state["means"], strict=True):
                placement.write_whole_(mean, saved)

    @torch.no_grad()
    def _copy(self, values: list[Tensor]) -> None:
        for p, value in zip(self._params, values, strict=True):
            p.copy_(value)
