"""Text files that a user names: regular ones of a bounded size, since a pipe waits and a device may not end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

__all__: list[str] = []  # for the library alone

# Of a text; far more than any list of options, and as much as is tokenized in memory.
MOST_BYTES = 1 << 30


def read_text(path: str | os.PathLike[str]) -> str:
    """The UTF-8 text of a regular file of at most `MOST_BYTES`.

    Args:
        path: of the file, or of a link to it.

    Returns:
        The text.

    Raises:
        OSError: it cannot be read, is a pipe, a device or a folder, or is too large; `strerror` says which.
        ValueError: the path has a null byte, or the file is no UTF-8.
    Cost: reading the file.

    >>> read_text("/dev/zero")
    Traceback (most recent call last):
    OSError: [Errno 22] it is no regular file: '/dev/zero'
    """
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
    if found.st_size > MOST_BYTES:
        raise OSError(errno.EFBIG, f"it has {found.st_size:,} bytes, and {MOST_BYTES:,} are allowed", os.fspath(path))
    return Path(path).read_text(encoding="utf-8")
