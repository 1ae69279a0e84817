"""Hooks that stay for as long as a context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["hooks"]


@contextmanager
def hooks(handles: Sequence[Any]) -> Iterator[None]:
    """A context at whose end hooks are removed.

    Args:
        handles: what registering them returned.

    Returns: the context manager.

    >>> from torch import nn
    >>> layer = nn.Identity()
    >>> with hooks([layer.register_forward_hook(lambda module, args, output: 2)]):
    ...     layer(1)
    2
    >>> layer(1)
    1
    """
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
