"""Errors about files, of one line each: what came, what was wanted, and what to do."""

from __future__ import annotations

import re
from pathlib import Path

from gramian.checkpoint.budgets import OverBudgetError
from gramian.errors import CheckpointError, plain, some

__all__ = ["damaged", "first_line", "plain", "refused"]


# Where in torch's or gloo's sources an error arose, as "[…/pair.cc:534] ": of no use to a reader.
SOURCE = re.compile(r"\[[^][]*\.(?:cc|cpp|cu|h|hpp):\d+\]:? *")


def damaged(file: Path, error: Exception) -> CheckpointError:
    """The error for a file that cannot be read, or not to its end."""
    if isinstance(error, OSError):
        return CheckpointError(f"{file}: cannot be read ({first_line(error)}). Check that it is a file you may read.")
    if isinstance(error, OverBudgetError):
        return CheckpointError(f"{file}: not read, since it asks for too much ({first_line(error)}). {error.remedy}")
    what = (
        "an empty file" if file.exists() and not file.stat().st_size else f"damaged or truncated ({first_line(error)})"
    )
    return CheckpointError(f"{file}: {what}, wanted a whole {file.suffix} file. Copy, download or save it again.")


def refused(file: Path, wanted: list[str]) -> CheckpointError:
    """The error for a pickle that would call these functions."""
    return CheckpointError(
        f"{file}: refused, since loading it would run {some(map(plain, wanted))}; wanted tensors only. If you trust "
        "it, load it yourself and save it again: safetensors.torch.save_file(model.state_dict(), 'model.safetensors')."
    )


def first_line(error: BaseException) -> str:
    """An error's first sentence."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = SOURCE.sub("", str(error)).strip()
    sentence = (text or type(error).__name__).splitlines()[0].split(". ")[0]
    return plain(sentence.rstrip(". "))
