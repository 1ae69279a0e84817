"""Where a forward pass fails: the module, what it was given and what it wants, in one line."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gramian.batch import described
from gramian.errors import GramianError, InputError
from gramian.objective import Objective
from gramian.recording.hooks import hooks
from gramian.recording.measuring import measuring

__all__ = ["check_runs", "naming_the_layer"]

# Attributes in which torch's modules say what they take, and what that is.
_WANTED = (
    ("in_features", "{} features in the last dimension"),
    ("in_channels", "{} channels in dimension 1"),
    ("num_features", "{} channels in dimension 1"),
    ("num_channels", "{} channels in dimension 1"),
    ("input_size", "{} features in the last dimension"),
    ("normalized_shape", "the last dimensions {}"),
    ("embed_dim", "{} features in the last dimension"),
    ("num_embeddings", "integers from 0, below {}"),
)


def check_runs(caller: str, model: nn.Module, batch: Any, objective: Objective) -> None:
    """Run the loss in evaluation mode, and say in one line where it fails.

    Args:
        caller: the function that was called, for the message.
        model: left as it was.
        batch: one batch.
        objective: gives the loss.

    Raises:
        InputError: a module cannot run on what it is given, with its name, the input and what it wants.
        Exception: what the model's own code raises, as it is.
    Cost: a forward pass.
    """
    names = {module: name for name, module in model.named_modules()}
    running: list[tuple[nn.Module, tuple[Any, ...]]] = []

    def enter(module: nn.Module, given: tuple[Any, ...]) -> None:
        running.append((module, given))

    def leave(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if running and running[-1][0] is module:
            running.pop()

    handles = [m.register_forward_pre_hook(enter) for m in names]
    handles += [m.register_forward_hook(leave) for m in names]
    try:
        with hooks(handles), measuring(model), torch.enable_grad():  # a loss may differentiate on its way
            objective.loss(model, batch)
    except (GramianError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        if not running or _is_raised_by_a_module(error):
            raise
        module, given = running[-1]
        raise InputError(f"{caller}: {_told(names[module], module, given)} ({_first_line(error)})") from error


@contextmanager
def naming_the_layer(caller: str, batch: Any, objective: Objective, *models: nn.Module) -> Iterator[None]:
    """Say which layer cannot run on the batch, where the body fails and the forward pass of one of the models does too.

    Args:
        caller: the function that was called, for the message.
        batch: one batch, as the body runs it.
        objective: gives the loss.
        models: run only where the body fails; left as they were.

    Returns: a context.
    Raises:
        InputError: as `check_runs`; where the models run, the body's own error is raised as it is.
    Cost: none; where the body fails, a forward pass of each model.
    """
    try:
        yield
    except (GramianError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, IndexError, ValueError):
        for model in models:
            check_runs(caller, model, batch, objective)
        raise


def _is_raised_by_a_module(error: Exception) -> bool:
    """Whether a line outside torch raises the error by name, and so means what it says."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
        return False
    return dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def _told(name: str, module: nn.Module, given: tuple[Any, ...]) -> str:
    kind = type(module).__name__
    who = f"{name} ({kind})" if name else f"the model ({kind})"
    got = ", ".join(_value(value) for value in given if value is not None) or "named arguments"
    wanted = next((form.format(getattr(module, own)) for own, form in _WANTED if hasattr(module, own)), "")
    kinds = _other_dtype(module, given)
    if kinds:
        return f"{who} got {got} of {kinds[0]}, and its weights are {kinds[1]}. Write x.to(torch.{kinds[1]})"
    if wanted:
        return f"{who} got {got} and wants {wanted}. Give batches of that shape, or change the layer"
    return f"{who} cannot run on {got}. Give batches that its forward takes, or change it"


def _other_dtype(module: nn.Module, given: tuple[Any, ...]) -> tuple[str, str] | None:
    """The dtypes of the input and of the weights of a layer that multiplies them, where they are two."""
    weight = getattr(module, "weight", None)
    x = given[0] if given else None
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or hasattr(module, "num_embeddings"):
        return None
    if x.dtype == weight.dtype or not weight.is_floating_point():
        return None
    return str(x.dtype).removeprefix("torch."), str(weight.dtype).removeprefix("torch.")


def _value(value: Any) -> str:
    if not isinstance(value, Tensor):
        return described(value)
    told = f"a tensor of shape {tuple(value.shape)}"
    if value.numel() and not value.is_floating_point() and not value.is_complex():
        told += f" with values from {int(value.min())} to {int(value.max())}"
    return told


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
