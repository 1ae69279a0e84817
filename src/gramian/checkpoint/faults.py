"""Errors about files, of one line each: what came, what was wanted, and what to do."""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import Any

import torch

from gramian.errors import CheckpointError

__all__ = ["damaged", "first_line", "not_a_zip", "plain", "refuse_pointer", "refused", "some", "unsafe_globals"]


def damaged(file: Path, error: Exception) -> CheckpointError:
    """The error for a file that cannot be read, or not to its end."""
    if isinstance(error, OSError):
        return CheckpointError(f"{file}: cannot be read ({first_line(error)}). Check that it is a file you may read.")
    what = (
        "an empty file" if file.exists() and not file.stat().st_size else f"damaged or truncated ({first_line(error)})"
    )
    return CheckpointError(f"{file}: {what}, wanted a whole {file.suffix} file. Copy, download or save it again.")


def refused(file: Path, wanted: list[str]) -> CheckpointError:
    """The error for a pickle that would call these functions."""
    return CheckpointError(
        f"{file}: refused, since loading it would run {some(wanted)}; wanted tensors only. If you trust it, "
        "load it yourself and save it again: safetensors.torch.save_file(model.state_dict(), 'model.safetensors')."
    )


def unsafe_globals(file: Path) -> list[str]:
    """The functions outside torch's allowed list that a pickle would call; it is read for that, not executed."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # too damaged even for that
        return []


def not_a_zip(file: Path) -> CheckpointError:
    """The error for a `.pt` file that is no zip: a bare pickle, torch.save's format before 1.6, or a damaged file."""
    wanted: set[str] = set()
    num_pickles = 0
    with file.open("rb") as stream:
        try:
            for _ in range(4):  # the old format is four pickles; the last is the object
                wanted |= _pickle_globals(stream)
                num_pickles += 1
        except Exception:
            pass  # the end of the file, or no pickle at all
    # what a state dict of that format holds: torch rebuilds tensors from storages
    known = ("collections.OrderedDict", "torch._utils._rebuild_", "torch.nn.parameter.Parameter")
    suspect = sorted(name for name in wanted if not name.startswith(known) and not name.endswith("Storage"))
    if suspect:
        return refused(file, suspect)
    if not num_pickles:
        return damaged(file, ValueError("not a zip archive"))
    return CheckpointError(
        f"{file}: a bare pickle or torch.save's format before 1.6, wanted its zip format, which can be read in parts. "
        "Re-save: torch.save(torch.load(file, weights_only=True), file)."
    )


def _pickle_globals(stream: Any) -> set[str]:
    """The dotted names that one pickle imports; its opcodes are listed, none is executed."""
    found: set[str] = set()
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            found.add(str(argument).replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL":
            found.add(".".join(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
    return found


def refuse_pointer(file: Path) -> None:
    """Raises where the file is a pointer that Git LFS has not yet replaced by the weights."""
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise damaged(file, error) from error
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file}: a Git LFS pointer, wanted the weights. Run: git lfs pull.")


def plain(text: object, limit: int = 200) -> str:
    """The text as one printable line of bounded length, since text from a file may hold anything."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in str(text)[:limit])
    return line + "…" * (len(str(text)) > limit)


def first_line(error: Exception) -> str:
    """An error's first sentence."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    sentence = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
    return plain(sentence.rstrip(". "))


def some(names: list[str], limit: int = 3) -> str:
    """The first few of the names, and how many more there are."""
    shown = ", ".join(plain(name) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
