"""The batches of a diagnosis, each put back after a pass that may have written into it."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from gramian.batch import mapped
from gramian.recording.kept_state import Kept

__all__ = ["KeptBatches"]


class KeptBatches:
    """Batches, each of which is put back before a pass on it or on parts of it that follows another such pass.

    What a pass may have written into is told by the memory of the tensors that it was given; where it was given
    anything else, that is all batches.

    Args:
        batches: as `Kept` takes them.

    Cost: a copy of all tensors; then a pass over the tensors of a batch for each pass.

    >>> batch = torch.ones(2, 2)
    >>> kept = KeptBatches([batch])
    >>> kept.begin(batch[:1])
    >>> _ = batch.zero_()
    >>> kept.begin(torch.ones(3))
    >>> batch.sum()
    tensor(4.)
    """

    def __init__(self, batches: Sequence[Any]) -> None:
        self._kept = [(_spans(batch), Kept(batch)) for batch in batches]
        self._given: list[tuple[int, int]] | None = []

    def begin(self, batch: Any) -> None:
        """A pass on this begins: what the last one may have written into is as it was."""
        self._put_back(self._given)
        self._given = _spans(batch)

    def put_back(self) -> None:
        """Everything as it was."""
        self._put_back(None)

    def _put_back(self, given: list[tuple[int, int]] | None) -> None:
        for spans, kept in self._kept:
            if given is None or spans is None or any(a < d and c < b for a, b in spans for c, d in given):
                kept.put_back()


def _spans(batch: Any) -> list[tuple[int, int]] | None:
    """Where the memory of each tensor of a batch begins and ends; `None` where it holds anything else with values."""
    found: list[tuple[int, int]] | None = []

    def add(t: Tensor) -> None:
        nonlocal found
        if found is None or t.layout is not torch.strided or t.is_nested or t.is_meta or type(t) is not Tensor:
            found = None
        elif t.numel():
            last = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
            found.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))

    def other(value: Any) -> None:
        nonlocal found
        found = found if isinstance(value, (int, float, str, bytes, NoneType)) else None

    mapped(batch, add, other)
    return found
