"""Backward passes that are followed by no step, as when a GradScaler skips them all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian.report import Finding

__all__ = ["MANY", "Skips", "skipped_steps"]

# Steps in a row. A scale of 65,536 is halved 16 times until it is 1.
MANY = 20


class Skips:
    """Counts the backward passes since the last step whose gradients were then dropped.

    Two parameters tell, so that nothing is done to the others: gradients that arrived, and are gone, zero or not finite
    when the next forward pass begins, though no step was taken.

    They are asked for that only once a forward pass has begun without a step since the last one and without their
    gradients, or many have, so that ordinary loops pay nothing.

    Args:
        parameters: that are trained.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.count = 0
        self.was_finite = True  # the gradients of the last of many
        self._arrived: dict[int, tuple[nn.Parameter, int]] = {}
        self._ends = [*{id(p): p for p in (*parameters[:1], *parameters[-1:])}.values()]
        self._handles: list[Any] = []

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _arrive(self, parameter: Tensor) -> None:
        if parameter.grad is not None and isinstance(parameter, nn.Parameter):
            self._arrived[id(parameter)] = parameter, parameter.grad._version
            if self.count >= MANY - 1:
                self.was_finite = bool(parameter.grad.isfinite().all())

    def forward_begins(self, passes: int) -> bool:
        """Says whether many gradients in a row were dropped, once; `passes` were made since the last step."""
        if not self._handles and passes and (passes > MANY or all(p.grad is None for p in self._ends)):
            self._handles = [p.register_post_accumulate_grad_hook(self._arrive) for p in self._ends]
        if not self._arrived:
            return False
        if any(_is_kept(p, version) for p, version in self._arrived.values()):
            return False  # accumulation
        return self.skipped(was_finite=self.was_finite)

    def skipped(self, *, was_finite: bool) -> bool:
        """Counts a step that was skipped; says whether these are many now."""
        self._arrived.clear()
        self.was_finite = was_finite
        self.count += 1
        return self.count == MANY

    def stepped(self) -> None:
        """A step was taken."""
        self._arrived.clear()
        self.count = 0
        self.close()


def _is_kept(parameter: nn.Parameter, version: int) -> bool:
    """Whether a gradient that arrived is still there: not removed, nor zero, nor what a GradScaler has to skip."""
    grad = parameter.grad
    if grad is None or grad._version == version:
        return grad is not None
    size = float(torch.linalg.vector_norm(grad.detach(), dtype=torch.float32))  # DDP and clipping write to it too
    return math.isfinite(size) and size > 0.0


def skipped_steps(origin: Finding, was_finite: bool) -> Finding:
    """The finding about many steps in a row that were not taken.

    Args:
        origin: where values that are not finite come from.
        was_finite: whether the last gradients were finite.

    Returns: the finding.
    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.
    """
    if origin.code != "gradient-overflow":
        cause = f"{origin.title} ({origin.where}), so that a GradScaler skips every step."
        advice = origin.advice
    elif was_finite:
        cause = "The gradients are finite. The loop drops them, or its condition for a step is never met."
        advice = "Call optimizer.step() between backward() and zero_grad()."
    else:
        cause = "The gradients times the loss scale are not finite, so that a GradScaler skips every step: the scale "
        cause += "is not lowered, or the gradients are out of range without it."
        advice = "Call scaler.update() after scaler.step(optimizer), clip the loss, or use bfloat16."
    return Finding(
        "steps-skipped",
        "error",
        f"None of the last {MANY} backward passes was followed by a step",
        where="optimizer",
        evidence=f"gradients arrived and were dropped {MANY} times in a row (exact); of the last, they were "
        + ("finite" if was_finite else "not finite"),
        cause=cause,
        advice=advice,
    )
