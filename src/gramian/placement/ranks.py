"""Collectives: sums, flags, texts and errors that are the same on every rank of a process group.

All ranks of the group call these functions in the same order. Without a process group there is one rank, and nothing
is sent. Ranks send each other numbers, bytes and UTF-8 text only, and nothing that is received is executed.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, TypeVar

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
    "buckets",
    "carrier",
    "error_of_rank",
    "exchange",
    "exchange_bytes",
    "exchange_json",
    "is_distributed",
    "raise_together",
    "world",
]

Group: TypeAlias = Any  # a torch.distributed.ProcessGroup (which not every build of torch has), or None: the default
Item = TypeVar("Item")

BUCKET_BYTES = 64 << 20  # of one sum: large enough that its latency does not count, small beside a model


class World(NamedTuple):
    """This rank's number in a process group, and how many ranks there are.

    Attributes:
        rank: from 0.
        size: at least 1.
    """

    rank: int
    size: int


def world(group: Group = None) -> World:
    """This process's rank and the number of ranks in a process group.

    Without a process group, `(0, 1)`.

    Args:
        group: a process group; all ranks by default.

    Returns: the rank and the number of ranks.
    Raises:
        InputError: on a rank that is not in the group.
    Cost: nothing is sent.
    Source: this library's own.

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
    """Whether there is more than one rank.

    Args:
        group: a process group; all ranks by default.

    Returns: true for two ranks or more.
    Raises:
        InputError: on a rank that is not in the group.
    Cost: nothing is sent.
    Source: this library's own.

    >>> is_distributed()
    False
    """
    return world(group).size > 1


def any_rank(flag: bool | Tensor, group: Group = None) -> bool:
    """Whether the flag is set on any rank: the same answer on all.

    Collective.

    Args:
        flag: this rank's; a tensor of one element is read, which synchronizes with its device.
        group: a process group; all ranks by default.

    Returns: true where at least one rank passed true.
    Raises:
        InputError: on a rank that is not in the group.
    Cost: one all-reduce of four bytes, and the call waits for it.
    Source: this library's own.

    >>> any_rank(False)
    False
    """
    if not is_distributed(group):
        return bool(flag)
    flags = torch.tensor([bool(flag)], dtype=torch.int32, device=carrier(None, group))
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    return bool(flags.item())


def exchange(text: str, group: Group = None) -> list[str]:
    """The texts of all ranks, by rank.

    Collective.

    Args:
        text: this rank's, of any length.
        group: a process group; all ranks by default.

    Returns: one text for each rank, the same list on all.
    Raises:
        InputError: on a rank that is not in the group.
    Cost: one all-gather of the lengths, and one of as many bytes as the longest text has.
    Source: this library's own.

    >>> exchange("layers.0.weight")
    ['layers.0.weight']
    """
    found = exchange_bytes(text.encode(errors="surrogatepass"), group)
    return [data.decode(errors="surrogatepass") for data in found]


def exchange_bytes(data: bytes, group: Group = None) -> list[bytes]:
    """The bytes of all ranks, by rank.

    Collective.

    Args:
        data: this rank's, of any length.
        group: a process group; all ranks by default.

    Returns: one for each rank, the same list on all.
    Raises:
        InputError: on a rank that is not in the group.
    Cost: one all-gather of the lengths, and one of as many bytes as the longest has.
    Source: this library's own.

    >>> exchange_bytes(b"0")
    [b'0']
    """
    num_ranks = world(group).size
    if num_ranks == 1:
        return [data]
    device = carrier(None, group)
    # A bytearray, since a tensor needs memory that it may write to.
    own = torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)
    length = torch.tensor([len(data)], dtype=torch.int64, device=device)
    lengths = [torch.empty_like(length) for _ in range(num_ranks)]
    dist.all_gather(lengths, length, group=group)
    longest = max(1, *(int(n) for n in lengths))
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(own)] = own[:longest].to(device)
    received = [torch.empty_like(padded) for _ in range(num_ranks)]
    dist.all_gather(received, padded, group=group)
    return [t[: int(n)].cpu().numpy().tobytes() for t, n in zip(received, lengths, strict=True)]


def exchange_json(value: Any, group: Group = None) -> list[Any]:
    """The values of all ranks, by rank, sent as JSON. Collective.

    Nothing in a message can be executed, which is why this stands in for `torch.distributed.all_gather_object`. Floats
    arrive bit for bit, NaN and infinities too. Tuples arrive as lists and keys as text, also from this rank itself and
    with one rank.

    Args:
        value: dicts, lists, tuples, numbers, text and `None`.
        group: a process group; all ranks by default.

    Returns: one value for each rank, the same list on all.
    Raises:
        InputError: on a rank that is not in the group.
        TypeError: the value holds something that JSON has not; the other ranks then wait for this one.
    Cost: that of `exchange` for the value's JSON.
    Source: this library's own.

    >>> exchange_json({"shape": (3, 2), "norm": float("inf")})
    [{'shape': [3, 2], 'norm': inf}]
    """
    return [json.loads(text) for text in exchange(json.dumps(value), group)]


@contextmanager
def agreed(what: str, group: Group = None) -> Iterator[None]:
    """A context that raises on every rank the error that any rank raised inside.

    Collective at its end.

    So no rank waits for one that has given up. The message names `what`, the rank and its error. The class is that
    rank's where it is one of gramian's, else `GramianError`. If several ranks fail, the lowest one's error is raised.
    With one rank, an error passes unchanged. The code inside must not call collectives: a rank that fails between two
    of them would leave the others waiting.

    Args:
        what: the action, as the start of the message.
        group: a process group; all ranks by default.

    Returns: the context manager.
    Raises:
        GramianError: or one of its subclasses, where any rank raised inside.
    Cost: one `any_rank`; one `exchange` more where a rank has failed.
    Source: this library's own.

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
    """Raises the lowest failing rank's error on all ranks. Call it where all ranks know that one has failed."""
    mine = "" if error is None else f"{_class_name(error)}\n{_message(error)}"
    texts = exchange(mine, group)
    failed = [rank for rank, text in enumerate(texts) if text]
    assert failed, "raise_together was called, but no rank has an error"
    others = f"; {len(failed) - 1} other ranks failed too" if len(failed) > 1 else ""
    raise _of_rank(what, failed[0], len(texts), texts[failed[0]], others) from error


def error_of_rank(what: str, error: Exception) -> GramianError:
    """This rank's error with its number, where the others cannot be told."""
    return _of_rank(what, *world(), f"{_class_name(error)}\n{_message(error)}")


def _of_rank(what: str, rank: int, size: int, text: str, others: str = "") -> GramianError:
    name, _, message = text.partition("\n")
    cls = getattr(errors, name, GramianError) if name in errors.__all__ else GramianError
    failure = cls(f"{what}: rank {rank} of {size} failed: {message}{others}")
    failure.rank = rank
    return failure


def _class_name(error: Exception) -> str:
    """The nearest class of gramian's errors."""
    return next((cls.__name__ for cls in type(error).__mro__ if cls.__name__ in errors.__all__), "GramianError")


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, GramianError) else f"{type(error).__name__}: {error}"


def all_reduce_sum(tensors: Iterable[Tensor], group: Group = None) -> None:
    """Replaces each tensor by its sum over the ranks: every rank holds the same sums, bit for bit.

    Collective.

    Floating tensors of any dtype are summed in float64, integers in int64, many small ones in one collective. Ranks
    whose tensors differ in number, shape or dtype raise instead of waiting for each other.

    Args:
        tensors: floating or integer tensors of any shape, the same list on all ranks. Overwritten in place.
        group: a process group; all ranks by default.

    Raises:
        DtypeError: a tensor is boolean or complex.
        InputError: on every rank, where the ranks' tensors differ in number, shape or dtype.
    Cost: one all-reduce of 16 bytes; then 8 bytes an element, in buckets of 64 MiB.
    Source: this library's own.

    >>> total = torch.ones(2)
    >>> all_reduce_sum([total])
    >>> total
    tensor([1., 1.])
    """
    tensors = [tensor.detach() for tensor in tensors]
    for tensor in tensors:
        if tensor.dtype == torch.bool or tensor.is_complex():
            raise DtypeError(
                f"all_reduce_sum: expected floating or integer tensors, got {tensor.dtype}; convert it first"
            )
    if not is_distributed(group):
        return
    _check_same("all_reduce_sum", [(tuple(t.shape), str(t.dtype)) for t in tensors], group)
    for bucket in buckets(tensors, _sum_kind, lambda tensor: 8 * tensor.numel(), BUCKET_BYTES):
        wide = torch.float64 if bucket[0].is_floating_point() else torch.int64
        device = carrier(bucket[0].device, group)
        if len(bucket) == 1 and bucket[0].dtype == wide and bucket[0].is_contiguous() and bucket[0].device == device:
            dist.all_reduce(bucket[0], group=group)
            continue
        flat = torch.cat([tensor.reshape(-1).to(device, wide) for tensor in bucket])
        dist.all_reduce(flat, group=group)
        for tensor, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(total.view(tensor.shape))


def _sum_kind(tensor: Tensor) -> tuple[bool, str]:
    """What tensors share that can be summed in one collective."""
    return tensor.is_floating_point(), tensor.device.type


def _check_same(what: str, signature: Sequence, group: Group) -> None:
    """Raises on every rank where the ranks' signatures differ."""
    code = zlib.crc32(repr(signature).encode())
    extremes = torch.tensor([code, -code], dtype=torch.int64, device=carrier(None, group))
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    largest, least = extremes.tolist()
    if largest == -least:
        return
    texts = exchange(f"{len(signature)} tensors, {', '.join(map(str, signature[:3]))}", group)
    ranks = "; ".join(f"rank {rank} has {text}" for rank, text in enumerate(texts[:4]))
    raise InputError(f"{what}: every rank must pass the same shapes and dtypes; {ranks}")


def buckets(
    items: Iterable[Item], kind: Callable[[Item], Any], num_bytes: Callable[[Item], int], limit: int
) -> Iterator[list[Item]]:
    """Items of one kind in runs of at most `limit` bytes, or of one item; in the same order on all ranks."""
    kinds: dict[Any, list[Item]] = {}
    for item in items:
        kinds.setdefault(kind(item), []).append(item)
    for same in kinds.values():
        bucket: list[Item] = []
        size = 0
        for item in same:
            if bucket and size + num_bytes(item) > limit:
                yield bucket
                bucket, size = [], 0
            bucket.append(item)
            size += num_bytes(item)
        yield bucket


def carrier(device: torch.device | None, group: Group = None) -> torch.device:
    """The device whose tensors the group's backend can send: `device` itself where possible."""
    config = dist.get_backend_config(group)
    types = [part.partition(":")[0] for part in config.split(",") if ":" in part]
    if device is not None and (device.type in types or not types):
        return device
    if "cpu" in types or not types:
        return torch.device("cpu")
    return torch.device(types[0], torch.get_device_module(types[0]).current_device())
