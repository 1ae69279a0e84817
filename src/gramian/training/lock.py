"""A lock that lets only one process train in a folder."""

from __future__ import annotations

import errno
import os
import weakref
from pathlib import Path

from gramian.errors import InputError

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None

__all__ = ["Lock", "locked"]


class Lock:
    """A lock on a folder, held until `close` or the end of the process, however it ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        _HELD.add(self)

    def close(self) -> None:
        """Release the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


def _close_in_child() -> None:
    for lock in list(_HELD):
        lock.close()


# A forked process, such as a DataLoader's worker, shares the lock, and may live on when this one is killed.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def locked(folder: Path, shown: Path | None = None) -> Lock:
    """Lock a folder; raises `InputError` where another process has it. Without effect on file systems without locks.

    The kernel holds the lock, on the folder itself, so that a killed process leaves no lock file behind.
    """
    if fcntl is None:
        return Lock(-1)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise InputError(
                f"train: another process is training in {shown or folder}. Wait for it, or stop it"
            ) from None
        return Lock(-1)
    return Lock(descriptor)
