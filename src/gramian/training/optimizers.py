"""The optimizer of a run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from gramian.errors import GramianWarning, InputError
from gramian.optim.named import OPTIMIZERS, named

__all__ = ["choose"]


class Choice(NamedTuple):
    """An optimizer's name, its learning rate (`None`: its own), and the function that makes it."""

    name: str
    lr: float | None
    make: Callable[[nn.Module], torch.optim.Optimizer]


def choose(optimizer: str | Callable[[nn.Module], torch.optim.Optimizer], lr: float | None) -> Choice:
    """A row of the table by its name, or a function by its own."""
    if callable(optimizer):
        if lr is not None:
            warnings.warn("train: lr is ignored, the optimizer is a function", GramianWarning, stacklevel=3)
        return Choice(getattr(optimizer, "__qualname__", type(optimizer).__qualname__), None, optimizer)
    name = named("train", optimizer)
    if lr is not None and not 0 <= lr < math.inf:
        raise InputError(f"train: lr must be zero or a positive number, got {lr}")
    make, usual = OPTIMIZERS[name]
    rate = usual if lr is None else lr
    return Choice(name, rate, lambda model: make(model, rate))
