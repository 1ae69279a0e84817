"""What a model's forward takes, read off its signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

__all__ = ["arguments_of"]

# Where wrappers, whose own forward names no argument, keep the module inside.
_INSIDE = ("_orig_mod", "module", "base_model", "model")


class Arguments(NamedTuple):
    """What forward takes: `names`, those without a default, those by place that may be tensors, and stars."""

    names: list[str]
    required: list[str]
    places: list[str]
    any_place: bool
    any_name: bool


def arguments_of(model: nn.Module) -> Arguments:
    """What forward takes.

    Wrappers that hand everything on (a compiled module, DDP, PEFT) are looked into. An argument whose default is
    neither missing nor `None` is an option, and no place for a tensor. A forward that is there in place of another says
    which by its attribute `stands_for`.

    Args:
        model: any module.

    Returns: the names; those of TorchScript, which has no signature to read, are unknown.
    Raises: nothing of its own.
    Cost: none, but the first time for each class.
    Source: this library's own.

    >>> arguments_of(nn.Bilinear(2, 2, 1)).required
    ['input1', 'input2']
    """
    while True:
        takes, is_wrapper = _of_forward(getattr(model.forward, "stands_for", model.forward))
        if not is_wrapper:  # a look for attributes that a module lacks takes longer than all else here
            return takes
        inner = next((m for name in _INSIDE if isinstance(m := getattr(model, name, None), nn.Module)), None)
        if inner is None or inner is model:  # as a model without a head is its own `base_model`
            return takes
        model = inner


# By the function of a bound forward: reading a signature takes as long as a small layer's step.
_READ: WeakKeyDictionary[Any, tuple[Arguments, bool]] = WeakKeyDictionary()


def _of_forward(forward: Callable[..., Any]) -> tuple[Arguments, bool]:
    """What a bound forward takes, and whether it names no argument and takes any."""
    function = getattr(forward, "__func__", None)
    if not isinstance(function, FunctionType):
        return _signature_of(forward)
    read = _READ.get(function)
    if read is None:
        read = _READ[function] = _signature_of(forward)
    return read


def _signature_of(forward: Callable[..., Any]) -> tuple[Arguments, bool]:
    try:
        found = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # TorchScript
        return Arguments([], [], [], any_place=False, any_name=True), False
    placed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p for p in found if p.kind in (*placed, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in found)
    takes = Arguments(
        [p.name for p in named if p.kind is not p.POSITIONAL_ONLY],
        [p.name for p in named if p.default is p.empty],
        [p.name for p in named if p.kind in placed and p.default in (p.empty, None)],
        any_place=any(p.kind is p.VAR_POSITIONAL for p in found),
        any_name=takes_any,
    )
    return takes, takes_any and not named
