"""The exceptions and the warning that gramian raises.

Every error says what came, what was wanted, and what to do. Errors that a user can cause are `ValueError`s too, so
`except ValueError` works as with numpy and torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = [
    "CheckpointError",
    "ConvergenceError",
    "DtypeError",
    "FindingError",
    "GramianError",
    "GramianWarning",
    "InputError",
    "ShapeError",
    "TaskError",
    "UnsupportedError",
]


class GramianError(Exception):
    """The base class of gramian's errors."""

    rank = None  # type: int | None  # that failed, or that speaks for all, where all ranks raise the error


class InputError(GramianError, ValueError):
    """An argument has a value that cannot be used."""


class ShapeError(InputError):
    """A tensor has the wrong number of dimensions, or dimensions that do not fit together."""


class DtypeError(InputError):
    """A tensor has a dtype, or a value such as NaN, that the function does not accept."""


class ConvergenceError(GramianError, ArithmeticError):
    """A matrix function's certificate failed: no method was accurate enough, or the answer does not exist."""


class FindingError(GramianError):
    """A watched training was stopped by a finding: `finding`, at the step `step`, counted from 1."""

    def __init__(self, finding: Any, step: int) -> None:
        told = f"{finding.title} ({finding.code} at {finding.where}). {finding.cause}".rstrip()
        super().__init__(f"step {step}: {told} {finding.remedy}".rstrip())
        self.finding, self.step = finding, step


class CheckpointError(InputError):
    """A file is missing or damaged, or must not be loaded."""


class TaskError(InputError):
    """A task cannot be found, raises an error, or returns something else than a task needs."""


class UnsupportedError(InputError):
    """A model, setting or environment has something that the function does not support, named in the message."""


class GramianWarning(UserWarning):
    """A setting is ignored, or a result needs attention."""


def some(names: Iterable[str], limit: int = 3, separator: str = ", ") -> str:
    """The first few names, and how many more there are.

    Args:
        names: or other short texts, printable.
        limit: how many are shown.
        separator: what stands between them.

    Returns:
        A line.

    >>> some(["a", "b", "c"]), some("abcde"), some("abcde", 2, "; ")
    ('a, b, c', 'a, b, c and 2 more', 'a; b and 3 more')
    """
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return separator.join(listed[:limit]) + more


def plain(text: object, limit: int = 200) -> str:
    r"""The text as one printable line of bounded length, since text from a file may hold anything.

    Args:
        text: or what becomes one.
        limit: how many characters are kept.

    Returns:
        A line.

    >>> print(plain("two\nlines"), plain("abcdef", 3))
    two\nlines abc…
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in str(text)[:limit])
    return line + "…" * (len(str(text)) > limit)
