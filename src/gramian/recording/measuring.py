"""Contexts that leave a model as they found it: its mode, the random state, and whether it is compiled."""

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
    """A context with the model in evaluation mode; then each module's mode and the global random state are restored.

    Args:
        model: any module.

    Returns: the context manager.
    Raises: nothing of its own.
    Cost: a pass over the modules.
    Source: this library's own.

    >>> layer = nn.Dropout()
    >>> with evaluating(layer):
    ...     print(layer.training)
    False
    >>> layer.training
    True
    """
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
    """A context in which compiled models run uncompiled, since a function mode does not see into compiled code."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """A context like `evaluating`, in which a compiled model also runs uncompiled.

    Args:
        model: any module.

    Returns: the context manager.
    Raises: nothing of its own.
    Cost: a pass over the modules.
    Source: this library's own.

    >>> with measuring(nn.Dropout()) as _:
    ...     pass
    """
    with evaluating(model), eager():
        yield
