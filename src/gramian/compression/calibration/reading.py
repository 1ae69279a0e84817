"""Batches as they come: most for the statistics, some kept apart to measure on, and how many samples are distinct."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from gramian import placement
from gramian.batch import main_input, mapped, num_samples, tensors
from gramian.compression.calibration.exchanging import exchanged
from gramian.errors import InputError
from gramian.loader import Batches, as_batches, no_batches
from gramian.recording.collective import Collective

__all__ = ["MOST_FOLDED", "MOST_SEEN", "Reader", "cuttable", "hashes"]

HELD_OUT = 8
"""One batch of so many, or of few batches one sample of so many, is left out of the statistics, to measure on."""
MOST_HELD, ENOUGH_HELD = 8, 160
"""Batches kept in memory to measure on, and from how many samples on no more are."""
MOST_SEEN, MOST_FOLDED, SEEN_BYTES = 24, 120, 2**26
"""Other batches kept for their labels, which the statistics do not see; so many where gradients of folds are compared,
whose noise is larger; and how many bytes they may take."""


class Reader:
    """Batches, less those kept to measure on, with the number of distinct samples among those given."""

    def __init__(
        self,
        batches: Batches,
        ranks: Collective | None = None,
        verb: str = "compress",
        held_out: Batches | None = None,
        labels: int = 0,
    ) -> None:
        self.batches, self.ranks = as_batches(batches, verb), ranks
        together = ranks if ranks is not None and ranks.together else None
        self.rank, self.size = placement.world(together.group) if together else (0, 1)
        self.hashes: set[int] = set()
        self.num = 0
        self.held: list[tuple[int, Any]] = []
        self.apart = held_out is not None
        self.labels = 0 if self.apart else labels
        self.seen: list[tuple[int, Any]] = []
        if held_out is not None:
            self.held = [(i * self.size + self.rank, batch) for i, batch in enumerate(as_batches(held_out, verb))]
            if not self.held and together is None:
                raise no_batches(held_out, verb)
        try:
            num = len(self.batches)  # type: ignore[arg-type]
        except TypeError:
            num = -1
        nums = placement.exchange_json(num, together.group) if together else [num]
        self.total = sum(nums) if min(nums) >= 0 else 0  # batches of all ranks, where that is known
        self.few = min(nums) >= 0 and sum(nums) < HELD_OUT

    def __iter__(self) -> Iterator[Any]:
        for i, batch in enumerate(self.batches):
            given, place = batch, i * self.size + self.rank  # among the batches of all ranks
            if self.few and not self.apart:
                given, held = _parted(batch)
                self.held += [] if held is None else [(place, held)]
            elif not self.apart and place % HELD_OUT == HELD_OUT - 1 and _wanted(batch, place // HELD_OUT):
                self.held.append((place, batch))
                continue
            self._count(given)
            if self.labels:
                self.seen = _kept([*self.seen, (place, given)], self.labels)
            yield given

    def shared(self, first: Any) -> tuple[list[tuple[int, Any]], float, float]:
        """What all ranks keep, with places that are negative where that is the first batch; the share of samples that
        are not the same as an earlier one of their rank; and how many these are.
        """
        mine = (self.held, first, len(self.hashes), self.num)
        ranks = self.ranks
        found = exchanged(mine, ranks.group) if ranks is not None and ranks.together else [mine]
        held = sorted((pair for one in found for pair in one[0]), key=lambda pair: pair[0])
        held = held or [(-1, one) for _, one, _, _ in found if one is not None][:1]
        distinct, num = sum(one[2] for one in found), sum(one[3] for one in found)
        return held, distinct / num if num else 1.0, float(distinct)

    def others(self) -> list[Any]:
        """Batches that were given, the same for all ranks, drawn from all of them; none if no labels were asked for."""
        ranks = self.ranks
        together = self.labels and ranks is not None and ranks.together
        found = exchanged(self.seen, ranks.group) if together else [self.seen]  # type: ignore[union-attr]
        return [batch for _, batch in _kept([pair for one in found for pair in one], self.labels)]

    def _count(self, batch: Any) -> None:
        found = hashes(batch, self.num)
        self.hashes.update(found)
        self.num += len(found)


def hashes(batch: Any, place: int) -> list[int]:
    """A number for each sample of a batch, the same for samples of which all tensors are equal.

    Args:
        batch: any batch.
        place: how many samples came before: those that cannot be compared have numbers of their own.
    """
    try:
        num = len(main_input(batch))
        columns = [_bytes_of_rows(t) for t in tensors(batch) if t.ndim and len(t) == num]
        return [hash(row) for row in zip(*columns, strict=True)] if columns else [hash((place, i)) for i in range(num)]
    except (InputError, TypeError, RuntimeError, ValueError):  # a graph, or another object: each is taken as new
        return [hash((place, i)) for i in range(num_samples(batch))]


def _bytes_of_rows(t: Tensor) -> list[bytes]:
    rows = t.detach().double() if t.is_floating_point() else t.detach()
    return [row.tobytes() for row in rows.cpu().reshape(len(rows), -1).numpy()]


def _parted(batch: Any) -> tuple[Any, Any | None]:
    """A batch without its last samples, and these; whole, and `None`, where it has few or cannot be cut."""
    num = cuttable(batch)
    cut = num // HELD_OUT
    if not cut:
        return batch, None
    return mapped(batch, lambda t: t[:-cut]), mapped(batch, lambda t: t[-cut:])


def _kept(pairs: list[tuple[int, Any]], most: int) -> list[tuple[int, Any]]:
    """As many as may be kept for their labels, in an order that is drawn once."""
    found, size = [], 0
    for place, batch in sorted(pairs, key=lambda pair: pair[0] * 2654435761 % 2**32)[:most]:
        size += sum(t.numel() * t.element_size() for t in tensors(batch))
        if size > SEEN_BYTES:
            break
        found.append((place, batch))
    return found


def _wanted(batch: Any, num: int) -> bool:
    """Whether a batch is kept to measure on after `num` of its size, by every rank alike."""
    return num < MOST_HELD and num * cuttable(batch) < ENOUGH_HELD


def cuttable(batch: Any) -> int:
    """The number of samples of a batch whose tensors can all be cut along the first dimension; 0 of any other.

    Args:
        batch: any batch.
    """
    try:
        num = num_samples(batch)
    except InputError:
        return 0
    return num if {t.shape[0] if t.ndim else 0 for t in tensors(batch)} == {num} else 0
