"""Contexts that leave a model as they found it: its mode, the random state, and whether it is compiled."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from gramian.recording.kept_state import own_gradients
from gramian.seeding import kept_random

__all__ = ["batch_statistics", "by_modules", "eager", "evaluating", "measuring", "training"]


@contextmanager
def _restored(model: nn.Module) -> Iterator[dict[nn.Module, bool]]:
    """A context after which each module's mode, which it gives, and the global random state are what they were."""
    training = {module: module.training for module in model.modules()}
    try:
        with kept_random():
            yield training
    finally:
        for module, mode in training.items():
            if module.training is not mode:  # setting an attribute of a module takes long
                module.training = mode


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
    with _restored(model) as modes:
        if any(modes.values()):
            model.eval()
        yield


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """A context with the model in the mode in which it is trained; then all but parameters is restored.

    Parts of a model in training mode that are in evaluation mode stay there: they are trained so. A model that is in
    evaluation mode as a whole is set to training. A compiled model runs uncompiled.

    Args:
        model: any module.

    Returns: the context manager.
    Cost: a copy of the buffers.

    >>> layer = nn.BatchNorm1d(2)
    >>> with training(layer):
    ...     _ = layer(torch.ones(4, 2))
    >>> int(layer.num_batches_tracked)
    0
    """
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with _restored(model), own_gradients(model), eager():
            if not model.training:
                model.train()
            yield
    finally:
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """A context in which batch norms use the batch's statistics in evaluation mode too, as they do when they train.

    Batch norms in evaluation mode within a model in training mode keep the stored ones.

    Args:
        model: any module.

    Returns: the context manager.
    Cost: a pass over the modules.

    >>> layer = nn.BatchNorm1d(1)
    >>> with batch_statistics(layer):
    ...     layer.eval()(torch.tensor([[1.0], [3.0]])).detach().abs().round(decimals=3).flatten().tolist()
    [1.0, 1.0]
    """
    kept = []
    for module in model.modules():
        trains = module.training or not model.training
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None and trains:
            kept.append((module, module.running_mean, module.running_var))
            module.running_mean = module.running_var = None
    try:
        yield
    finally:
        for module, mean, variance in kept:
            module.running_mean, module.running_var = mean, variance


def eager() -> Any:
    """A context in which compiled models run uncompiled, since a function mode does not see into compiled code."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def by_modules() -> Iterator[None]:
    """A context without torch's inference kernels of attention, which hide modules and take nested tensors.

    `nn.TransformerEncoder` then keeps its padding.

    Returns: the context manager.

    >>> with by_modules():
    ...     print(torch.backends.mha.get_fastpath_enabled())
    False
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


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
