"""Copying a checkpoint's tensors into a model with the same names and shapes."""

from __future__ import annotations

import os

import torch
from torch import nn

from gramian.checkpoint.names import clean_name
from gramian.checkpoint.reading import open_checkpoint
from gramian.errors import CheckpointError, InputError, some

__all__ = ["load_into"]


def load_into(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Copies a checkpoint's tensors into a model, which must have the same names and shapes.

    Args:
        model: overwritten in place.
        path: of a checkpoint, as in `open_checkpoint`.

    Returns: the model.
    Raises:
        InputError: the first is no model.
        CheckpointError: before anything is copied, where a tensor is missing, unexpected, damaged or of another
            shape; the message names the first ones. Also as `open_checkpoint`.
    Cost: reads the file twice; memory for one tensor at a time.
    Source: this library's own.

    >>> import pathlib, tempfile
    >>> from gramian.checkpoint import save_tensors
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save_tensors(path, nn.Linear(3, 2).state_dict())
    >>> load_into(nn.Linear(4, 2), path)
    Traceback (most recent call last):
    gramian.errors.CheckpointError: ...model.safetensors does not fit Linear: weight is (2, 3), wanted (2, 4)
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"load_into: expected a torch.nn.Module and then the path, got {type(model).__name__}")
    checkpoint = open_checkpoint(path, stored=True)
    own = {clean_name(name): tensor for name, tensor in model.state_dict().items()}
    wrong = [f"{name} is missing" for name in own if name not in checkpoint.entries]
    wrong += [f"{name} is not in the model" for name in checkpoint.entries if name not in own]
    wrong += [
        f"{name} is {entry.shape}, wanted {tuple(own[name].shape)}"
        for name, entry in checkpoint.entries.items()
        if name in own and entry.shape != tuple(own[name].shape)
    ]
    if wrong:
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {some(wrong, separator='; ')}")
    for _ in checkpoint:  # a tensor that cannot be read, or differs from its checksum, is found before any is copied
        pass
    with torch.no_grad():
        for name, tensor in checkpoint:
            own[name].copy_(tensor)
    return model
