"""The optimizers that a run can name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from gramian.errors import GramianWarning, InputError
from gramian.optim import SOAP, Muon, Shampoo, SOAPMuon

__all__ = ["AUTO", "OPTIMIZERS", "choose"]

# name: (constructor, learning rate that serves where none is given)
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], float]] = {
    "soap_muon": (lambda model, lr: SOAPMuon(model, lr=lr), 0.1),
    "muon": (lambda model, lr: Muon(model, lr=lr), 0.05),
    "soap": (lambda model, lr: SOAP(model, lr=lr), 0.1),
    "shampoo": (lambda model, lr: Shampoo(model, lr=lr), 0.1),
    "adamw": (lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr, fused=True), 1e-3),
}
AUTO = "soap_muon"


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
    name = AUTO if optimizer == "auto" else optimizer
    if name not in OPTIMIZERS:
        raise InputError(f"train: unknown optimizer {optimizer!r}; wanted auto, {', '.join(OPTIMIZERS)}, or a function")
    if lr is not None and not 0 <= lr < math.inf:
        raise InputError(f"train: lr must be zero or a positive number, got {lr}")
    make, usual = OPTIMIZERS[name]
    rate = usual if lr is None else lr
    return Choice(name, rate, partial(make, lr=rate))
