"""Leaving a model as it was found: mode, random state, and whether it is compiled."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

__all__ = ["eager", "evaluating", "measuring"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module's own mode and the global random state again."""
    training = {module: module.training for module in model.modules()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices):
            model.eval()
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def eager() -> Any:
    """A context in which compiled models run uncompiled: what watches a model does not see into compiled code."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """`evaluating`, and uncompiled."""
    with evaluating(model), eager():
        yield
