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
    target = Path(os.path.realpath(path))  # through a link, so that the link survives
    folder = target.parent
    if not folder.is_dir():
        raise InputError(f"cannot write {os.fspath(path)}: the folder {folder} does not exist. Create it first.")
    if target.exists() and not target.is_file():
        raise InputError(f"cannot write {os.fspath(path)}: it exists and is not a regular file. Give a file name.")
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
