"""Steps that all ranks take together, where a model's own passes communicate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from gramian.errors import InputError
from gramian.placement.ranks import Group, carrier, is_distributed, raise_together

__all__ = ["in_step"]

Batch = TypeVar("Batch")


def in_step(batches: Iterable[Batch], group: Group = None) -> Iterator[tuple[Batch, bool]]:
    """Each of this rank's batches with `True`; then, while other ranks have more, its last one again with `False`.

    A model that is sharded gathers its weights in every pass, so that a rank that stops early leaves the others waiting
    for its shards. Here all ranks take the same number of steps, and what is computed from a batch that comes with
    `False` is to be thrown away.

    Raises, on every rank: what the batches of one rank raise; `InputError` where one rank has none, but another has.
    Cost: one sum of twelve bytes a step.

    >>> list(in_step(["a", "b"]))
    [('a', True), ('b', True)]
    """
    if not is_distributed(group):
        yield from ((batch, True) for batch in batches)
        return
    iterator = iter(batches)
    last: list[Batch] = []
    while True:
        error: Exception | None = None
        mine = False
        try:
            last = [next(iterator)]
            mine = True
        except StopIteration:
            pass
        except Exception as caught:
            error = caught
        flags = torch.tensor([mine, not last, error is not None], dtype=torch.int32, device=carrier(None, group))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
        anyone, someone_idle, failed = map(bool, flags.tolist())
        if anyone and someone_idle and not last and error is None:
            error = InputError("this rank has no batches, but others have; give every rank at least one")
        if failed or (anyone and someone_idle):
            raise_together("batches", error, group)
        if not anyone:
            return
        yield last[0], mine
