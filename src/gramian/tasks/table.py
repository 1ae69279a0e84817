"""The built-in tasks by name. A new one is a function in a file beside this one, and one row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from gramian.tasks.digits import autoencoder, digits, digits_cnn
from gramian.tasks.regression import diabetes
from gramian.tasks.sequences import copying
from gramian.tasks.signals import mnist1d
from gramian.training import Task

__all__ = ["TASKS", "Builtin"]


@dataclass(frozen=True)
class Builtin:
    """A built-in task.

    Args:
        make: makes it.
        summary: one line for `gramian train --list`.
    """

    make: Callable[[], Task]
    summary: str


TASKS: dict[str, Builtin] = {
    "digits": Builtin(digits, "handwritten digits, odd or even, with a plain tanh network of 100 layers"),
    "digits-10": Builtin(partial(digits, classes=10), "which digit, with the same network"),
    "digits-cnn": Builtin(digits_cnn, "which digit, with a small convolutional network"),
    "autoencoder": Builtin(autoencoder, "digits through 8 numbers and back, beside their 8 principal components"),
    "mnist1d": Builtin(
        mnist1d, "which digit, from 40 points of a curve, with a small convolutional network (an extra)"
    ),
    "diabetes": Builtin(diabetes, "regression: the progression of diabetes in 442 patients, from 10 measurements"),
    "copying": Builtin(copying, "sequences of random letters, repeated after a gap, with a small transformer"),
}
