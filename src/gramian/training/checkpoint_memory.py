"""Memory for the copy of a checkpoint, made before the first one needs it."""

from __future__ import annotations

import mmap
import threading
from concurrent.futures import Executor, Future
from contextlib import suppress

import torch

__all__ = ["Room"]

# Below so many bytes there is nothing to gain; so many are used at a time.
LEAST, PIECE = 64 << 20, 16 << 20


class Room:
    """Lets the system make memory in another thread, and gives it back at once: the system then has it at hand.

    The first use of memory takes a virtual machine some four times as long as its copy, for which the first checkpoint
    of a large model would stop the run.

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> with ThreadPoolExecutor(1) as thread:
    ...     room = Room(thread)
    ...     room.make(1 << 26)
    ...     room.leave()
    """

    def __init__(self, thread: Executor) -> None:
        self._thread, self._enough = thread, threading.Event()
        self._making: Future[None] | None = None

    def make(self, size: int) -> None:
        """Begin to make so many bytes."""
        if size >= LEAST:
            self._making = self._thread.submit(self._touch, size)

    def leave(self) -> None:
        """Give back what was made so far, and make no more."""
        self._enough.set()
        if self._making is not None:
            self._making.result()

    def _touch(self, size: int) -> None:
        with suppress(RuntimeError):  # there is less: the checkpoint itself will tell
            for piece in torch.empty(size, dtype=torch.uint8).split(PIECE):
                if self._enough.is_set():
                    return
                piece[:: mmap.PAGESIZE].fill_(0)
