"""An optimizer as a user gives it to a verb: a name, a class, or a function of the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
from torch import nn

from gramian.errors import InputError
from gramian.optim.registry import OPTIMIZERS, known_name
from gramian.optim.shell import MatrixOptimizer

__all__ = ["Given", "given"]

EXAMPLE = "lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)"


class Given(NamedTuple):
    """An optimizer that was given.

    Attributes:
        name: of the optimizer, the class or the function.
        takes_rate: whether it is made at a rate that one chooses.
        needs_rate: whether it cannot be made without one.
        make: `make(model, lr)`; without a rate (`None`) at its own.
    """

    name: str
    takes_rate: bool
    needs_rate: bool
    make: Callable[[nn.Module, float | None], Any]


def given(caller: str, optimizer: Any) -> Given:
    """A name of `OPTIMIZERS`, a class (or `partial` of one), or a function `(model, lr)` or `(model)`, in one form.

    Args:
        caller: for errors: who asks.
        optimizer: what the user gave.

    Returns: how it is called and made. What it makes is not checked.
    Raises:
        InputError: it is none of these, such as an optimizer that is made already; later, where it takes the model
            for its parameters.

    >>> given("train", torch.optim.SGD).make(nn.Linear(2, 1), 0.5).defaults["lr"]
    0.5
    >>> given("train", lambda model: torch.optim.SGD(model.parameters(), 0.1)).takes_rate
    False
    """
    if isinstance(optimizer, str):
        name = known_name(caller, optimizer, "in Python a class, or a function of the model")
        return Given(name, True, False, OPTIMIZERS[name].make)
    if isinstance(optimizer, torch.optim.Optimizer):
        kind = type(optimizer)
        own = "model" if isinstance(optimizer, MatrixOptimizer) else "model.parameters()"
        raise InputError(
            f"{caller}: optimizer is one that is made for each model, got {kind.__name__} with parameters of its own. "
            f"Give the class {kind.__name__}, or a function: lambda model, lr: {kind.__name__}({own}, lr=lr)"
        )
    if not callable(optimizer):
        raise InputError(
            f"{caller}: optimizer must be a name, a class or a function, got {type(optimizer).__name__}. As {EXAMPLE}"
        )
    whole: Any = optimizer.func if isinstance(optimizer, partial) else optimizer
    name = getattr(whole, "__qualname__", type(whole).__qualname__)
    is_class = isinstance(whole, type) and issubclass(whole, torch.optim.Optimizer)
    takes, needs, by_place = _rate_of(optimizer)

    def make(model: nn.Module, lr: float | None) -> Any:
        first = model.parameters() if is_class and not issubclass(whole, MatrixOptimizer) else model
        called: Any = optimizer
        try:
            if lr is None or not takes:
                return called(first)
            return called(first, lr) if by_place else called(first, lr=lr)
        except TypeError as error:
            if "is not iterable" not in str(error) and "can only optimize Tensors" not in str(error):
                raise
            raise InputError(
                f"{caller}: the optimizer's function is called with the model ({error}). Write model.parameters() "
                f"where it wants parameters: {EXAMPLE}"
            ) from error

    return Given(name, takes, needs, make)


def _rate_of(optimizer: Callable[..., Any]) -> tuple[bool, bool, bool]:
    """Whether a function or class takes a rate, whether it must have one, and whether it is the second argument."""
    try:
        found = signature(optimizer).parameters
    except (TypeError, ValueError):  # of C
        return True, False, False
    if "lr" in found:
        return True, found["lr"].default is Parameter.empty, False
    if any(p.kind is Parameter.VAR_KEYWORD for p in found.values()):
        return True, False, False
    places = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    wanted = [p for p in found.values() if p.kind in places and p.default is Parameter.empty]
    second = len(wanted) == 2
    return second, second, second
