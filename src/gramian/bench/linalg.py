"""`gramian bench linalg`: the tasks of matrix_functions.py, spectral.py, certificate_shares.py and registered.py."""

from __future__ import annotations

from collections.abc import Iterator

from gramian.bench import certificate_shares, matrix_functions, registered, spectral
from gramian.bench.table import Row, Tell

TASKS = matrix_functions.TASKS | spectral.TASKS | certificate_shares.TASKS | registered.TASKS


def rows(repeats: int, only: str, tell: Tell) -> Iterator[Row]:
    """Yields the rows of the tasks whose name contains `only`, and calls `tell` with each name before its task runs."""
    for name, task in TASKS.items():
        if only in name:
            tell(name)
            yield task(repeats)
