"""Shards: which part of a tensor each rank holds.

A plain tensor is whole on every rank. A `DTensor` is spread over a mesh of ranks. Along each dimension of the mesh it
is cut along one of its own dimensions (`Shard`), the same on all ranks (`Replicate`), or the sum of what the ranks hold
(`Partial`). Shards may be uneven or empty, as `torch.chunk` cuts.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gramian.errors import ShapeError, UnsupportedError
from gramian.placement.ranks import Group, world

__all__ = [
    "Cut",
    "Spread",
    "group_of",
    "is_sharded",
    "local",
    "local_ranges",
    "locals_of",
    "spread_of",
    "whole",
    "write_whole_",
]


class Cut(NamedTuple):
    """How a tensor is spread over one dimension of a mesh.

    A shard is cut along `dim`; with `split` above one, each of that many parts is cut (FSDP over tensor parallelism:
    torch's `_StridedShard`). `op` says how the parts of a partial tensor are combined.
    """

    kind: Literal["shard", "replicate", "partial"]
    dim: int = 0
    split: int = 1
    op: str = "sum"


class Region(NamedTuple):
    """A box of a tensor, as slices of the whole tensor and as slices of the local one."""

    whole: tuple[slice, ...]
    local: tuple[slice, ...]


@dataclass(frozen=True)
class Spread:
    """How a tensor of `shape` is spread over the ranks of `group`: a mesh of `sizes`, each rank at one place in it."""

    shape: tuple[int, ...]
    cuts: tuple[Cut, ...]
    sizes: tuple[int, ...]
    places: tuple[tuple[int, ...], ...]  # by rank of the group
    group: Any

    def ranges(self, rank: int, dim: int) -> tuple[range, ...]:
        """The indices of dimension `dim` that a rank holds, in the order of its local tensor."""
        steps = tuple(
            (cut.split, size, place)
            for cut, size, place in zip(self.cuts, self.sizes, self.places[rank], strict=True)
            if cut.kind == "shard" and cut.dim == dim
        )
        return _ranges(self.shape[dim], steps)

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of a rank's part."""
        return tuple(sum(map(len, self.ranges(rank, dim))) for dim in range(len(self.shape)))

    def regions(self, rank: int) -> Iterator[Region]:
        """The boxes that a rank holds: one, none, or several for a strided shard."""
        by_dim = []
        for dim in range(len(self.shape)):
            ranges = self.ranges(rank, dim)
            starts = itertools.accumulate((len(r) for r in ranges), initial=0)
            by_dim.append(
                [(slice(r.start, r.stop), slice(s, s + len(r))) for r, s in zip(ranges, starts, strict=False)]
            )
        for pairs in itertools.product(*by_dim):
            yield Region(tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))

    def serves(self, rank: int, owner: int) -> bool:
        """Whether the owner receives this rank's part: of replicas, only the one at the owner's own place is sent."""
        pairs = zip(self.cuts, self.places[rank], self.places[owner], strict=True)
        return all(cut.kind != "replicate" or mine == theirs for cut, mine, theirs in pairs)

    @property
    def is_partial(self) -> bool:
        return any(cut.kind == "partial" for cut in self.cuts)

    @property
    def copies(self) -> int:
        """How many ranks hold each part."""
        return math.prod(size for cut, size in zip(self.cuts, self.sizes, strict=True) if cut.kind == "replicate")

    @property
    def divisor(self) -> int:
        """The number that the sum of the parts is divided by: above one where they are averaged."""
        return math.prod(size for cut, size in zip(self.cuts, self.sizes, strict=True) if cut.op == "avg")


@cache
def _ranges(size: int, steps: tuple[tuple[int, int, int], ...]) -> tuple[range, ...]:
    """The indices of `range(size)` that remain after cuts `(split, number of shards, which)`, one after another."""
    index = torch.arange(size)
    for split, num_shards, which in steps:
        index = _chunk(index, num_shards, which) if split == 1 else _strided(index, split, num_shards, which)
    runs: list[range] = []
    for i in index.tolist():
        if runs and runs[-1].stop == i:
            runs[-1] = range(runs[-1].start, i + 1)
        else:
            runs.append(range(i, i + 1))
    return tuple(runs)


def _chunk(index: Tensor, num_shards: int, which: int) -> Tensor:
    chunks = index.chunk(num_shards)  # fewer than asked where indices run out: the last shards are empty
    return chunks[which] if which < len(chunks) else index[:0]


def _strided(index: Tensor, split: int, num_shards: int, which: int) -> Tensor:
    # As the installed torch does it: 2.9 and 2.13 cut rows that cannot be shared out evenly in different ways.
    from torch.distributed.tensor.placement_types import _StridedShard

    cut = _StridedShard(0, split_factor=split)
    return cut._split_tensor(index, num_shards, with_padding=False, contiguous=False)[0][which]


def _is_dtensor(tensor: Tensor) -> bool:
    # An optimizer asks hundreds of times a step. Importing DTensor takes half a second; without it, no tensor is one.
    if type(tensor) is Tensor or type(tensor) is nn.Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank may hold less than the whole tensor: a `DTensor` that is not a replica everywhere.

    Args:
        tensor: plain, or of class `DTensor`.

    Returns: true for a sharded or partial tensor.
    Raises: nothing of its own.
    Cost: nothing is sent.
    Source: this library's own.

    >>> is_sharded(torch.zeros(3))
    False
    """
    return _is_dtensor(tensor) and not all(placement.is_replicate() for placement in _dtensor(tensor).placements)


def local(tensor: Tensor) -> Tensor:
    """The part that this rank holds, without gradient and without a copy; a plain tensor itself.

    Args:
        tensor: plain, or of class `DTensor`.

    Returns: a plain tensor that shares the memory.
    Raises: nothing of its own.
    Cost: nothing is sent.
    Source: this library's own.

    >>> local(torch.ones(2))
    tensor([1., 1.])
    """
    if not _is_dtensor(tensor):
        return tensor.detach() if tensor.requires_grad else tensor
    with torch.no_grad():
        part = _dtensor(tensor).to_local()
    return (part.wait() if hasattr(part, "wait") else part).detach()


def locals_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`local` of each tensor.

    Args:
        tensors: plain, or of class `DTensor`.

    Returns: plain tensors that share the memory, without gradient.
    Raises: nothing of its own.
    Cost: nothing is sent.
    Source: this library's own.

    >>> locals_of([torch.ones(2)])
    [tensor([1., 1.])]
    """
    return [local(tensor) for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank, without gradient; a plain tensor itself.

    Collective over the tensor's mesh.

    Args:
        tensor: plain, or of class `DTensor`.

    Returns: a plain tensor.
    Raises: nothing of its own.
    Cost: one all-gather. Where only one rank needs the tensor, `gather` sends 1/ranks of that.
    Source: this library's own.

    >>> whole(torch.ones(2))
    tensor([1., 1.])
    """
    return _dtensor(tensor).detach().full_tensor() if _is_dtensor(tensor) else tensor.detach()


def write_whole_(target: Tensor, value: Tensor) -> Tensor:
    """Writes this rank's part of a tensor that every rank holds whole into a target.

    Nothing is sent.

    Args:
        target: plain, or of class `DTensor`. Written in place.
        value: plain, of the target's shape, the same on all ranks.

    Returns: the target.
    Raises:
        ShapeError: the shapes differ.
        UnsupportedError: the target is a `Partial` tensor.
    Cost: one copy of this rank's part.
    Source: this library's own.

    >>> write_whole_(torch.zeros(2), torch.ones(2))
    tensor([1., 1.])
    """
    if target.shape != value.shape:
        raise ShapeError(f"write_whole_: target {tuple(target.shape)} and value {tuple(value.shape)} differ in shape")
    part = local(target)
    if not is_sharded(target):
        part.copy_(value)
        return target
    spread = spread_of(target)
    check_writable("write_whole_", spread)
    for region in spread.regions(world(spread.group).rank):
        part[region.local] = value[region.whole].to(part.dtype)
    return target


def local_ranges(tensor: Tensor, dim: int = 0) -> tuple[range, ...]:
    """The indices of dimension `dim` of the whole tensor that this rank holds, in the order of its local part.

    Usually one range; none where the shard is empty; several for a strided shard.

    Args:
        tensor: plain, or of class `DTensor`.
        dim: a dimension of the whole tensor.

    Returns: ranges of indices.
    Raises:
        UnsupportedError: a placement other than `Shard`, `Replicate` and a `Partial` sum or mean.
    Cost: nothing is sent.
    Source: this library's own.

    >>> local_ranges(torch.zeros(5, 3))
    (range(0, 5),)
    """
    if not _is_dtensor(tensor):
        return (range(tensor.shape[dim]),) if tensor.shape[dim] else ()
    spread = spread_of(tensor)
    return spread.ranges(world(spread.group).rank, dim % tensor.ndim)


def group_of(tensor: Tensor) -> Group:
    """The process group over which a tensor is spread; `None`, the default group, for a plain tensor.

    Args:
        tensor: plain, or of class `DTensor`.

    Returns: a process group or `None`.
    Raises:
        UnsupportedError: a placement other than `Shard`, `Replicate` and a `Partial` sum or mean.
    Cost: nothing is sent, except where a mesh of several dimensions does not cover all ranks: its group is created.
    Source: this library's own.

    >>> group_of(torch.zeros(3)) is None
    True
    """
    return spread_of(tensor).group if _is_dtensor(tensor) else None


def spread_of(tensor: Tensor, group: Group = None) -> Spread:
    """How a tensor is spread over the ranks; a plain one is whole on every rank of `group`.

    Raises `UnsupportedError` for a placement other than `Shard`, `Replicate` and a `Partial` sum or mean.
    """
    if not _is_dtensor(tensor):
        size = world(group).size
        return Spread(tuple(tensor.shape), (Cut("replicate"),), (size,), tuple((r,) for r in range(size)), group)
    spread = _dtensor(tensor)
    mesh = spread.device_mesh
    group, places = _places(mesh, dist.group.WORLD)
    return Spread(tuple(tensor.shape), tuple(map(_cut, spread.placements)), tuple(mesh.shape), places, group)


def check_writable(what: str, spread: Spread) -> None:
    """Raises `UnsupportedError` for a partial tensor."""
    if spread.is_partial:
        raise UnsupportedError(
            f"{what}: a Partial tensor {spread.shape} cannot be written, since its parts do not follow from their sum. "
            "Redistribute it to Shard or Replicate first"
        )


def _cut(placement: Any) -> Cut:
    if placement.is_replicate():
        return Cut("replicate")
    # Only the plain sum and mean: subclasses of Partial keep more than their parts (a mask, a norm).
    if placement.is_partial() and type(placement).__name__ == "Partial" and placement.reduce_op in ("sum", "avg"):
        return Cut("partial", op=placement.reduce_op)
    if placement.is_partial() or not hasattr(placement, "dim"):
        raise UnsupportedError(
            f"placement: a tensor placed as {placement} cannot be gathered; Shard, Replicate and Partial sums can. "
            "Call tensor.redistribute(...) first"
        )
    return Cut("shard", placement.dim, int(getattr(placement, "split_factor", 1)))


@cache
def _places(mesh: Any, all_ranks: Group) -> tuple[Any, tuple[tuple[int, ...], ...]]:
    """The group of all ranks of a mesh, and the place in the mesh of each of its ranks.

    `all_ranks`, the default group, is part of the cache's key, since a process may leave one group and join another.
    """
    ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
    group: Group
    if mesh.ndim == 1:
        group = mesh.get_group()
    elif len(ranks) == dist.get_world_size():
        group = all_ranks
    else:
        group = dist.new_group(list(ranks), use_local_synchronization=True)  # only the mesh's ranks are here
    places = tuple(tuple((mesh.mesh == r).nonzero()[0].tolist()) for r in dist.get_process_group_ranks(group))
    return group, places


def _dtensor(tensor: Any) -> Any:
    """A `DTensor`, for the type checker, which need not import it."""
    return tensor
