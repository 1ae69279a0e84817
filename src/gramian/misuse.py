"""What was given in place of a model, an objective, labels, inputs or an argument's name, and what to write."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from gramian.batch import LABELS, described, fields, parts, tensors
from gramian.errors import InputError

__all__ = [
    "as_function",
    "instead_of_inputs",
    "instead_of_labels",
    "instead_of_model",
    "instead_of_objective",
    "known_names",
    "misread",
]

P = ParamSpec("P")
R = TypeVar("R")

# What torch calls a loss, and the objective that it is.
_LOSSES = {
    "CrossEntropyLoss": "classification()",
    "cross_entropy": "classification()",
    "MSELoss": "regression()",
    "mse_loss": "regression()",
}
# What torch or Python says where something else stands in a tensor's place.
_NO_TENSOR = r"must be Tensor, not|'(list|tuple|dict|str)' object has no attribute"

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


def instead_of_labels(scores: Tensor, labels: Tensor, batch: Any = ()) -> str:
    """What to write where labels are one number each in a dimension of their own, one-hot, or whole numbers as floats.

    Args:
        scores: of the classes.
        labels: given for them.
        batch: that has these.

    Returns: words that end an error's line, or nothing.
    Raises: nothing of its own.
    Cost: a pass over the labels.
    Source: this library's own.

    >>> instead_of_labels(torch.ones(4, 3), torch.ones(4, 1))
    '. Labels with a last dimension of 1: write labels.squeeze(-1).long()'
    """
    cast = ".long()" if labels.is_floating_point() else ""
    if labels.ndim == scores.ndim and labels.shape[-1:] == (1,):
        return f". Labels with a last dimension of 1: write labels.squeeze(-1){cast}"
    if scores.ndim > 1 and labels.shape == scores.shape:
        rows = labels.detach().double()
        if bool(((rows == 0) | (rows == 1)).all()) and bool((rows.sum(-1) == 1).all()):
            return ". One-hot labels: write labels.argmax(-1)"
        if not bool((rows >= 0).all()):
            return ". For numbers to be predicted, write gm.Objective.regression()"
        own = as_function(batch, "torch.nn.functional.cross_entropy")
        return (
            ". For numbers to be predicted, write gm.Objective.regression(); for probabilities of the classes, the "
            f"loss itself: {own}"
        )
    if cast and scores.shape[:-1] == labels.shape and bool((labels == labels.round()).all()):
        return ". Whole numbers as floats: write labels.long(); for numbers to be predicted, gm.Objective.regression()"
    return ""


def instead_of_inputs(error: Exception, model: nn.Module, batch: Any, given: Sequence[Any]) -> str:
    """What to write where a call of the model failed because its inputs are no tensors, or of another dtype than it.

    Args:
        error: of the call.
        model: that was called.
        batch: whose inputs it was given.
        given: the arguments of the call.

    Returns: an error's line; empty where the error is another one.
    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.

    >>> instead_of_inputs(ValueError("else"), nn.Linear(2, 2), torch.ones(1, 2), [torch.ones(1, 2)])
    ''
    """
    return _dtype_hint(model, given, str(error)) or _type_hint(model, parts(batch).inputs, str(error))


def _type_hint(model: nn.Module, inputs: Any, error: str) -> str:
    """What to write where a call failed because a layer was given something else than a tensor: a list, a tuple."""
    if isinstance(inputs, Tensor) or not re.search(_NO_TENSOR, error):
        return ""
    return (
        f"{type(model).__name__} was given {described(inputs)}, where a layer wants a tensor. Give tensors or NumPy "
        "arrays, several inputs as arguments that forward takes by place, or say how to call it: "
        f"predict=lambda model, batch: model(…). ({error.splitlines()[0]})"
    )


def _dtype_hint(model: nn.Module, given: Sequence[Any], error: str) -> str:
    """What to write where a call failed because its inputs have another floating dtype than the weights."""
    inputs = {t.dtype for t in tensors(list(given)) if t.is_floating_point()}
    weights = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if not inputs or not weights or inputs <= weights or "type" not in error:
        return ""
    have, want = (", ".join(sorted(str(d).removeprefix("torch.") for d in kinds)) for kinds in (inputs, weights))
    return (
        f"the inputs are {have} and the weights of {type(model).__name__} {want}. Cast one of them, as in "
        f"x.to(torch.{want.partition(',')[0]}), or run this under torch.autocast. ({error.splitlines()[0]})"
    )


def misread(error: Exception, model: nn.Module, batch: Any) -> str:
    """What to write where a loss took the model and the batch, which it was given, for something else.

    Args:
        error: that it raised.
        model: its first argument.
        batch: its second.

    Returns: words that end an error's line; empty where the error is another one.
    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.

    >>> misread(AttributeError("'tuple' object has no attribute 'size'"), nn.Linear(2, 2), ())[:31]
    'it uses the batch as a tensor: '
    """
    own, text = (type(batch).__name__, type(model).__name__), str(error)
    if text in (f"'{own[0]}' object is not callable", f"'{own[1]}' object is not subscriptable"):
        return f"it uses the first as a batch or the second as a model: {text}. Swap its arguments"
    if (
        f"must be Tensor, not {own[1]}" in text
        or (text.startswith("unsupported operand") and f"'{own[1]}'" in text)
        or (_lacks(text, own[1]) and not hasattr(nn.Module, _lacks(text, own[1])))
    ):
        return f"it uses the model as an output: {text}. Write {as_function(batch)}"
    if not isinstance(batch, Tensor) and _lacks(text, own[0]):
        return f"it uses the batch as a tensor: {text}. If it takes an output and a target, write {as_function(batch)}"
    return ""


def _lacks(text: str, kind: str) -> str:
    """The attribute that tensors have and an object of this class does not, by an error's text; else empty."""
    attribute = text.removeprefix(f"'{kind}' object has no attribute ").strip("'")
    return attribute if attribute != text and hasattr(Tensor, attribute) else ""


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
