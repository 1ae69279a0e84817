"""How many tensors a file may name, and how long: a small one cannot take minutes and gigabytes to describe."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["MOST_TENSORS", "SWITCH", "OverBudgetError", "check_names", "check_number", "most_tensors", "size_of"]

# Whatever its size a file may name so many tensors, and one more for so many bytes: those of a model take more.
MOST_TENSORS, BYTES_A_TENSOR = 1 << 15, 1 << 12

LONGEST = 1 << 10  # characters of a name, which is taken apart at its dots: those of a model have a hundred or two

SWITCH = "GRAMIAN_MOST_TENSORS"
"""The environment variable that sets another number for every file."""


class OverBudgetError(ValueError):
    """A file that asks for more than it can need; `remedy` says what to do with one that is trusted."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy or (
            "If you trust it, load it yourself and save its tensors: safetensors.torch.save_file(state, "
            "'model.safetensors')."
        )


def most_tensors(size: int) -> int:
    """How many tensors a file of so many bytes may name."""
    asked = os.environ.get(SWITCH, "")
    return int(asked) if asked.isdecimal() else MOST_TENSORS + size // BYTES_A_TENSOR


def check_number(number: int, size: int) -> None:
    """Raise `OverBudgetError` where a file of so many bytes names more tensors than it may."""
    most = most_tensors(size)
    if number > most:
        raise OverBudgetError(
            f"more than {most:,} tensors in {size:,} bytes",
            f"If you trust it, allow more by the environment variable: {SWITCH}=1000000.",
        )


def check_names(names: Iterable[str]) -> None:
    """Raise `OverBudgetError` for a name of a tensor that is longer than any model's."""
    longest = max(map(len, names), default=0)
    if longest > LONGEST:
        raise OverBudgetError(
            f"a tensor's name of {longest:,} characters, of {LONGEST:,} at most",
            "If you trust it, load it yourself and save its tensors under shorter names.",
        )


def size_of(path: Path) -> int:
    """The bytes of a file, or of those in a folder."""
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
