"""Looking at values inside `torch.func`'s transforms, which wrap the tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def transforming() -> bool:
    """Whether a transform of `torch.func` is running, so that tensors may be wrapped."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


def has_no_values(x: Tensor) -> bool:
    """Whether it is a meta or a fake tensor, which has a shape only."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")  # its import takes sympy along
    return x.is_meta or (fake is not None and isinstance(x, fake.FakeTensor))


def grads_batched(x: Tensor) -> bool:
    """Whether a tensor stands for several gradients at once (`is_grads_batched`), where only torch's operations do."""
    return torch._C._functorch.is_legacy_batchedtensor(x)  # pyright: ignore[reportAttributeAccessIssue]


def has_tangent(x: Tensor) -> bool:
    """Whether `torch.autograd.forward_ad` follows a tensor."""
    forward_ad = torch.autograd.forward_ad
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def forward_levels() -> int:
    """How many forward-mode transforms of `torch.func` are nested here."""
    stack = torch._C._functorch.get_interpreter_stack() or []  # pyright: ignore[reportAttributeAccessIssue]
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)  # pyright: ignore[reportAttributeAccessIssue]


def pullback(function: Callable[..., Any], *at: Any) -> tuple[Any, Callable[..., tuple]]:
    """The value of a function and its vjp: `torch.func.vjp`, which nests in any other transform."""
    value, pull, *_ = torch.func.vjp(function, *at)
    return value, pull


def with_plain(look: Callable[..., None], *tensors: Tensor) -> None:
    """Call `look` with the tensors as they are without the wrappers, batched ones with the batch in front.

    `look` may raise; it sees no gradient and returns nothing.
    """
    (_eager if torch.compiler.is_compiling() else _look)(look, *tensors)


def _look(look: Callable[..., None], *tensors: Tensor) -> None:
    if transforming():
        _Look.apply(look, *(x.detach() for x in tensors))
    else:
        look(*tensors)


_eager = torch._disable_dynamo(_look)


class _Look(torch.autograd.Function):
    @staticmethod
    def forward(look: Callable[..., None], *tensors: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        look(*tensors)
        return torch.zeros((), device="cpu")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None,) * (1 + len(ctx.needs_input_grad))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, look: Callable[..., None], *tensors: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        full = (
            x.expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
            for x, d in zip(tensors, in_dims[1:], strict=True)
        )
        return _Look.apply(look, *full), None
