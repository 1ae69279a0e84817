"""The loss of a model in shards, and how many samples of a batch go through it at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from gramian.batch import mapped
from gramian.compression.calibration.reading import cuttable
from gramian.compression.calibration.targets import Target
from gramian.compression.sharded.holding import Holding, as_bytes, fitting, holding, resident
from gramian.compression.sharded.passing import Item
from gramian.compression.sharded.shards import Shards
from gramian.compression.sharded.spool import Spool
from gramian.compression.sharded.sweeping import Sweep
from gramian.loader import Batches, as_batches
from gramian.objective import Objective
from gramian.samples import first_samples

__all__ = ["cut", "loss_of", "measured"]

GRAPHS = 3
"""What a pass keeps, with attention written out and its rows in float32, over what the block alone keeps."""


def loss_of(
    folder: str | os.PathLike[str],
    batches: Batches,
    objective: Objective,
    *,
    memory: int | float | str | None = None,
    scratch: str | os.PathLike[str] | None = None,
) -> float:
    """The mean loss of a model in a folder, dense or factored, of which one part at a time is in memory.

    Args:
        folder, memory, scratch: as in `compress_shards`.
        batches: to evaluate.
        objective: whose loss it is.

    Raises: as `compress_shards`.
    Cost: each part is loaded once, and what is outside of the blocks twice; a forward pass.
    """
    shards, given = Shards(folder), list(as_batches(batches, "compress"))
    sweep = Sweep(shards, Spool(scratch), objective)
    _, _, most = measured(sweep, [], given, None if memory is None else as_bytes(memory))
    items = [Item(f"{i}", batch) for i, batch in enumerate(chain.from_iterable(cut(b, most) for b in given))]
    for _ in sweep.forward(items, keep=False):
        pass
    sweep.outputs(items, None)
    return sum(item.loss for item in items) / sum(item.units for item in items)


def measured(
    sweep: Sweep, found: Sequence[Target], given: Sequence[Any], limit: int | None
) -> tuple[list[Holding], int, int]:
    """What each part holds, what the process has before, and how many samples fit at once.

    Args:
        sweep: of the model.
        found: the layers that are factored.
        given: the batches.
        limit: bytes that the process may have; `None` for as much as it takes.
    """
    largest = max(map(cuttable, given))
    graph, hidden = sweep.probe(first_samples(given[0], 1) if largest else given[0])
    width = hidden.numel() * hidden.element_size()
    parts = holding(sweep.shards, found, GRAPHS * graph, hidden.shape[:-1].numel(), width)
    base = resident()
    return parts, base, fitting(parts, base, limit, max(1, largest))


def cut(batch: Any, most: int) -> Iterator[Any]:
    """A batch in parts of at most so many samples."""
    num = cuttable(batch)
    if num <= most:
        yield batch
        return
    for begin in range(0, num, most):
        yield mapped(batch, lambda t, at=slice(begin, begin + most): t[at])
