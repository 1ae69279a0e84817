"""Data-parallel training: each rank takes its rows of every batch, and all take the step of the whole batch.

An objective is a sum of losses and a number of units. Both, and the gradients, add up over ranks to those of the whole
batch, however unequal the shares. With one rank every function here returns at once.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gramian import placement
from gramian.batch import mapped, tensors
from gramian.calls import wrappings
from gramian.errors import TaskError, UnsupportedError
from gramian.objective import Objective
from gramian.placement.ranks import carrier
from gramian.recording import evaluating
from gramian.training.stream import checksum

__all__ = [
    "add_gradients",
    "check_batch",
    "check_model",
    "first",
    "first_ranks",
    "random_states",
    "restore_random_state",
    "rows",
    "same_weights_",
    "sums",
]

# Generous bound on the rounding of a float32 sum over a batch; a loss that is no sum over rows differs by far more.
ROUNDING = 1e-3


def first() -> bool:
    """Whether this is rank 0, which writes the files."""
    return placement.world().rank == 0


def first_ranks(values: list[Any]) -> list[Any]:
    """Return rank 0's values (numbers, strings, lists) on all ranks."""
    return json.loads(placement.exchange(json.dumps(values))[0]) if placement.is_distributed() else values


def check_model(model: nn.Module) -> None:
    """Raise `UnsupportedError` for a model whose gradients do not add up over shares of a batch."""
    if not placement.is_distributed():
        return
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            raise UnsupportedError(
                f"train: {name} is a {type(module).__name__}, which would see only its rank's share of a batch. "
                "Use SyncBatchNorm (on GPUs), GroupNorm or LayerNorm, or train in one process"
            )
    parallel = any(isinstance(m, nn.parallel.DistributedDataParallel) for m in wrappings(model))
    if parallel or any(map(placement.is_sharded, model.parameters())):
        raise UnsupportedError(
            f"train: the task's model is a wrapped or sharded {type(model).__name__}; expected the plain module, whose "
            "gradients train adds up itself. For FSDP2 write your own loop with gm.optim"
        )


def same_weights_(model: nn.Module) -> None:
    """Copy rank 0's parameters and buffers to all ranks."""
    if placement.is_distributed():
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                wire = tensor.detach().contiguous().to(carrier(tensor.device))
                dist.broadcast(wire, 0)
                tensor.copy_(wire)


def rows(batch: Any) -> Any:
    """Return this rank's rows of each tensor in the batch: every N-th, of N ranks."""
    rank, size = placement.world()
    return batch if size == 1 else mapped(batch, lambda t: t[slice(rank, None, size)], _not_rows)


def check_batch(model: nn.Module, objective: Objective, batch: Any) -> None:
    """Raise where the ranks drew different batches, or the loss is not a sum over the rows of the tensors."""
    if not placement.is_distributed():
        return
    if len(set(placement.exchange(str(checksum(batch))))) > 1:
        raise TaskError("train: the ranks drew different batches. Draw everything random in them from the generator")
    counts = {len(t) if t.ndim else 0 for t in tensors(batch)}
    num_ranks = placement.world().size
    if len(counts) != 1 or min(counts) < num_ranks:
        raise UnsupportedError(
            f"train: {num_ranks} ranks divide a batch by rows, but its tensors have {sorted(counts)} rows. Put the "
            "samples in the first dimension, at least one for each rank, or train in one process"
        )
    share = rows(batch)
    with evaluating(model), torch.no_grad():
        whole, units = objective.loss(model, batch)
        parts, part_units = sums(*objective.loss(model, share))
    same_units = torch.isclose(part_units.double(), units.double())
    if not same_units or not torch.allclose(parts, whole, rtol=ROUNDING, atol=0, equal_nan=True):
        raise UnsupportedError(
            f"train: the loss of a batch, {float(whole):.6g} over {float(units):g} units, is not the sum over its "
            f"rows, {float(parts):.6g} over {float(part_units):g}, so that ranks cannot divide it. Train in one "
            "process, or put the samples in the first dimension"
        )


def sums(loss: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss, detached, and the number of units of the whole batch."""
    loss = loss.detach()
    if placement.is_distributed():
        loss, units = loss.clone(), units.detach().clone()
        placement.all_reduce_sum([loss, units])
    return loss, units


def add_gradients(model: nn.Module) -> None:
    """Add up the gradients over the ranks, in place; a missing gradient counts as zero."""
    if not placement.is_distributed():
        return
    params = [p for p in model.parameters() if p.requires_grad]
    known = torch.tensor([p.grad is not None for p in params], dtype=torch.int64)
    placement.all_reduce_sum([known])
    used = [p for p, count in zip(params, known.tolist(), strict=True) if count]
    for p in used:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    placement.all_reduce_sum([p.grad for p in used if p.grad is not None])


def random_states(device: torch.device) -> list[dict[str, str]]:
    """Return the states of each rank's global generators, as text."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    own = {name: bytes(state.tolist()).hex() for name, state in states.items()}
    return [json.loads(text) for text in placement.exchange(json.dumps(own))]


def restore_random_state(states: list[dict[str, str]], device: torch.device) -> None:
    """Set this rank's global generators to their states from `random_states`."""
    own = states[placement.world().rank]
    tensors = {name: torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8) for name, text in own.items()}
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], device)


def _not_rows(value: Any) -> Any:
    """Refuse what holds no tensor and cannot be divided."""
    if value is None:
        return value
    raise UnsupportedError(
        f"train: ranks can divide a batch of tensors in tuples, lists, mappings and dataclasses; this one has a "
        f"{type(value).__name__}. Train in one process"
    )
