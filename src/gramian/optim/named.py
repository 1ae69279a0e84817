"""The optimizers that can be asked for by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from gramian.errors import InputError
from gramian.optim.muon import Muon
from gramian.optim.shampoo import Shampoo
from gramian.optim.soap import SOAP
from gramian.optim.whitened import WhitenedMuon

__all__ = ["AUTO", "OPTIMIZERS", "Named", "named"]


class Named(NamedTuple):
    """`make(model, lr)`, and the learning rate that serves where none is given."""

    make: Callable[[nn.Module, float], torch.optim.Optimizer]
    usual: float


OPTIMIZERS: dict[str, Named] = {
    "whitened_muon": Named(WhitenedMuon, 0.3),
    "muon": Named(Muon, 0.05),
    "soap": Named(SOAP, 0.1),
    "shampoo": Named(Shampoo, 0.1),
    "adamw": Named(lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr, fused=True), 1e-3),
    "sgd": Named(lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr), 0.1),
}
AUTO = "whitened_muon"
"""What `gramian bench optim` shows to be best."""


def named(caller: str, name: str) -> str:
    """The name in the table; raises `InputError` for one that is not there.

    >>> named("train", "auto")
    'whitened_muon'
    """
    if name != "auto" and name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise InputError(f"{caller}: unknown optimizer {name!r}; wanted auto, {known}, or a function (model, lr)")
    return AUTO if name == "auto" else name
