"""The optimizer of a run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from gramian.errors import GramianWarning, InputError
from gramian.optim.registry import OPTIMIZERS, known_name

__all__ = ["Choice", "choose"]


class Choice(NamedTuple):
    """An optimizer's name, its learning rate (`None`: its own), and the function that makes it from a model."""

    name: str
    lr: float | None
    make: Callable[[nn.Module], torch.optim.Optimizer]


def choose(optimizer: str | Callable[[nn.Module], torch.optim.Optimizer], lr: float | None) -> Choice:
    """The optimizer of a name, at its usual rate where `lr` is `None`; or the function that was given."""
    if callable(optimizer):
        if lr is not None:
            warnings.warn("train: lr is ignored, since the optimizer is a function", GramianWarning, stacklevel=3)
        return Choice(getattr(optimizer, "__qualname__", type(optimizer).__qualname__), None, optimizer)
    name = known_name("train", optimizer, "a function of the model")
    if lr is not None and not 0 <= lr < math.inf:
        raise InputError(f"train: lr must be zero or a positive number, got {lr}")
    entry = OPTIMIZERS[name]
    rate = entry.lr if lr is None else lr
    return Choice(name, rate, lambda model: entry.make(model, rate))
