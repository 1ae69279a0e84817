"""What is wrong with a file: errors of one line that say what came, what was wanted, and what to do."""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import Any

import torch

from gramian.errors import CheckpointError

__all__ = ["damaged", "first_line", "not_a_zip", "plain", "refuse_pointer", "refused", "some", "unsafe_globals"]


def damaged(file: Path, error: Exception) -> CheckpointError:
    if isinstance(error, OSError):
        return CheckpointError(f"{file}: cannot be read ({first_line(error)}). Check that it is a file you may read.")
    what = (
        "an empty file" if file.exists() and not file.stat().st_size else f"damaged or truncated ({first_line(error)})"
    )
    return CheckpointError(f"{file}: {what}, wanted a whole {file.suffix} file. Copy, download or save it again.")


def refused(file: Path, wanted: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{file}: refused, since it wants to run {some(wanted)} while loading; wanted tensors only. Where you "
        "trust it, load it yourself and re-save: safetensors.torch.save_file(model.state_dict(), 'model.safetensors')."
    )


def unsafe_globals(file: Path) -> list[str]:
    """Return what the pickle would call beyond torch's allowed list, found by reading it, not by running it."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # too damaged even for that
        return []


def not_a_zip(file: Path) -> CheckpointError:
    """Say what a `.pt` file is instead of torch.save's zip: a bare pickle, torch.save's before 1.6, or damaged."""
    wanted: set[str] = set()
    num_pickles = 0
    with file.open("rb") as stream:
        try:
            for _ in range(4):  # the old format is four pickles, the last of which is the object
                wanted |= _pickle_globals(stream)
                num_pickles += 1
        except Exception:
            pass  # the end, or no pickle at all
    # what a state dict of that time holds: torch rebuilds tensors from storages
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
    """Return the dotted names that one pickle imports; its opcodes are listed, none is executed."""
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
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise damaged(file, error) from error
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file}: a Git LFS pointer, wanted the weights. Run: git lfs pull.")


def plain(text: object, limit: int = 200) -> str:
    """One printable line of bounded length: what comes from a file may hold anything."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in str(text)[:limit])
    return line + "…" * (len(str(text)) > limit)


def first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    sentence = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
    return plain(sentence.rstrip(". "))


def some(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(plain(name) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
