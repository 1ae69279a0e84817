"""What gramian raises and warns.

Every error says what came, what was wanted, and what to do. Errors that a user can cause are `ValueError`s too, so
`except ValueError` works as in numpy and torch.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConvergenceError",
    "DtypeError",
    "GramianError",
    "GramianWarning",
    "InputError",
    "ShapeError",
    "TaskError",
    "UnsupportedError",
]


class GramianError(Exception):
    """Base of everything that gramian raises on purpose."""


class InputError(GramianError, ValueError):
    """An argument has a value that cannot be used."""


class ShapeError(InputError):
    """A tensor has the wrong number of dimensions, or dimensions that do not fit together."""


class DtypeError(InputError):
    """A tensor has a dtype, or a value such as NaN, that the function does not accept."""


class ConvergenceError(GramianError, ArithmeticError):
    """A matrix function's certificate failed: no route reached the accuracy asked for, or the answer does not exist."""


class CheckpointError(InputError):
    """A file is missing, damaged, or holds what must not be loaded."""


class TaskError(InputError):
    """A task cannot be found, raises, or returns the wrong thing."""


class UnsupportedError(InputError):
    """A model holds something that the capability refuses by name."""


class GramianWarning(UserWarning):
    """A setting is ignored, or a result needs attention."""
