"""What a run may write over: the folder that it opened, and files that are its own or an earlier run's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from gramian.checkpoint.faults import plain
from gramian.errors import InputError

__all__ = ["Owned"]

_Place = tuple[int, ...]


class Owned:
    """Notices that a folder, or a file in it, is no longer what the run left there.

    The folder is held open, so that its number is not given to another one. Where a file's number, size or time has
    changed, as a touch or some file systems do, its content decides.

    Args:
        path: the folder.
        shown: the same for messages.
    """

    def __init__(self, path: Path, shown: Path) -> None:
        self.path, self.shown = path, shown
        self._folder = _place(path)[:2]
        self._files: dict[str, _Place] = {}
        self._descriptor = -1
        if hasattr(os, "O_DIRECTORY"):
            with suppress(OSError):
                self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        """Let go of the folder."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def note(self, *names: str) -> None:
        """Remember files as they are now: the run's own."""
        for name in names:
            self._files[name] = _place(self.path / name)

    def is_here(self) -> bool:
        """Whether the path still leads to the folder that was opened."""
        return _place(self.path)[:2] == self._folder

    def check(self, names: Iterable[str], is_own: Callable[[Path], bool]) -> None:
        """Raise `InputError` where the folder, or a file of one of these names, is not the run's.

        Args:
            names: of files that are about to be written or removed; one that is gone is no fault.
            is_own: whether a file that was not there before is a run's all the same.
        """
        if not self.is_here():
            raise InputError(
                f"train: {plain(self.shown, 500)} is no longer the folder that this run began in: it was moved, "
                "deleted or replaced. The run ends, and writes nothing there. Where the folder was moved, continue "
                "there with --resume"
            )
        for name in names:
            place = _place(self.path / name)
            if place and place != self._files.get(name) and not is_own(self.path / name):
                raise InputError(
                    f"train: {plain(self.shown / name, 500)} appeared while the run went on and is not the run's own. "
                    "The run ends, and leaves it and the last checkpoint. Move it, and continue with --resume"
                )


def _place(path: Path) -> _Place:
    """A file's or folder's device and number, its size and when it was changed; empty if there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
