"""`gramian bench linalg`: every task of the matrix functions and of the spectra."""

from __future__ import annotations

from collections.abc import Iterator

from gramian.bench import matrix_functions, registered, spectral
from gramian.bench.table import Row, Tell

TASKS = matrix_functions.TASKS | spectral.TASKS | registered.TASKS


def rows(repeats: int, only: str, tell: Tell) -> Iterator[Row]:
    """The rows of the tasks whose name contains `only`."""
    for name, task in TASKS.items():
        if only in name:
            tell(name)
            yield task(repeats)
