"""Which matrices have no finite gradient in a step: asked once, and only where something looks unusual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from gramian.optim.sharding import not_finite
from gramian.optim.stacks import Stack

__all__ = ["Flags"]


class Flags:
    """Of the parameters that step as matrices and have a gradient, those whose gradient is not finite.

    On a CPU, gradients of ordinary size are known to be finite, and nobody asks. Elsewhere, and where they are
    sharded, all are asked at once: together with the other ranks, and without waiting for a GPU.
    """

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        self.params, self._grads = params, grads
        self.waits = all(type(g) is Tensor and g.is_cpu for g in grads)
        self.bad: Tensor | None = None if self.waits else not_finite(grads)

    @cached_property
    def _by_parameter(self) -> Mapping[Tensor, Tensor]:
        if self.bad is None:
            self.bad = not_finite(self._grads)
        return dict(zip(self.params, self.bad.unbind(), strict=True))

    def of(self, stack: Stack, grads: Sequence[Tensor | None]) -> Tensor:
        """Which matrices of a stack have no finite gradient, (K, 1, 1)."""
        missing = torch.ones((), dtype=torch.bool, device=stack.device)
        found = [missing if g is None else self._by_parameter[p] for p, g in zip(stack.params, grads, strict=True)]
        return stack.repeated(torch.stack([flag.to(stack.device) for flag in found]))

    def keep(self, rate: float) -> Mapping[Tensor, Tensor] | float:
        """What each parameter is multiplied by: 1 − rate, or one where it is skipped."""
        if self.bad is None or not rate:
            return 1 - rate
        wide = torch.float64 if any(p.dtype == torch.float64 for p in self.params) else torch.float32
        kept = torch.ones_like(self.bad, dtype=wide).masked_fill_(~self.bad, 1 - rate)
        return dict(zip(self.params, kept.unbind(), strict=True))
