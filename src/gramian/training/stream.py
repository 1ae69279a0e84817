"""The batches of a task over all epochs, with a position that can be saved and restored."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from gramian.batch import fields
from gramian.errors import GramianWarning, TaskError
from gramian.training.randomness import Own, as_plain, restore_python, state_of_python
from gramian.training.slow_steps import Slow
from gramian.training.task import Task, calling, named

__all__ = ["Stream"]

END = object()

# Iterators that run no code of others, and so draw nothing.
PLAIN = (type(iter([])), type(iter(())))

# Of a first epoch that is counted, since it is kept in memory.
MOST_BATCHES = 10**7


class Stream:
    """An endless stream of batches; its position is the epoch and the number of batches taken from it.

    A saved position has the states of the generators at the beginning of the epoch. To restore it, the epoch is started
    again, and the batches that were taken are drawn and dropped. That is exact where the batches of an epoch depend
    only on its number, the generator, and the global generators of torch, Python and numpy; torch's has a state of its
    own here, and the model should draw from no other. If the last batch differs from the saved one, a `GramianWarning`
    says so.

    Args:
        task: where the batches come from.
        generator: for shuffling.
        counted: whether to draw the first epoch at once, to know its length.
    """

    def __init__(self, task: Task, generator: torch.Generator, *, counted: bool) -> None:
        self.task, self.generator, self.counted = task, generator, counted
        # On all ranks the same: of the seed.
        self._own = Own(torch.Generator().manual_seed(generator.initial_seed()).get_state())
        self.epoch = self.taken = self.length = 0
        self._began = self._now()
        self._batches: Iterator[Any] | None = None
        self._last: Any = None
        self._given: Any = None

    def count(self) -> int:
        """Draw the first epoch, and return the number of its batches."""
        if self._batches is None:
            self._batches = self._begin()
        return self.length

    def take(self) -> Any:
        """Return the next batch."""
        if self._batches is None:
            self._batches = self._begin()
        while (batch := self._next()) is END:
            if not self.taken:
                raise TaskError(f"{named(self.task)}: train_batches({self.epoch}, generator) gave no batches")
            self.epoch, self.taken = self.epoch + 1, 0
            self._batches = self._begin()
        self.taken += 1
        self._last = batch
        return batch

    def state(self) -> dict[str, Any]:
        """Return the position, for `restore`."""
        generator, shared, python = self._began
        return {
            "epoch": self.epoch,
            "taken": self.taken,
            "length": self.length,
            "generator": generator,
            "global": shared,
            "python": as_plain(python),
            "last": checksum(self._last),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a saved position. Python's and numpy's generators are then where the batches left them."""
        self.epoch, self.taken, self.length = state["epoch"], state["taken"], state["length"]
        self.generator.set_state(state["generator"])
        self._own.state = state["global"]
        restore_python(state["python"])
        self._batches = self._begin()
        for number in range(self.taken):
            if (batch := self._next()) is END:
                raise TaskError(
                    f"{named(self.task)}: train_batches({self.epoch}, generator) gave {number} batches, but "
                    f"{self.taken} were taken before. Resume with the data that the run began with"
                )
            self._last = batch
        if checksum(self._last) != state["last"]:
            warnings.warn(
                f"{named(self.task)}: train_batches({self.epoch}, generator) gave other batches than before: the "
                "run continues, but not exactly. Draw everything random in the batches from the generator",
                GramianWarning,
                stacklevel=5,
            )

    def _begin(self) -> Iterator[Any]:
        self._began = self._now()
        self._drawing = calling(self.task, f"train_batches({self.epoch}, generator)")
        with self._drawing, self._own:
            batches = self.task.train_batches(self.epoch, self.generator)
            if isinstance(batches, Iterator) and batches is self._given:
                raise TaskError(
                    f"{named(self.task)}: train_batches({self.epoch}, generator) returned the iterator of the "
                    "last epoch, which is spent. Make a new one in it, or return a DataLoader or a list"
                )
            self._given = batches
            if self.counted and self.epoch == 0:
                batches = self._all(batches)
                self.length = len(batches)
            return iter(batches)

    def _all(self, batches: Iterable[Any]) -> list[Any]:
        """The batches of the first epoch, which a budget in epochs counts; of one that never ends an error."""
        advice = "and epochs counts them all first. If they never end, give steps or seconds"
        gave = f"{named(self.task)}: train_batches(0, generator) gave"
        slow = Slow(gave, f"batches so far, {advice}")
        found = []
        for batch in batches:
            found.append(batch)
            slow.tell(len(found))
            if len(found) > MOST_BATCHES:
                raise TaskError(f"{gave} more than {MOST_BATCHES:,} batches, {advice}")
        return found

    def _next(self) -> Any:
        assert self._batches is not None
        if type(self._batches) in PLAIN:
            return next(self._batches, END)
        try:
            with self._own:
                return next(self._batches, END)
        except BaseException:
            with self._drawing:
                raise

    def _now(self) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, Any]]:
        return self.generator.get_state(), self._own.state, state_of_python()


def checksum(batch: Any) -> int:
    """Return a checksum of a batch's tensors: of the entries of sparse ones, of the parts of nested ones."""
    if isinstance(batch, Tensor) and batch.is_nested:
        return checksum(batch.unbind())
    if isinstance(batch, Tensor) and batch.is_mkldnn:
        return checksum(batch.to_dense())
    if isinstance(batch, Tensor) and batch.layout is not torch.strided:
        entries = batch.detach().to_sparse().coalesce()
        return checksum([entries.indices(), entries.values()])
    if isinstance(batch, Tensor):
        batch = batch.resolve_conj().resolve_neg()
        return zlib.crc32(batch.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    named = fields(batch)
    parts = named.values() if named is not None else batch if isinstance(batch, (list, tuple)) else ()
    return zlib.crc32(repr([checksum(part) for part in parts]).encode())
