"""A matrix that starts at zero, and gradients for it: what the tests of single directions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cases import seeded

NUM = 7
LR = 0.1


def gradients(shape: tuple[int, int], seed: int = 0) -> list[Tensor]:
    return [torch.randn(shape, generator=seeded(100 * seed + i), dtype=torch.float64) for i in range(NUM)]


def run(make: Callable[..., Any], grads: Sequence[Tensor], **options: Any) -> Tensor:
    """The matrix after a step with each gradient."""
    w = nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = make([w], lr=LR, **options)
    for g in grads:
        w.grad = g.clone()
        optimizer.step()
    return w.detach()
