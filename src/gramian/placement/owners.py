"""Owners: share out the work on many tensors, bring each whole to the rank that works on it, and send the result back.

owners = assign([cost of each tensor], world().size)
for grad in gather(grads, owners):          # whole where this rank is the owner, None elsewhere
    ...
scatter_(parameters, owners, results)       # results: whole on the owner, None elsewhere
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gramian.errors import GramianError, InputError, ShapeError
from gramian.placement.ranks import Group, carrier, raise_together, world
from gramian.placement.shards import Spread, check_writable, is_sharded, local, spread_of

__all__ = ["assign", "gather", "scatter_"]

BUCKET_BYTES = 256 << 20  # of whole tensors in one exchange; a rank sends its share of that
ALIGNMENT = 16  # bytes: every piece of a message starts where any dtype may


def assign(costs: Iterable[float], num_ranks: int) -> list[int]:
    """The rank that owns each item, so that the largest load is small: longest processing time first.

    Items go, from the most to the least costly, each to the rank with the least load so far. Ties go to the earlier
    item and the lower rank, so every rank that is given the same costs finds the same owners.

    Args:
        costs: of each item, in any unit, finite and not negative.
        num_ranks: m ≥ 1.

    Raises `InputError` for another cost or number of ranks. Cost: O(n log n).
    Accuracy: the largest load is at most 4/3 − 1/(3m) times the least possible.
    Source: Graham, Bounds on Multiprocessing Timing Anomalies (1969), theorem 2.

    >>> assign([1, 5, 4, 3], 2)
    [0, 0, 1, 1]
    """
    costs = [float(cost) for cost in costs]
    if num_ranks < 1:
        raise InputError(f"assign: expected at least one rank, got {num_ranks}")
    for i, cost in enumerate(costs):
        if not 0 <= cost < math.inf:
            raise InputError(f"assign: costs must be finite and not negative, but item {i} has {cost}")
    loads = [(0.0, rank) for rank in range(num_ranks)]
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):  # a stable sort: ties stay in order
        load, owners[i] = loads[0]
        heapq.heapreplace(loads, (load + costs[i], owners[i]))
    return owners


def gather(
    tensors: Sequence[Tensor],
    owners: Sequence[int],
    *,
    group: Group = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> list[Tensor | None]:
    """Each tensor whole on its owner, and `None` on the other ranks. Collective.

    A sharded tensor's parts are sent to its owner only, many tensors in one exchange, byte for byte; a `Partial` one is
    summed there, in the order of the ranks. A plain tensor or a replica, which every rank holds, is passed through on
    its owner and shares its memory.

    Args:
        tensors: parameters or gradients, the same list on all ranks: plain, or of class `DTensor` on any mesh.
        owners: for each, a rank of `group_of(tensor)`, or of `group` for a plain tensor: as from `assign`.
        group: of the plain tensors' ranks; all by default.
        bucket_bytes: of whole tensors in one exchange.

    Raises: `InputError` for an owner that there is not; `UnsupportedError` for a placement that cannot be gathered;
    `ShapeError`, on every rank, where a rank's part is not what its placement says.
    Cost: one all-to-all a bucket, in which a rank sends each shard once: 1/ranks of an all-gather to everybody.

    >>> gather([torch.ones(2)], [0])
    [tensor([1., 1.])]
    """
    jobs = _jobs("gather", tensors, owners, group)
    for job in jobs:
        if tuple(job.part.shape) != job.spread.local_shape(job.me):
            job.error = ShapeError(
                f"of tensor {job.index}, {job.spread.shape}, this rank holds {tuple(job.part.shape)}, but its "
                f"placement says {job.spread.local_shape(job.me)}. Use distribute_tensor, or give from_local its shape"
            )
    wholes: list[Tensor | None] = [None] * len(tensors)
    for bucket in _buckets(jobs, bucket_bytes):
        me = bucket[0].me
        sent = [
            [job.piece(me, job.part) for job in bucket if job.owner == r and job.serves(me)] for r in bucket[0].ranks
        ]
        wanted = [[job for job in bucket if job.owner == me and job.serves(r)] for r in bucket[0].ranks]
        expected = [[job.piece(r) for job in jobs_of_r] for r, jobs_of_r in enumerate(wanted)]
        parts: dict[int, list[tuple[int, Tensor]]] = {job.index: [] for job in bucket}
        for r, received in enumerate(_exchange("gather", sent, expected, bucket[0])):
            for job, part in zip(wanted[r], received, strict=True):
                parts[job.index].append((r, part))
        for job in bucket:
            if job.owner == me:
                wholes[job.index] = _assembled(job, parts[job.index])
    return wholes


def scatter_(
    targets: Sequence[Tensor],
    owners: Sequence[int],
    values: Sequence[Tensor | None],
    *,
    group: Group = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> None:
    """Writes each owner's whole tensor into the target, of which every rank gets its part. Collective.

    The inverse of `gather`, and bitwise: `scatter_(t, owners, gather(t, owners))` changes nothing. A plain target is
    copied whole to every rank.

    Args:
        targets: the same list on all ranks: plain tensors, or of class `DTensor` on any mesh. Written in place.
        owners: for each, the rank whose value counts.
        values: whole tensors of the targets' shapes, cast to their dtypes; what other ranks than the owner pass is not
            looked at, and may be `None`.
        group, bucket_bytes: as for `gather`.

    Raises: `InputError` for an owner that there is not; `UnsupportedError` for a partial target; `InputError` or
    `ShapeError`, on every rank and before a target of that group is written, where an owner has no value or one of
    another shape.
    Cost: one all-to-all a bucket, in which each rank receives its part once.

    >>> target = torch.zeros(2)
    >>> scatter_([target], [0], [torch.ones(2)])
    >>> target
    tensor([1., 1.])
    """
    jobs = _jobs("scatter_", targets, owners, group)
    if len(values) != len(jobs):
        raise InputError(
            f"scatter_: {len(jobs)} targets but {len(values)} values; pass one for each, None if not owned"
        )
    for job in jobs:
        check_writable("scatter_", job.spread)
        if job.owner == job.me:
            job.error = _unfit(job, values[job.index])
    for bucket in _buckets(jobs, bucket_bytes):
        me, mine = bucket[0].me, [job for job in bucket if job.owner == bucket[0].me]
        sent = [[job.piece(r, _part_for(r, job, values[job.index])) for job in mine] for r in bucket[0].ranks]
        wanted = [[job for job in bucket if job.owner == r] for r in bucket[0].ranks]
        expected = [[job.piece(me) for job in jobs_of_r] for jobs_of_r in wanted]
        for jobs_of_r, received in zip(wanted, _exchange("scatter_", sent, expected, bucket[0]), strict=True):
            for job, part in zip(jobs_of_r, received, strict=True):
                job.part.copy_(part)


class _Piece(NamedTuple):
    """A tensor in a message: its shape and dtype, which both sides know, and where it is sent from, its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    data: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def room(self) -> int:
        """The bytes up to the next piece."""
        return -(-self.num_bytes // ALIGNMENT) * ALIGNMENT


@dataclass
class _Job:
    """One tensor of a gather or scatter, as this rank sees it."""

    index: int
    owner: int
    spread: Spread
    part: Tensor  # what this rank holds, sharing its memory
    me: int
    error: GramianError | None = None
    group_error: GramianError | None = None  # the first of all tensors of the group

    @property
    def ranks(self) -> range:
        return range(len(self.spread.places))

    def serves(self, rank: int) -> bool:
        return self.spread.serves(rank, self.owner)

    def piece(self, rank: int, data: Tensor | None = None) -> _Piece:
        return _Piece(self.spread.local_shape(rank), self.part.dtype, data)


def _jobs(what: str, tensors: Sequence[Tensor], owners: Sequence[int], group: Group) -> list[_Job]:
    if len(tensors) != len(owners):
        raise InputError(f"{what}: {len(tensors)} tensors but {len(owners)} owners; see gramian.placement.assign")
    jobs = []
    for i, (tensor, owner) in enumerate(zip(tensors, owners, strict=True)):
        spread = spread_of(tensor, group)
        if not 0 <= owner < len(spread.places):
            raise InputError(
                f"{what}: tensor {i} has owner {owner}, but its group has {len(spread.places)} ranks, from 0"
            )
        jobs.append(_Job(i, owner, spread, local(tensor), world(spread.group).rank))
    return jobs


def _buckets(jobs: list[_Job], bucket_bytes: int) -> Iterator[list[_Job]]:
    """Runs of jobs of one group and device, of at most so many bytes or one tensor; the same on all ranks."""
    kinds: dict[tuple[int, str], list[_Job]] = {}
    for job in jobs:
        kinds.setdefault((id(job.spread.group), job.part.device.type), []).append(job)
    for same in kinds.values():
        error = next((job.error for job in same if job.error is not None), None)
        bucket: list[_Job] = []
        size = 0
        for job in same:
            job.group_error = error
            num_bytes = math.prod(job.spread.shape) * job.part.dtype.itemsize
            if bucket and size + num_bytes > bucket_bytes:
                yield bucket
                bucket, size = [], 0
            bucket.append(job)
            size += num_bytes
        yield bucket


def _exchange(what: str, sent: list[list[_Piece]], expected: list[list[_Piece]], job: _Job) -> list[list[Tensor]]:
    """Sends to every rank its pieces, and returns those that every rank sent here, by rank.

    All dtypes travel as bytes in one all-to-all. Each message begins with a flag: whether its sender has failed. It
    costs nothing and spares everybody the wait for a rank that has raised.
    """
    me, error, group = job.me, job.group_error, job.spread.group
    if len(sent) == 1 and error is not None:
        raise type(error)(f"{what}: {error}")
    own = [piece.data.to(piece.dtype) for piece in sent[me] if piece.data is not None]
    if len(sent) == 1:
        return [own]
    flag = _Piece((1,), torch.uint8)
    outgoing = [[flag, *sent[r]] if r != me else [] for r in job.ranks]
    incoming = [[flag, *expected[r]] if r != me else [] for r in job.ranks]
    out_sizes, in_sizes = ([sum(p.room for p in pieces) for pieces in sides] for sides in (outgoing, incoming))
    device = carrier(job.part.device, group)
    out, into = (torch.empty(sum(sizes), dtype=torch.uint8, device=device) for sizes in (out_sizes, in_sizes))
    for views, pieces in zip(_views(out, outgoing), outgoing, strict=True):
        for view, piece in zip(views, pieces, strict=True):
            if piece is flag:
                view.fill_(error is not None)
            elif error is None and piece.data is not None:
                view.copy_(piece.data)
    dist.all_to_all_single(into, out, in_sizes, out_sizes, group=group)
    received = _views(into, incoming)
    flags = torch.cat([views[0] for r, views in enumerate(received) if r != me])
    if error is not None or flags.any():
        raise_together(what, error, group)
    return [views[1:] if r != me else own for r, views in enumerate(received)]


def _views(buffer: Tensor, messages: list[list[_Piece]]) -> list[list[Tensor]]:
    """The pieces of each message as tensors in the buffer's memory."""
    start, views = 0, []
    for pieces in messages:
        views.append([])
        for piece in pieces:
            flat = buffer[start : start + piece.num_bytes]
            views[-1].append(flat.view(piece.dtype).view(piece.shape))
            start += piece.room
    return views


def _assembled(job: _Job, parts: list[tuple[int, Tensor]]) -> Tensor:
    """The whole tensor from the parts of the ranks that serve its owner."""
    spread = job.spread
    if len(parts) == 1 and not spread.is_partial and tuple(job.part.shape) == spread.shape:
        return job.part  # a plain tensor, or a replica
    whole = job.part.new_zeros(spread.shape) if spread.is_partial else job.part.new_empty(spread.shape)
    for rank, part in parts:
        for region in spread.regions(rank):
            if spread.is_partial:
                whole[region.whole] += part[region.local].to(whole.device)
            else:
                whole[region.whole] = part[region.local].to(whole.device)
    return whole.div_(spread.divisor) if spread.divisor > 1 else whole


def _part_for(rank: int, job: _Job, value: Tensor | None) -> Tensor | None:
    """What a rank gets of an owner's value."""
    if job.group_error is not None or value is None:
        return None
    regions = list(job.spread.regions(rank))
    if len(regions) == 1:
        return value[regions[0].whole]
    part = value.new_empty(job.spread.local_shape(rank))
    for region in regions:
        part[region.local] = value[region.whole]
    return part


def _unfit(job: _Job, value: Tensor | None) -> GramianError | None:
    """Why an owner's value cannot be written, if so."""
    if value is None:
        return InputError(f"tensor {job.index}, {job.spread.shape}, has no value on its owner, rank {job.me}")
    if is_sharded(value):
        return InputError(f"the value of tensor {job.index} is sharded itself; pass it whole, as gather gives it")
    if tuple(value.shape) != job.spread.shape:
        return ShapeError(f"tensor {job.index} is {job.spread.shape}, but its value is {tuple(value.shape)}")
    return None
