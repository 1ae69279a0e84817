"""Losses without a minimum: lower far from the targets, or falling faster than the outputs grow."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from gramian.batch import first_samples, mapped
from gramian.inspection.passes.losses import VALUES
from gramian.inspection.passes.observed import Observed
from gramian.objective import Objective
from gramian.recording.keeping import seed_torch

__all__ = ["FAR", "NEAR", "falls", "loss_of", "plunges"]

# Samples that are enough.
ENOUGH = 8
# Distances down the gradient, in sizes of the outputs.
NEAR, FAR = 10.0, 1000.0


def loss_of(model: nn.Module, batch: Any, objective: Objective) -> float:
    seed_torch(0)
    with torch.enable_grad():  # a loss may differentiate on its way
        total, units = objective.loss(model, batch)
    return float(total.detach()) / float(units)


def falls(model: nn.Module, seen: Observed, objective: Objective) -> tuple[float, float, float] | None:
    """The loss at outputs that are far off the targets, in both directions, where it is lower there."""
    found = next((c for c in seen.criteria if c.function in VALUES), None)
    if found is None or not found.target.is_floating_point() or not found.target.numel():
        return None
    sizes = [float(t.double().square().mean().sqrt()) for t in (found.given, found.target)]
    far = 1e3 * (1.0 + max(sizes))

    def shifted(by: float) -> float:
        calls = []

        def change(module: nn.Module, args: Any, output: Any) -> Any:
            calls.append(isinstance(output, Tensor) and output.is_floating_point())
            return output + by if calls[-1] else output

        handle = model.register_forward_hook(change)
        try:
            loss = loss_of(model, seen.batches[0], objective)
        finally:
            handle.remove()
        return loss if calls == [True] else float("nan")

    with torch.no_grad():
        below, here, above = (shifted(by) for by in (-far, 0.0, far))
    return (below, here, above) if max(below, above) < here - 1e-3 * far else None


def plunges(model: nn.Module, seen: Observed, objective: Objective) -> tuple[float, float, float] | None:
    """The loss where the outputs are, and two distances down its gradient by one of them, where it falls ever faster.

    That of a critic, or a log-determinant, falls as fast as the output grows; nothing that has a minimum falls faster
    to far below zero.
    """
    batch = first_samples(seen.batches[0], ENOUGH)

    def loss(change: Callable[[Tensor], Tensor]) -> Tensor:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if type(output) not in (Tensor, tuple, list, dict):
                return output  # an object of the model's own, which must stay one
            return mapped(output, lambda t: change(t) if t.is_floating_point() else t)

        handle = model.register_forward_hook(hook)
        try:
            seed_torch(0)
            total, units = objective.loss(model, batch)
        finally:
            handle.remove()
        return total / units

    free: list[Tensor] = []

    def freed(t: Tensor) -> Tensor:
        free.append(t.detach().requires_grad_())
        return free[-1]

    with torch.enable_grad():
        here = loss(freed)
        if not free or not here.requires_grad:
            return None
        found = torch.autograd.grad(here, free, allow_unused=True)
    for i, (own, gradient) in enumerate(zip(free, found, strict=True)):
        if gradient is None or not own.numel() or not bool(gradient.isfinite().all()) or not bool(gradient.any()):
            continue
        size = 1.0 + float(own.detach().abs().amax())
        step = -gradient * (size / float(gradient.double().norm()))

        def moved(far: float, i: int = i, step: Tensor = step) -> float:
            places = count()
            with torch.no_grad():
                return float(loss(lambda t: t + step * far if next(places) == i else t))

        start, near, far, ratio = float(here.detach()), moved(NEAR), moved(FAR), FAR / NEAR
        is_far_below = far < -ratio * (1 + abs(start))
        if is_far_below and start - far > 0.3 * ratio**2 * (start - near) > 0:
            return start, near, far
    return None
