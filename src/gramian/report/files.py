"""Writing a file so that it is whole or absent."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from gramian.errors import InputError


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text to a temporary file beside `path` and rename it into place.

    A reader, and a process killed at any moment, sees the old file or the new one, never a part. Raises `InputError`
    with one line where the folder is missing or cannot be written.
    """
    target = _target(path)
    folder = target.parent
    # In the same folder because a rename is atomic only within one file system.
    temporary = folder / f".{target.name[:100]}.{secrets.token_hex(6)}.tmp"
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"cannot write {os.fspath(path)}: {reason}. Choose a folder that you may write to.") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_target(path: str | os.PathLike[str], suffixes: tuple[str, ...] = (".html", ".json")) -> None:
    """Raise `InputError` where a report could not be written to `path`: to be told before the work, not after it."""
    if Path(path).suffix.lower() not in suffixes:
        wanted = " or ".join(suffixes)
        raise InputError(f"cannot write {os.fspath(path)}: expected a name that ends in {wanted}. Rename the file.")
    folder = _target(path).parent
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write {os.fspath(path)}: no permission in {folder}. Choose another folder.")


def _target(path: str | os.PathLike[str]) -> Path:
    target = Path(os.path.realpath(path))  # through a link, so that the link survives
    if not target.parent.is_dir():
        raise InputError(f"cannot write {os.fspath(path)}: the folder {target.parent} does not exist. Create it first.")
    if target.exists() and not target.is_file():
        raise InputError(f"cannot write {os.fspath(path)}: it exists and is not a regular file. Give a file name.")
    return target
