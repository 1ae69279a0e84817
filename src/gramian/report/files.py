"""Writing a file atomically."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

from gramian.errors import InputError


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text to a file atomically: to a temporary file beside it, which is then renamed.

    A reader sees the old file or the new one, never a part of it, even if the process is killed.

    Args:
        path: the file to write; its folder must exist.
        text: its content.
    Raises:
        InputError: the folder is missing, or cannot be written to.
    Cost: one write and one fsync.
    Source: this library's own.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_text(f"{folder}/a.txt", "text")
    ...     Path(folder, "a.txt").read_text()
    'text'
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


def check_target(
    path: str | os.PathLike[str],
    suffixes: tuple[str, ...] = (".html", ".json"),
    made: str | os.PathLike[str] | None = None,
) -> None:
    """Check that a report can be written to a path, so that a long computation does not fail at its end.

    Args:
        path: the file that is to be written later.
        suffixes: the accepted endings of its name.
        made: a folder that is made before it is written, and those around it.
    Raises:
        InputError: another suffix, or a folder that is missing or cannot be written to.
    Cost: a few system calls; a file without a name is made and removed.
    Source: this library's own.

    >>> check_target("report.pdf")
    Traceback (most recent call last):
    gramian.errors.InputError: cannot write report.pdf: expected a name that ends in .html or .json. Rename the file.
    """
    if Path(path).suffix.lower() not in suffixes:
        wanted = " or ".join(suffixes)
        raise InputError(f"cannot write {os.fspath(path)}: expected a name that ends in {wanted}. Rename the file.")
    if made is not None:
        folder, later = Path(os.path.realpath(path)).parent, Path(os.path.realpath(made))
        if folder in (later, *later.parents) and not folder.exists():
            return
    _try_to_write(_target(path).parent, path, "Choose another folder.")


def check_folder(path: str | os.PathLike[str], advice: str = "Choose another folder.") -> None:
    """Check that a folder can be made at a path, or be written there, before the work whose result is to go there.

    Args:
        path: the folder that is to be filled later.
        advice: how the error's line ends.
    Raises:
        InputError: it is a file, the folder around it is missing, or nothing can be written there.
    Cost: a few system calls; a file without a name is made and removed.
    Source: this library's own.

    >>> check_folder("absent/out")
    Traceback (most recent call last):
    gramian.errors.InputError: cannot write to absent/out: the folder absent does not exist. Create it first.
    """
    folder = Path(path)
    try:
        there, is_folder, around = folder.exists(), folder.is_dir(), folder.parent
        is_inside = around.is_dir()
    except (OSError, ValueError) as error:  # a name too long, or with a null byte
        raise InputError(f"cannot write to {os.fspath(path)}: {_reason(error)}. {advice}") from None
    if there and not is_folder:
        raise InputError(f"cannot write to {folder}: it is a file. {advice}")
    if not there and not is_inside:
        raise InputError(f"cannot write to {folder}: the folder {around} does not exist. Create it first.")
    _try_to_write(folder if there else around, path, advice)


def _try_to_write(folder: Path, path: str | os.PathLike[str], advice: str) -> None:
    """Make a file without a name: permissions do not tell of a file system that is read-only."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write {os.fspath(path)}: {_reason(error)} in {folder}. {advice}") from None


def _reason(error: OSError | ValueError) -> str:
    return str(getattr(error, "strerror", None) or error)


def _target(path: str | os.PathLike[str]) -> Path:
    try:
        target = Path(os.path.realpath(path))  # through a link, so that the link survives
        is_other = target.exists() and not target.is_file()
    except (OSError, ValueError) as error:  # a name too long, or with a null byte
        raise InputError(f"cannot write {os.fspath(path)}: {_reason(error)}. Give another name.") from None
    if not target.parent.is_dir():
        raise InputError(f"cannot write {os.fspath(path)}: the folder {target.parent} does not exist. Create it first.")
    if is_other:
        raise InputError(f"cannot write {os.fspath(path)}: it exists and is not a regular file. Give a file name.")
    return target
