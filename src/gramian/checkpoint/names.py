"""Names of parameters without what wrappers add to them, and paths of files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gramian.errors import InputError

__all__ = ["WRAPPERS", "as_path", "clean_name", "without_wrappers"]

# A wrapper adds its attribute's name to those of the module that it wraps, anywhere in the model; DataParallel and DDP
# only wrap the whole model.
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
PARALLEL = "module."


def clean_name(name: str) -> str:
    """A parameter's name without the prefixes of DDP (`module.`), `torch.compile`, FSDP and activation checkpointing.

    Args:
        name: as in `named_parameters` or a state dict.

    Returns: the name in the plain model.
    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.

    >>> clean_name("_orig_mod.module.layers.0._checkpoint_wrapped_module.weight")
    'layers.0.weight'
    """
    name = without_wrappers(name)
    while name.startswith(PARALLEL) and name != PARALLEL:
        name = name.removeprefix(PARALLEL)
    return name


def without_wrappers(name: str) -> str:
    """A parameter's name without what `torch.compile`, FSDP and activation checkpointing add, anywhere in it.

    Args:
        name: as in `named_parameters` or a state dict.

    Returns: the name in the model before it was wrapped; `module.`, which may be the user's own, stays.

    >>> without_wrappers("_orig_mod.module.layers.0._orig_mod.weight")
    'module.layers.0.weight'
    """
    for wrapper in WRAPPERS:
        # only whole components are dropped: "my_orig_mod." is the user's own name
        name = f".{name}".replace(f".{wrapper}", ".")
        while f".{wrapper}" in name:  # a component that was wrapped twice
            name = name.replace(f".{wrapper}", ".")
        name = name[1:]
    return name


def as_path(path: Any, verb: str) -> Path:
    """The path of a file or folder that a verb was given.

    Args:
        path: what the user gave.
        verb: for the error: who asks.

    Returns: the path.
    Raises:
        InputError: it is neither text nor a path.

    >>> as_path(3, "load_plan")
    Traceback (most recent call last):
    gramian.errors.InputError: load_plan: expected the path of a file, a str or a pathlib.Path, got int
    """
    if not isinstance(path, (str, os.PathLike)):
        kind = f"the class {path.__name__}" if isinstance(path, type) else type(path).__name__
        raise InputError(f"{verb}: expected the path of a file, a str or a pathlib.Path, got {kind}")
    return Path(path)
