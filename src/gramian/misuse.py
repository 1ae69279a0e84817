"""What was given in place of a model, an objective or an argument's name, and what to write."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from gramian.batch import LABELS, described, fields
from gramian.errors import InputError

__all__ = ["as_function", "instead_of_model", "instead_of_objective", "known_names"]

P = ParamSpec("P")
R = TypeVar("R")

# What torch calls a loss, and the objective that it is.
_LOSSES = {
    "CrossEntropyLoss": "classification()",
    "cross_entropy": "classification()",
    "MSELoss": "regression()",
    "mse_loss": "regression()",
}
_KINDS = ("classification", "regression", "next_token", "reconstruction", "self_distillation")


def as_function(batch: Any, loss: str = "loss") -> str:
    """The line that makes a loss of an output and a target into one of a model and a batch.

    Args:
        batch: one of those that it will get.
        loss: the function's name.

    Returns: a lambda's source, with the batch's own keys where it has some.
    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.

    >>> as_function({"image": 0, "labels": 1}, "F.mse_loss")
    "lambda model, batch: F.mse_loss(model(batch['image']), batch['labels'])"
    """
    named = fields(batch)
    if not named:
        return f"lambda model, batch: {loss}(model(batch[0]), batch[1])"
    label = next((key for key in LABELS if key in named), LABELS[0])
    given = next((key for key in named if key not in LABELS), "inputs")
    return f"lambda model, batch: {loss}(model(batch[{given!r}]), batch[{label!r}])"


def instead_of_model(value: Any) -> str:
    """What was given in place of a module, and what to write.

    Args:
        value: anything but a module.

    Returns: words that end an error's line.
    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.

    >>> instead_of_model(nn.Linear)
    'the class Linear. Give an instance: Linear(…)'
    """
    if isinstance(value, type):
        return f"the class {value.__name__}. Give an instance: {value.__name__}(…)"
    kind = type(value).__name__
    if isinstance(value, torch.export.ExportedProgram):
        return f"{kind}. Give its module: exported.module()"
    inside = getattr(value, "model", None)
    if isinstance(inside, nn.Module) and callable(getattr(value, "apply", None)):
        return f"{kind}. Its .apply() makes the compressed model, and its .model is the one before: give one of them"
    if isinstance(inside, nn.Module):
        return f"{kind}, which has one: give its .model"
    if callable(inside) and not isinstance(inside, type):
        return f"{kind}, which makes one: give its .model()"
    if isinstance(value, (str, os.PathLike)):
        return f"the path {str(value)!r}. Make the model, load the file into it, and give the model"
    if isinstance(value, torch.optim.Optimizer):
        return f"the optimizer {kind}. Give the model whose parameters it has"
    if type(value).__module__.startswith("gramian."):
        return f"{kind}, which holds none. Give the model that it was made of"
    if isinstance(value, Mapping):
        return "a mapping, perhaps a state dict. Load it into its model, or save it and give the file"
    if callable(value):
        name = getattr(value, "__name__", kind)
        return f"the function {name}, which has no parameters to look at. Give the module that it calls"
    return described(value)


def instead_of_objective(value: Any, objective: type) -> str:
    """What was given in place of an objective, and what to write; empty where it may be a loss function.

    Args:
        value: anything but an objective.
        objective: their class.

    Returns: words that end an error's line.
    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.

    >>> from gramian import Objective
    >>> instead_of_objective("mse", Objective)
    "got 'mse'. Write gm.Objective.classification(), .regression() or .next_token()"
    """
    if value is objective or isinstance(value, str):
        told = "the class Objective" if value is objective else repr(value)
        return f"got {told}. Write gm.Objective.classification(), .regression() or .next_token()"
    if isinstance(value, type):
        name = value.__name__
    elif isinstance(value, nn.Module):
        name = type(value).__name__
    elif value in (getattr(objective, kind) for kind in _KINDS):
        return f"got a function that makes one. Call it: gm.Objective.{value.__name__}()"
    elif getattr(value, "__module__", None) in ("torch.nn.functional", "torch._C._nn"):
        name = value.__name__
    else:
        return "" if callable(value) else f"got {described(value)}"
    known = f"gm.Objective.{_LOSSES[name]}, or " if name in _LOSSES else ""
    return (
        f"got {name}, which takes an output and a target. Write {known}"
        "lambda model, batch: loss(model(batch[0]), batch[1])"
    )


def known_names(name: str, **meant: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function: a keyword that it lacks is refused with the one that was meant.

    Args:
        name: of the function, for the error.
        meant: words that others use for an argument, and its name here, as in `loss="objective"`.
    Returns: a decorator, which keeps the function's signature and docstring.
    Raises:
        InputError: by the decorated function, where it gets a keyword that it lacks.
    Cost: one look-up for each keyword of a call.
    Source: this library's own.

    >>> @known_names("at", share="keep")
    ... def at(keep, *, bits=None): return keep
    >>> at(kep=0.5)
    Traceback (most recent call last):
    gramian.errors.InputError: at: there is no argument 'kep'; did you mean 'keep'?
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        known = [one for one in inspect.signature(function).parameters if one != "self"]

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            for word in kwargs:
                if word not in known:
                    near = [meant[word]] if word in meant else get_close_matches(word, known, 1)
                    told = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
                    raise InputError(f"{name}: there is no argument {word!r}; {told}")
            return function(*args, **kwargs)

        return wrapper

    return decorate
