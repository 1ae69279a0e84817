"""Taps: identity nodes in the autograd graph that hand on the gradients that reach the outputs of layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._C._functorch import TransformType

from gramian.gram import At

__all__ = ["OnGradient", "Pass", "in_backward", "in_vmap", "running_task", "tapped"]

OnGradient = Callable[[Tensor], None]


@dataclass(eq=False)
class Pass:
    """One forward pass, and how to read the gradients of its backward pass.

    `factor` is the ratio of these gradients to those of the sum of losses: 1 where capture differentiates, and the
    gradient that arrives at the loss where the user does (1/units, a GradScaler's scale, 1/accumulation); `None` until
    it is known. Gradients count while `active`, and with `task`, the number of a backward pass, only those of that
    one: not a gradient penalty's, which goes through the same graph. A `dummy` pass keeps the ranks' collectives
    matched where this rank has no batch left; nothing of it is recorded.
    """

    factor: Tensor | float | None = None
    active: bool = True
    task: int | None = None
    units: float = 0.0
    skip_non_finite: bool = False
    overflowed: dict[tuple[int, At | None], Tensor] = field(default_factory=dict)
    dummy: bool = False

    def accepts_gradients(self) -> bool:
        """Whether the gradients of the running backward pass count, and their factor is known."""
        return self.active and self.factor is not None and self.task in (None, running_task())


def tapped(output: Tensor, leaf: Tensor, on_gradient: OnGradient, *, in_place: bool = False) -> Tensor:
    """The same output with a tap: `on_gradient` is called with its gradient in every backward pass.

    All taps depend on `leaf`, so that differentiating by it reaches every tap and computes no gradient of a weight.
    `in_place` says that the output is one of the function's arguments (`out=`, `addmm_`), which the caller goes on
    with, perhaps a part of a larger tensor.
    """
    if in_place:
        return _Tap.apply(output, leaf, on_gradient)  # type: ignore[return-value]
    base = output._base
    if base is not None and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous():
        # The product of rows in another shape, as a linear layer returns it: the product is tapped in place, and
        # viewed again. The old view must go: a hook on a view whose base has changed since crashes torch.
        shape = output.shape
        return _Tap.apply(base, leaf, lambda grad: on_gradient(grad.reshape(shape))).view(shape)  # type: ignore[union-attr]
    return _Tap.apply(output if base is None else output.clone(), leaf, on_gradient)  # type: ignore[return-value]


class _Tap(torch.autograd.Function):
    """The identity, which calls a function with the gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, leaf: Tensor, on_gradient: OnGradient) -> Tensor:
        ctx.on_gradient = on_gradient
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # Nothing computed here is part of the network: no function mode, ours or the user's, may see it.
        with torch._C.DisableTorchFunction():
            ctx.on_gradient(grads[0].detach())
        return grads[0], None, None


def running_task() -> int:
    """The number of the running backward pass; -1 outside of any."""
    return torch._C._current_graph_task_id()


def in_backward() -> bool:
    """Whether a backward pass is running: what is computed then is a recomputation (activation checkpointing)."""
    return torch._C._current_graph_task_id() != -1  # called for every function of a forward pass: no detour


def in_vmap() -> bool:
    """Whether code runs within `torch.vmap`, where tensors have no values that could be read.

    Returns: a bool.
    Raises: nothing.
    Source: torch's stack of function transforms.

    >>> in_vmap(), torch.vmap(lambda t: t + in_vmap())(torch.zeros(2)).tolist()
    (False, [1.0, 1.0])
    """
    if _functorch.maybe_current_level() is None:
        return False
    return any(one.key() == TransformType.Vmap for one in _functorch.get_interpreter_stack() or ())
