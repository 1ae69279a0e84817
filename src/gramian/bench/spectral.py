"""Spectra, low rank and products: the tasks of `gramian bench linalg` beside the dense matrix functions."""

from __future__ import annotations

from collections.abc import Callable

from gramian.bench.table import Row

TASKS: dict[str, Callable[[int], Row]] = {}
"""Name of a task: its row, from a number of repeats."""
