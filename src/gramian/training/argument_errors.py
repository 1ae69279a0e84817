"""One line for an argument of a wrong kind or out of its range."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

from gramian.errors import InputError, plain

__all__ = ["check", "is_whole", "one_of"]


def check(name: str, value: Any, is_right: Callable[[Any], Any], wanted: str) -> None:
    """Raise `InputError` where `is_right(value)` is false, or where that cannot be asked, as of a text's size.

    >>> check("clip", 1.0, lambda x: x > 0, "a positive number")
    >>> check("clip", "a", lambda x: x > 0, "a positive number")
    Traceback (most recent call last):
    gramian.errors.InputError: train: clip must be a positive number; got 'a'
    """
    try:
        if is_right(value):
            return
    except (TypeError, ValueError, RuntimeError):
        pass
    raise InputError(f"train: {name} must be {wanted}; got {plain(repr(value) if isinstance(value, str) else value)}")


def is_whole(value: Any) -> bool:
    """Whether it is an integer, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def one_of(name: str, value: Any, known: Any) -> None:
    """Raise `InputError` for what is not among the known names."""
    if not isinstance(value, str) or value not in known:
        raise InputError(f"train: {name} must be one of {', '.join(known)}; got {value!r}")
