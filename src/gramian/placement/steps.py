"""The same number of steps on all ranks, for models whose forward and backward passes are collective."""

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
    """This rank's batches with `True`, then its last one again with `False` while other ranks have more.

    Collective.

    A sharded model (FSDP2) gathers its weights in every forward and backward pass, and a rank that stopped early would
    leave the others waiting for its shards. Here all ranks take the same number of steps. A step with `False` is a
    dummy pass that keeps the collectives matched: throw away what it computes.

    Args:
        batches: this rank's, as many as it has.
        group: a process group; all ranks by default.

    Returns: an iterator of `(batch, counts)`.
    Raises:
        InputError: on every rank, where one rank has no batch at all, but another has.
        GramianError: on every rank, what the iterable of one rank raises; with one rank, its own error.
    Cost: one all-reduce of twelve bytes a step.
    Source: this library's own.

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
