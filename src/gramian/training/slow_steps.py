"""Telling of what goes on for long without a step that ends."""

from __future__ import annotations

import time
import warnings

from gramian import placement
from gramian.errors import GramianWarning

__all__ = ["Slow"]

# Seconds before the first word; after each, the silence is twice as long.
SILENCE = 10.0


class Slow:
    """Warns, on the first rank, of what takes 10 seconds, 20, 40 and so on; `tell` is cheap enough for every batch.

    Args:
        before, after: what stands around the number that says how far it has come.

    >>> Slow("gave", "batches so far").tell(3)  # not yet
    """

    def __init__(self, before: str, after: str) -> None:
        self.before, self.after, self._silence = before, after, SILENCE
        self._next = time.monotonic() + SILENCE

    def tell(self, number: int) -> None:
        """Warn, if it is time."""
        if time.monotonic() < self._next:
            return
        self._silence *= 2
        self._next += self._silence
        if placement.world().rank == 0:
            warnings.warn(f"{self.before} {number:,} {self.after}", GramianWarning, stacklevel=2)
