"""Names and arguments that will be removed: they work for one more minor version and warn at the line that uses them.

`tests/test_deprecation.py` fails when the version named in `removed_in` is reached.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from gramian.errors import GramianWarning, InputError

__all__ = ["GramianDeprecationWarning", "deprecated", "renamed"]

P = ParamSpec("P")
R = TypeVar("R")


class GramianDeprecationWarning(GramianWarning, DeprecationWarning):
    """A name or an argument of gramian is used that a later version no longer has."""


def deprecated(name: str, *, instead: str, removed_in: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function that will be removed: it works as before and warns at the caller's line.

    Python shows a warning once for each line that causes it. A class is deprecated by decorating its `__init__`.

    Args:
        name: how users write it, such as `"gm.linalg.inv_pth_root"`.
        instead: what to write from now on.
        removed_in: the version of gramian that no longer has it, such as `"0.3"`.
    Returns: a decorator, which keeps the function's signature and docstring.
    Raises: nothing of its own.
    Cost: one call of `warnings.warn` for each call of the function.
    Source: this library's own.

    >>> def inv_root(m, p): return m ** (-1 / p)
    >>> inv_pth_root = deprecated("inv_pth_root", instead="inv_root", removed_in="9.0")(inv_root)
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     inv_pth_root(16.0, 4)
    0.5
    >>> print(caught[0].message)
    inv_pth_root is deprecated and will be removed in gramian 9.0; write inv_root
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            _warn(name, instead, removed_in)
            return function(*args, **kwargs)

        return wrapper

    return decorate


def renamed(*, removed_in: str, **names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function whose keyword arguments have new names: the old ones work as before and warn.

    The signature and the docstring have the new names only.

    Args:
        removed_in: the version of gramian that no longer takes the old names, such as `"0.3"`.
        names: old name and new name, as in `renamed(removed_in="0.3", num_iterations="num_steps")`.
    Returns: a decorator.
    Raises:
        InputError: by the decorated function, where it gets an argument by both names.
    Cost: one look-up for each old name and call.
    Source: this library's own.

    >>> @renamed(removed_in="9.0", num_iterations="num_steps")
    ... def rate(*, num_steps): return 1 / num_steps
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     rate(num_iterations=2)
    0.5
    >>> print(caught[0].message)
    rate(num_iterations=...) is deprecated and will be removed in gramian 9.0; write num_steps=...
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in names.items():
                if old in kwargs:
                    if new in kwargs:
                        raise InputError(f"{name}: got {old}= and {new}=, which are the same; write {new}= alone")
                    _warn(f"{name}({old}=...)", f"{new}=...", removed_in)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper

    return decorate


def _warn(what: str, instead: str, removed_in: str) -> None:
    """Warns at the line that called the wrapper which calls this."""
    message = f"{what} is deprecated and will be removed in gramian {removed_in}; write {instead}"
    warnings.warn(message, GramianDeprecationWarning, stacklevel=3)
