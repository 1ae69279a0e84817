"""Owners: divide the work on many tensors among ranks, gather each tensor on its owner, and scatter the results.

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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gramian.errors import GramianError, InputError, ShapeError
from gramian.placement.ranks import Group, buckets, carrier, raise_together, world
from gramian.placement.shards import Spread, check_writable, is_sharded, local, spread_of

__all__ = ["assign", "gather", "scatter_", "share_out"]

BUCKET_BYTES = 256 << 20  # whole tensors in one exchange; a rank sends its share of that
ALIGNMENT = 16  # bytes: every piece of a message starts where any dtype may


def assign(costs: Iterable[float], num_ranks: int) -> list[int]:
    """The rank that owns each item, so that the largest load is small: longest processing time first.

    From the most to the least costly, each item goes to the rank with the least load so far. Ties go to the earlier
    item and the lower rank, so all ranks that pass the same costs get the same owners.

    Args:
        costs: of each item, in any unit, finite and not negative.
        num_ranks: m, at least 1.

    Returns: a rank for each item.
    Raises:
        InputError: a cost is negative or not finite, or there are no ranks.
    Cost: O(n log n). Accuracy: the largest load is at most 4/3 − 1/(3m) times the least possible.
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


def share_out(costs: Iterable[float], group: Group = None) -> list[int]:
    """The indices of the items that this rank owns: its share by cost, or all of them with one rank.

    The owners are those of `assign`. Nothing is sent.

    Args:
        costs: of each item, the same list on all ranks.
        group: a process group; all ranks by default.

    Returns: indices, ascending.
    Raises:
        InputError: a cost is negative or not finite, or this rank is not in the group.
    Cost: O(n log n). Accuracy: as `assign`.
    Source: as `assign`.

    >>> share_out([3.0, 1.0, 2.0])
    [0, 1, 2]
    """
    rank, size = world(group)
    return [i for i, owner in enumerate(assign(costs, size)) if owner == rank]


def gather(
    tensors: Sequence[Tensor],
    owners: Sequence[int],
    *,
    group: Group = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> list[Tensor | None]:
    """Each tensor whole on its owner, and `None` on the other ranks.

    Collective.

    A sharded tensor's parts are sent to its owner only, many tensors in one exchange, byte for byte. A `Partial` one is
    summed there, in the order of the ranks. A plain tensor or a replica, which every rank holds, is returned on its
    owner without a copy.

    Args:
        tensors: parameters or gradients, the same list on all ranks: plain, or of class `DTensor` on any mesh.
        owners: for each tensor a rank of `group_of(tensor)`, or of `group` for a plain tensor; see `assign`.
        group: the process group of the plain tensors; all ranks by default.
        bucket_bytes: of whole tensors in one exchange.

    Returns: one entry for each tensor.
    Raises:
        InputError: an owner is not a rank of the group.
        UnsupportedError: a placement cannot be gathered.
        ShapeError: on every rank, where a rank's part has another shape than its placement says.
    Cost: one all-to-all for each bucket, in which a rank sends each shard once: 1/ranks of an all-gather.
    Source: this library's own.

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
    """Writes each owner's whole tensor into the target, of which every rank gets its part.

    Collective.

    The inverse of `gather`, and bitwise: `scatter_(t, owners, gather(t, owners))` changes nothing. A plain target is
    copied whole to every rank.

    Args:
        targets: the same list on all ranks: plain tensors, or of class `DTensor` on any mesh. Written in place.
        owners: for each target, the rank whose value is written.
        values: whole tensors of the targets' shapes, cast to their dtypes; ignored on ranks that are not the owner,
            where they may be `None`.
        group: the process group of the plain targets; all ranks by default.
        bucket_bytes: of whole tensors in one exchange.

    Raises:
        InputError: an owner is not a rank of the group; or, on every rank and before any target of the group is
            written, an owner has no value.
        ShapeError: likewise, where a value has another shape than its target.
        UnsupportedError: a target is a `Partial` tensor.
    Cost: one all-to-all for each bucket, in which a rank receives each of its parts once.
    Source: this library's own.

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
    """A tensor in a message: its shape and dtype, which both ranks know, and the data on the rank that sends it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    data: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def room(self) -> int:
        """The bytes from its start to that of the next piece."""
        return -(-self.num_bytes // ALIGNMENT) * ALIGNMENT


@dataclass
class _Job:
    """One tensor of a gather or scatter, as this rank sees it."""

    index: int
    owner: int
    spread: Spread
    part: Tensor  # this rank's part, sharing its memory
    me: int
    error: GramianError | None = None
    group_error: GramianError | None = None  # the first error among the group's tensors

    @property
    def ranks(self) -> range:
        return range(len(self.spread.places))

    def serves(self, rank: int) -> bool:
        return self.spread.serves(rank, self.owner)

    def piece(self, rank: int, data: Tensor | None = None) -> _Piece:
        return _Piece(self.spread.local_shape(rank), self.part.dtype, data)


def _jobs(what: str, tensors: Sequence[Tensor], owners: Sequence[int], group: Group) -> list[_Job]:
    if len(tensors) != len(owners):
        raise InputError(
            f"{what}: {len(tensors)} tensors but {len(owners)} owners; pass one for each, see gramian.placement.assign"
        )
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
    """Jobs of one group and device, at most so many bytes at once, each with the first error of its group."""
    errors: dict[Any, GramianError | None] = {}
    for job in jobs:
        errors[_kind(job)] = errors.get(_kind(job)) or job.error
    for job in jobs:
        job.group_error = errors[_kind(job)]
    return buckets(jobs, _kind, _num_bytes, bucket_bytes)


def _kind(job: _Job) -> tuple[int, str]:
    """What jobs share that go into one exchange."""
    return id(job.spread.group), job.part.device.type


def _num_bytes(job: _Job) -> int:
    return math.prod(job.spread.shape) * job.part.dtype.itemsize


def _exchange(what: str, sent: list[list[_Piece]], expected: list[list[_Piece]], job: _Job) -> list[list[Tensor]]:
    """Sends each rank its pieces, and returns those that each rank sent here, by rank.

    All dtypes travel as bytes in one all-to-all. Each message begins with a flag that says whether its sender has
    failed: it costs no collective of its own, and no rank waits for one that has raised.
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
    """The whole tensor from the parts that its owner has received."""
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
    """A rank's part of an owner's value."""
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
    """The error where an owner's value cannot be written."""
    if value is None:
        return InputError(f"tensor {job.index}, {job.spread.shape}, has no value on its owner, rank {job.me}")
    if is_sharded(value):
        return InputError(f"the value of tensor {job.index} is sharded itself; pass it whole, as gather gives it")
    if tuple(value.shape) != job.spread.shape:
        return ShapeError(f"tensor {job.index} is {job.spread.shape}, but its value is {tuple(value.shape)}")
    return None
