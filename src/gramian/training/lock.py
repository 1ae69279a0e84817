"""One process at a time in a folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from gramian.errors import InputError

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None

__all__ = ["Lock", "locked"]


class Lock:
    """Holds a folder until `close`, or until the process ends, however it ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def close(self) -> None:
        """Lets go."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def locked(folder: Path) -> Lock:
    """Takes the folder; raises `InputError` where another process trains in it. File systems without locks: no check.

    The lock is the kernel's, on the folder itself: there is no file that a killed process could leave behind.
    """
    if fcntl is None:
        return Lock(-1)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise InputError(f"train: another process is training in {folder}. Wait for it, or end it") from None
        return Lock(-1)
    return Lock(descriptor)
