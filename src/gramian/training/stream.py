"""The batches of a task, epoch after epoch, and how to come back to a place among them."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gramian.errors import GramianWarning, TaskError
from gramian.training.task import Task

__all__ = ["Stream"]

END = object()


class Stream:
    """Batches without end. `epoch` and `taken`, the batches taken of it, say where it stands.

    A place is kept as the states of the generators at the beginning of its epoch: to come back to it, the epoch is
    begun again and as many batches are taken and dropped. That is exact where the batches of an epoch follow from its
    number and the generator, and also where they are shuffled by the global generator when the epoch begins, as a
    `DataLoader` without a generator does. Where the last batch is another one then, a `GramianWarning` says so.

    Args:
        task: whose batches.
        generator: that shuffles.
        counted: whether the first epoch is drawn at once, to know its length.
    """

    def __init__(self, task: Task, generator: torch.Generator, *, counted: bool) -> None:
        self.task, self.generator, self.counted = task, generator, counted
        self.epoch = self.taken = self.length = 0
        self._began = self._now()
        self._batches: Iterator[Any] | None = None
        self._last: Any = None

    def take(self) -> Any:
        """The next batch."""
        if self._batches is None:
            self._batches = self._begin()
        while (batch := next(self._batches, END)) is END:
            if not self.taken:
                raise TaskError(f"task {self.task.name!r}: train_batches({self.epoch}, generator) gave no batches")
            self.epoch, self.taken = self.epoch + 1, 0
            self._batches = self._begin()
        self.taken += 1
        self._last = batch
        return batch

    def state(self) -> dict[str, Any]:
        """Where the stream stands, for `restore`."""
        generator, shared = self._began
        return {
            "epoch": self.epoch,
            "taken": self.taken,
            "length": self.length,
            "generator": generator,
            "global": shared,
            "last": checksum(self._last),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Comes back to where `state` was taken. The global generator is left as it was."""
        self.epoch, self.taken, self.length = state["epoch"], state["taken"], state["length"]
        now = torch.get_rng_state()
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["global"])
        self._batches = self._begin()
        for number in range(self.taken):
            if (batch := next(self._batches, END)) is END:
                raise TaskError(
                    f"task {self.task.name!r}: train_batches({self.epoch}, generator) gave {number} batches, of which "
                    f"{self.taken} were taken before. Resume with the data that the run began with"
                )
            self._last = batch
        torch.set_rng_state(now)
        if checksum(self._last) != state["last"]:
            warnings.warn(
                f"task {self.task.name!r}: train_batches({self.epoch}, generator) gave other batches than before: the "
                "run goes on, but not as it would have. Draw all that is random in them from the generator",
                GramianWarning,
                stacklevel=4,
            )

    def _begin(self) -> Iterator[Any]:
        self._began = self._now()
        batches = self.task.train_batches(self.epoch, self.generator)
        if self.counted and self.epoch == 0:
            batches = list(batches)
            self.length = len(batches)
        return iter(batches)

    def _now(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.generator.get_state(), torch.get_rng_state()


def checksum(batch: Any) -> int:
    """A number that differs, most likely, for batches of other tensors."""
    if isinstance(batch, Tensor):
        return zlib.crc32(batch.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return zlib.crc32(repr([checksum(part) for part in parts]).encode())
