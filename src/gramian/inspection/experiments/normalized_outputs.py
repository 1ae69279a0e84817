"""Outputs whose rows all have one length, as normalized embeddings: what a loss does elsewhere is of no account."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gramian.inspection.experiments.replay import Replay

__all__ = ["Sphere"]

# Rows whose lengths differ by less than this share are of one length by design.
ALIKE = 1e-4


@dataclass(frozen=True)
class Sphere:
    """Where outputs can be: rows of one length, or anywhere.

    Attributes:
        radius: that length; `None` where the lengths differ.
    """

    radius: float | None

    @classmethod
    def of(cls, outputs: Sequence[Tensor]) -> Sphere:
        """The sphere of outputs (N, d), all of them together."""
        lengths = torch.cat([t.float().norm(dim=1) for t in outputs])
        mean = float(lengths.mean())
        return cls(mean if float((lengths - mean).abs().amax()) <= ALIKE * mean else None)

    def put(self, t: Tensor) -> Tensor:
        """Rows, or one row, drawn out or in to that length."""
        return t if self.radius is None else t * (self.radius / t.norm(dim=-1, keepdim=True).clamp(min=1e-12))

    def slopes(self, replay: Replay, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The loss's gradients by outputs, without what leaves the sphere."""
        found = replay.gradients(outputs)
        if self.radius is None:
            return found
        pairs = zip(found, outputs, strict=True)
        return [g - t * ((g * t).sum(1, keepdim=True) / self.radius**2) for g, t in pairs]
