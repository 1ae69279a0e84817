"""Hooks on a model's forward pass, which no file holds."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import nn

from gramian.errors import GramianWarning, some

__all__ = ["warn_of_hooks"]

LIBRARIES = ("torch", "gramian", "transformers", "accelerate", "peft")
"""Their hooks compute weights from what is in the file, or observe, or are put there again by the library."""


def warn_of_hooks(model: nn.Module, verb: str) -> None:
    """Warns where a model has forward hooks of the user's, which may change what it computes.

    Args:
        model: that is about to be written.
        verb: the name of the function, for the warning.

    >>> warn_of_hooks(nn.Linear(2, 2), "save_compressed")  # it has none, and nothing is said
    """
    found = list(_hooked(model))
    if found:
        warnings.warn(
            f"{verb}: a file holds no hooks, and there are forward hooks on {some(found)}. What they change is lost "
            "with the file: put it into the data or into forward",
            GramianWarning,
            stacklevel=3,
        )


def _hooked(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            made = getattr(hook, "__module__", None) or type(hook).__module__
            if made.split(".")[0] not in LIBRARIES:
                yield name or type(module).__name__
                break
