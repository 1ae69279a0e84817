"""Data-parallel training: each rank takes its rows of every batch, and all take the step of the whole batch.

An objective is a sum of losses and a number of units. Both, and the gradients, add up over ranks to those of the whole
batch, however unequal the shares. With one rank every function here returns at once.

An exception on one rank must not leave the others waiting in a collective. So what a rank does alone is done under
`Failure.caught`, and the next collective carries the news: all ranks raise that rank's error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gramian import placement
from gramian.batch import mapped, tensors
from gramian.calls import wrappings
from gramian.errors import GramianError, TaskError, UnsupportedError, plain
from gramian.objective import Objective
from gramian.placement.ranks import carrier, error_of_rank, raise_together
from gramian.recording import evaluating
from gramian.training.lost_ranks import failed_collective
from gramian.training.stream import checksum

__all__ = [
    "Failure",
    "Share",
    "add_gradients",
    "check_batch",
    "check_identity",
    "check_length",
    "check_model",
    "check_rows",
    "exchanged",
    "first",
    "has_rows",
    "rows",
    "same_weights_",
    "share",
    "sums",
]

# Generous bound on the rounding of a float32 sum over a batch; a loss that is no sum over rows differs by far more.
ROUNDING = 1e-3


class Share(NamedTuple):
    """The rows `number`, `number + of`, `number + 2 of` … of a batch."""

    number: int
    of: int


def share() -> Share:
    """The rows of a batch that this rank takes: every N-th, of N ranks."""
    return Share(*placement.world())


def first() -> bool:
    """Whether this is rank 0, which writes the files."""
    return placement.world().rank == 0


class Failure:
    """The first exception on this rank since all ranks last agreed that there was none."""

    def __init__(self, *, kept: bool = True) -> None:
        self.error: Exception | None = None
        self.kept = kept  # where forward passes are collectives, the others cannot be told: their next one fails

    def caught(self) -> Failure:
        """A context that keeps an exception until `tell`, where there are other ranks.

        The code inside must not call collectives. Code that follows a failure runs too, and of several exceptions the
        first one is kept.
        """
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception) or not placement.is_distributed():
            return False
        if failed_collective(error) is not None:
            return False  # another rank is at fault
        if not self.kept:
            raise error_of_rank("train", error) from error
        self.error = self.error or error
        return True

    def tell(self, failed: bool) -> None:
        """Raise the failing rank's error on all ranks, if any `failed`, which all ranks know."""
        if failed:
            raise_together("train", self.error)


def exchanged(facts: dict[str, Any], failure: Failure) -> list[dict[str, Any]]:
    """Return the facts (JSON) of all ranks by rank; raise on all ranks where one has failed."""
    found = placement.exchange_json(facts | {"failed": failure.error is not None})
    failure.tell(any(other["failed"] for other in found))
    return found


def check_model(model: nn.Module, slices: int | None = None) -> None:
    """Raise `UnsupportedError` for a model whose gradients do not add up over shares of a batch."""
    if not (placement.is_distributed() or slices):
        return
    for name, module in model.named_modules():
        if slices and isinstance(module, _BatchNorm):
            raise UnsupportedError(
                f"train: {name} is a {type(module).__name__}, whose statistics would be those of a slice. Use "
                "GroupNorm or LayerNorm, or leave slices out"
            )
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            raise UnsupportedError(
                f"train: {name} is a {type(module).__name__}, which would see only its rank's share of a batch. "
                "Use SyncBatchNorm (on GPUs), GroupNorm or LayerNorm, or train in one process"
            )
    parallel = any(isinstance(m, (nn.DataParallel, nn.parallel.DistributedDataParallel)) for m in wrappings(model))
    if placement.is_distributed() and (parallel or any(map(placement.is_sharded, model.parameters()))):
        raise UnsupportedError(
            f"train: the task's model is a wrapped or sharded {type(model).__name__}; expected the plain module, whose "
            "gradients train adds up itself. For FSDP2 give the plain module, and shard=True (--shard)"
        )


def check_identity(identity: dict[str, str]) -> None:
    """Raise where the ranks were given other settings, or made other models, and would wait for each other in vain."""
    if not placement.is_distributed():
        return
    zeroth, *others = placement.exchange_json(identity)
    for rank, other in enumerate(others, 1):
        for name in (*zeroth, *other):
            one, two = (plain(each.get(name, "the default"), 200) for each in (zeroth, other))
            if one != two:
                raise _alike(
                    TaskError(f"train: {name} is {one} on rank 0, and {two} on rank {rank}. Give all the same")
                )


def same_weights_(model: nn.Module) -> None:
    """Copy rank 0's parameters and buffers to all ranks."""
    if placement.is_distributed():
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                wire = tensor.detach().contiguous().to(carrier(tensor.device))
                dist.broadcast(wire, 0)
                tensor.copy_(wire)


def has_rows(batch: Any, share: Share) -> bool:
    """Whether a share of the batch has rows: the last shares have none of a batch that is smaller than their number.

    Then no forward pass is taken, and nothing is added to the sums.
    """
    counts = [len(t) for t in tensors(batch) if t.ndim] if share.of > 1 else []
    return not counts or min(counts) > share.number


def rows(batch: Any, share: Share) -> Any:
    """Return a share's rows of each tensor in the batch; the first where it has none."""
    own = slice(share.number, None, share.of) if has_rows(batch, share) else slice(1)
    return batch if share.of == 1 else mapped(batch, lambda t: t[own], _not_rows)


def check_rows(model: nn.Module, batch: Any, num_shares: int) -> None:
    """Raise where a batch has no rows that shares can divide."""
    if num_shares == 1:
        return
    what = f"{num_shares} {'ranks' if num_shares == placement.world().size else 'slices'}"
    otherwise = "train in one process" if placement.is_distributed() else "leave slices out"
    if any(t.is_nested or t.layout is not torch.strided for t in tensors(batch)):
        raise UnsupportedError(
            f"train: {what} divide a batch by rows, and of a sparse or nested tensor torch takes no rows. "
            f"Make it such in the model's forward, or {otherwise}"
        )
    counts = {len(t) if t.ndim else 0 for t in tensors(batch)}
    if len(counts) != 1 or min(counts) < 1:
        raise UnsupportedError(
            f"train: {what} divide a batch by rows, but its tensors have {sorted(counts)} rows. Put the "
            f"samples in the first dimension, or {otherwise}"
        )
    if min(counts) < num_shares and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        raise UnsupportedError(
            f"train: a batch has {min(counts)} rows for {num_shares} ranks, and SyncBatchNorm needs one on each. Leave "
            "out the last, smaller batch (drop_last=True)"
        )


def check_batch(model: nn.Module, objective: Objective, batch: Any, shares: Sequence[Share], failure: Failure) -> None:
    """Raise where the ranks drew different batches, or the loss is not a sum over the rows of the tensors.

    `shares` are this rank's.
    """
    num_shares = shares[0].of
    if num_shares == 1:
        return
    if len(set(placement.exchange(str(checksum(batch))))) > 1:
        raise _alike(
            TaskError("train: the ranks drew different batches. Draw everything random in them from the generator")
        )
    if num_shares > placement.world().size:  # slices, since a whole batch may need more memory than there is
        most = max(-(-max(len(t) for t in tensors(batch)) // num_shares), 2 * num_shares)
        batch = mapped(batch, lambda t: t[:most], _not_rows)
    whole, own = (torch.zeros(()), 0.0), (torch.zeros((), dtype=torch.float64), 0.0)
    with evaluating(model), torch.no_grad():
        with failure.caught():
            whole = objective.summed(model, batch)
        for share in shares:
            with failure.caught():
                loss, units = objective.summed(model, rows(batch, share))
                own = (own[0] + loss.double(), own[1] + units) if has_rows(batch, share) else own
        total, counted = sums(*own, None if not placement.is_distributed() else failure)
    loss, units = float(whole[0]), whole[1]
    differs = math.isfinite(loss) and not math.isclose(total, loss, rel_tol=ROUNDING)  # else the step is skipped
    if placement.any_rank(differs or not math.isclose(counted, units, rel_tol=1e-5)):
        raise _alike(
            UnsupportedError(
                f"train: the loss of a batch, {loss:.6g} over {units:g} units, is not the sum over its rows, "
                f"{total:.6g} over {counted:g}, so that {num_shares} shares cannot divide it. Train in one process "
                "without slices; or put the samples in the first dimension, and let the loss draw nothing at random "
                "and depend on nothing that a pass changes (running statistics)"
            )
        )


def sums(
    loss: Tensor, units: float, failure: Failure | None, position: tuple[int, int] = (0, 0)
) -> tuple[float, float]:
    """Return the loss and the number of units of the whole batch; `failure` is `None` where there is one rank.

    Raises on all ranks where one has failed, or where they are not at the same position (epoch, batch) in the stream.
    """
    if failure is None:
        return loss.item(), units
    failed = failure.error is not None
    own = (0.0, 0.0) if failed else (loss.item(), units)
    place = (65_537 * position[0] + position[1]) % 2**20  # its square is exact
    total = torch.tensor([*own, failed, place, place**2], dtype=torch.float64)
    placement.all_reduce_sum([total])
    amount, number, failures, places, squares = total.tolist()
    failure.tell(failures > 0)
    if placement.world().size * squares != places**2:  # equal numbers only
        raise _early_end()
    return amount, number


def check_length(num_batches: int) -> None:
    """Raise where the ranks counted different numbers of batches in an epoch, so that their runs would differ too."""
    if placement.is_distributed() and len(set(placement.exchange(str(num_batches)))) > 1:
        raise _early_end()


def _early_end() -> GramianError:
    return _alike(
        TaskError(
            "train: the batches of an epoch ended on one rank earlier than on another. Give all ranks the same "
            "batches; each takes its own rows of them"
        )
    )


def _alike(error: GramianError) -> GramianError:
    """An error that all ranks raise, of which the first one speaks."""
    error.rank = 0
    return error


def add_gradients(model: nn.Module, failure: Failure, held: Mapping[Tensor, Tensor] | None = None) -> None:
    """Add up the gradients over the ranks; a missing gradient counts as zero.

    Args:
        model: whose parameters get the sums as their gradients.
        failure: of this rank.
        held: this rank's gradients by parameter, overwritten; those of the parameters, in place, by default.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    own = {p: p.grad for p in params if p.grad is not None} if held is None else held
    if placement.is_distributed() and any(g.layout is not torch.strided for g in own.values()):
        own = {p: g.to_dense() for p, g in own.items()}
    if placement.is_distributed():
        known = torch.tensor([failure.error is not None, *(p in own for p in params)], dtype=torch.int64)
        placement.all_reduce_sum([known])
        failed, *counts = known.tolist()
        failure.tell(failed > 0)
        params = [p for p, count in zip(params, counts, strict=True) if count]
        own = {p: _zeros(p, wide=held is not None) if p not in own else own[p] for p in params}
        placement.all_reduce_sum(torch.view_as_real(t) if t.is_complex() else t for t in own.values())
    for p, total in own.items():
        p.grad = total.to(p.dtype)


def _zeros(p: Tensor, *, wide: bool) -> Tensor:
    """Zeros in place of a gradient that this rank has not."""
    kind = torch.complex128 if p.is_complex() else torch.float64
    return torch.zeros_like(p, dtype=kind if wide else None, memory_format=torch.contiguous_format)


def _not_rows(value: Any) -> Any:
    """Refuse what holds no tensor and cannot be divided."""
    if value is None:
        return value
    raise UnsupportedError(
        f"train: ranks and slices divide a batch of tensors in tuples, lists, mappings and dataclasses; this one has a "
        f"{type(value).__name__}. Train in one process without slices"
    )
