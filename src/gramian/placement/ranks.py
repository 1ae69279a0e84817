"""Ranks of one mind: sums, flags, texts and errors that are the same on every rank of a process group.

Every function is collective: all ranks of the group call it, in the same order. Without a process group there is one
rank, and nothing is sent. What is sent are numbers and UTF-8; nothing that is received is executed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from gramian import errors
from gramian.errors import DtypeError, GramianError, InputError

__all__ = [
    "World",
    "agreed",
    "all_reduce_sum",
    "any_rank",
    "carrier",
    "exchange",
    "is_distributed",
    "raise_together",
    "world",
]

Group: TypeAlias = Any  # a torch.distributed.ProcessGroup (which not every build of torch has), or None: the default

BUCKET_BYTES = 64 << 20  # of one sum: large enough that its latency does not count, small beside a model


class World(NamedTuple):
    """This rank's number in a process group, and how many ranks there are."""

    rank: int
    size: int


def world(group: Group = None) -> World:
    """This rank and the number of ranks of `group`, by default of all; `(0, 1)` without a process group.

    Raises `InputError` on a rank that is not in the group.

    >>> world()
    World(rank=0, size=1)
    """
    if not (dist.is_available() and dist.is_initialized()):
        return World(0, 1)
    rank = dist.get_rank(group)
    if rank < 0:
        raise InputError(
            f"placement: rank {dist.get_rank()} is not in the process group {group}; call on its ranks only"
        )
    return World(rank, dist.get_world_size(group))


def is_distributed(group: Group = None) -> bool:
    """Whether there is more than one rank."""
    return world(group).size > 1


def any_rank(flag: bool | Tensor, group: Group = None) -> bool:
    """Whether the flag is set on any rank: the same answer on all. Cost: one sum of four bytes, waited for.

    >>> any_rank(False)
    False
    """
    if not is_distributed(group):
        return bool(flag)
    flags = torch.tensor([bool(flag)], dtype=torch.int32, device=carrier(None, group))
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    return bool(flags.item())


def exchange(text: str, group: Group = None) -> list[str]:
    """The texts of all ranks, by rank. Cost: one exchange of lengths and one of the longest text from each rank.

    >>> exchange("layers.0.weight")
    ['layers.0.weight']
    """
    num_ranks = world(group).size
    if num_ranks == 1:
        return [text]
    device = carrier(None, group)
    # A bytearray, since a tensor wants memory that it may write to.
    data = torch.frombuffer(bytearray(text.encode(errors="surrogatepass")) or bytearray(1), dtype=torch.uint8)
    length = torch.tensor([len(data) if text else 0], dtype=torch.int64, device=device)
    lengths = [torch.empty_like(length) for _ in range(num_ranks)]
    dist.all_gather(lengths, length, group=group)
    longest = max(1, *(int(n) for n in lengths))
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(data)] = data[:longest].to(device)
    texts = [torch.empty_like(padded) for _ in range(num_ranks)]
    dist.all_gather(texts, padded, group=group)
    return [bytes(t[: int(n)].tolist()).decode(errors="surrogatepass") for t, n in zip(texts, lengths, strict=True)]


@contextmanager
def agreed(what: str, group: Group = None) -> Iterator[None]:
    """Raises on every rank what any rank raised inside, so that none waits for one that has given up.

    The error names `what`, the rank and its message, and has that rank's class if it is one of gramian's, else
    `GramianError`; of several, the lowest rank's is told. With one rank, the error passes through as it is. The block
    itself must not communicate: a rank that fails in it would leave the others waiting there.

    Cost: one `any_rank`.

    >>> with agreed("load"):
    ...     raise InputError("no file")
    Traceback (most recent call last):
    gramian.errors.InputError: no file
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        if not is_distributed(group):
            raise
        error = caught
    if any_rank(error is not None, group):
        raise_together(what, error, group)


def raise_together(what: str, error: Exception | None, group: Group = None) -> None:
    """Raises the lowest failing rank's error everywhere; for when all ranks know already that one has failed."""
    mine = "" if error is None else f"{_class_name(error)}\n{_told(error)}"
    texts = exchange(mine, group)
    failed = [rank for rank, text in enumerate(texts) if text]
    assert failed, "no rank has an error to tell"
    name, _, message = texts[failed[0]].partition("\n")
    cls = getattr(errors, name, GramianError) if name in errors.__all__ else GramianError
    others = f"; {len(failed) - 1} other ranks failed too" if len(failed) > 1 else ""
    raise cls(f"{what}: rank {failed[0]} of {len(texts)} failed: {message}{others}") from error


def _class_name(error: Exception) -> str:
    """The nearest class of gramian's errors."""
    return next((cls.__name__ for cls in type(error).__mro__ if cls.__name__ in errors.__all__), "GramianError")


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, GramianError) else f"{type(error).__name__}: {error}"


def all_reduce_sum(tensors: Iterable[Tensor], group: Group = None) -> None:
    """Adds up each tensor over the ranks, in place: every rank holds the same sums, bit for bit.

    Floating tensors of any dtype are summed in float64, integers in int64, many small ones in one collective. Ranks
    whose tensors differ in number, shape or dtype raise instead of waiting for each other.

    Raises: `DtypeError` for a boolean or complex tensor, `InputError`, on every rank, where the ranks' tensors differ.
    Cost: one exchange of 16 bytes; then 8 bytes an element, in buckets of 64 MiB.
    """
    tensors = [tensor.detach() for tensor in tensors]
    for tensor in tensors:
        if tensor.dtype == torch.bool or tensor.is_complex():
            raise DtypeError(f"all_reduce_sum: expected floating or integer tensors, got {tensor.dtype}")
    if not is_distributed(group):
        return
    _check_same("all_reduce_sum", [(tuple(t.shape), str(t.dtype)) for t in tensors], group)
    for bucket in _buckets(tensors):
        wide = torch.float64 if bucket[0].is_floating_point() else torch.int64
        device = carrier(bucket[0].device, group)
        if len(bucket) == 1 and bucket[0].dtype == wide and bucket[0].is_contiguous() and bucket[0].device == device:
            dist.all_reduce(bucket[0], group=group)
            continue
        flat = torch.cat([tensor.reshape(-1).to(device, wide) for tensor in bucket])
        dist.all_reduce(flat, group=group)
        for tensor, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(total.view(tensor.shape))


def _check_same(what: str, signature: Sequence, group: Group) -> None:
    """Raises on every rank where the ranks' signatures differ."""
    code = zlib.crc32(repr(signature).encode())
    extremes = torch.tensor([code, -code], dtype=torch.int64, device=carrier(None, group))
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    largest, least = extremes.tolist()
    if largest == -least:
        return
    told = exchange(f"{len(signature)} tensors, {', '.join(map(str, signature[:3]))}", group)
    ranks = "; ".join(f"rank {rank} has {text}" for rank, text in enumerate(told[:4]))
    raise InputError(f"{what}: every rank must pass the same shapes and dtypes; {ranks}")


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one kind and device, at most `BUCKET_BYTES` each, or one tensor; the same on all ranks."""
    kinds: dict[tuple[bool, str], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.is_floating_point(), tensor.device.type), []).append(tensor)
    for same in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in same:
            if bucket and size + 8 * tensor.numel() > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += 8 * tensor.numel()
        if bucket:
            yield bucket


def carrier(device: torch.device | None, group: Group = None) -> torch.device:
    """The device whose tensors the group's backend sends: `device` itself where it can, else one that it can."""
    config = dist.get_backend_config(group)
    types = [part.partition(":")[0] for part in config.split(",") if ":" in part]
    if device is not None and (device.type in types or not types):
        return device
    if "cpu" in types or not types:
        return torch.device("cpu")
    return torch.device(types[0], torch.get_device_module(types[0]).current_device())
