"""Steps of an optimizer that is given a closure, inside of which the forward and backward passes are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["before_moving"]


def before_moving(
    args: tuple[Any, ...], kwargs: dict[str, Any], judge: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Calls `judge` once the gradients of a step are there: now, or after the first call of its closure.

    Args:
        args, kwargs: of `optimizer.step`, the optimizer first, as its hooks get them.
        judge: what to call.

    Returns: the arguments to step with, where they are others.
    Raises: what `judge` raises.
    Cost: none.
    Source: `Optimizer.register_step_pre_hook` of torch.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        judge()
        return None
    calls = 0

    def watched() -> Any:
        nonlocal calls
        result, calls = closure(), calls + 1
        if calls == 1:
            judge()
        return result

    if "closure" in kwargs:
        return args, kwargs | {"closure": watched}
    return (*args[:1], watched, *args[2:]), kwargs
