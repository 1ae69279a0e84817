"""Sharded parameters: one rank computes the step of each whole matrix, and all apply it and save their parts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gramian import placement
from gramian.linalg.engine.scaling import peak
from gramian.optim.stacks import State
from gramian.placement.shards import spread_of

__all__ = ["Sharding", "not_finite", "whole_norms"]


def whole_norms(grads: Sequence[Tensor], *, wide: bool = False) -> list[Tensor]:
    """The Frobenius norm of each gradient as a whole, the same on all ranks that share it; in float32 at least, or in
    float64 (`wide`), where its rounding to float32 is the same however the gradient is divided.
    """
    least = torch.float64 if wide else torch.float32
    norms = [torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, least)) for x in placement.locals_of(grads)]
    for indices in _by_group(grads).values():
        # A part that several ranks hold (a mesh with a dimension of replicas) is summed as often.
        squares = [norms[i].double().square() / spread_of(grads[i]).copies for i in indices]
        placement.all_reduce_sum(squares, placement.group_of(grads[indices[0]]))
        for i, square in zip(indices, squares, strict=True):
            norms[i] = square.sqrt().to(norms[i].dtype)
    return norms


def not_finite(grads: Sequence[Tensor], power: int = 1) -> Tensor:
    """Which gradients hold a NaN or an infinity, (P,), the same on all ranks that share one of them.

    With `power`, also those with an entry whose power overflows the dtype.
    """
    parts = placement.locals_of(grads)
    bad = _overflow(_norms(parts), power)
    if bad.device.type == "cpu" and bool(bad.any()):  # or only the norm overflows, and no entry does
        for i in bad.nonzero()[:, 0].tolist():
            bad[i] = ~peak(parts[i]).pow(power).isfinite()
    for indices in _by_group(grads).values():
        votes = bad[indices].long()
        placement.all_reduce_sum([votes], placement.group_of(grads[indices[0]]))
        bad[indices] = votes > 0
    return bad


def _norms(parts: Sequence[Tensor]) -> list[Tensor]:
    """A norm of each tensor that is no less than its largest entry; NaN if there is one.

    The Frobenius norm on a CPU, where torch's norm of the largest entry takes twenty times as long.
    """
    filled = [x for x in parts if x.numel()]
    order = 2 if all(x.device.type == "cpu" for x in filled) else math.inf
    norms = iter(torch._foreach_norm(filled, order) if filled else ())
    return [next(norms) if x.numel() else x.new_zeros(()) for x in parts]


def _overflow(norms: Sequence[Tensor], power: int) -> Tensor:
    if len({(norm.dtype, norm.device) for norm in norms}) == 1:
        return torch.stack(list(norms)).pow_(power).isfinite().logical_not_()
    return torch.stack([~norm.pow(power).isfinite().to(norms[0].device) for norm in norms])


class Sharding:
    """Which rank, the owner, computes the steps of which sharded parameter; every rank computes those of whole ones.

    The state of a sharded parameter is whole on its owner, and empty on the other ranks.
    """

    def __init__(self) -> None:
        self._owner: dict[Tensor, int] = {}

    def __bool__(self) -> bool:
        """Whether any parameter is sharded."""
        return bool(self._owner)

    def assign(self, params: Sequence[Tensor]) -> None:
        """Assigns owners to the sharded parameters that have none yet, the same on all ranks."""
        new = [p for p in params if p not in self._owner]
        for indices in _by_group(new).values():
            members = [new[i] for i in indices]
            size = placement.world(placement.group_of(members[0])).size
            costs = [p.numel() * min(p.shape[0], p.numel() // max(p.shape[0], 1)) for p in members]
            self._owner.update(zip(members, placement.assign(costs, size), strict=True))

    def computes(self, p: Tensor) -> bool:
        """Whether this rank computes the steps of a parameter, and so holds its state."""
        return p not in self._owner or placement.world(placement.group_of(p)).rank == self._owner[p]

    def gradients(self, params: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """The whole gradient of each parameter that this rank works on. Collective where any is sharded."""
        grads = {p: p.grad for p in params if p.grad is not None}
        if all(type(g) is Tensor for g in grads.values()):
            return grads
        for p, g in grads.items():
            if p not in self._owner and placement.is_sharded(g):  # a replica whose gradient is still to be summed
                grads[p] = placement.whole(g)
        sharded = [p for p in params if p in self._owner]
        if sharded:
            wholes = placement.gather([grads[p] for p in sharded], [self._owner[p] for p in sharded])
            for p, whole in zip(sharded, wholes, strict=True):
                if whole is None:
                    del grads[p]
                else:
                    grads[p] = whole
        return dict(zip(grads, placement.locals_of(list(grads.values())), strict=True))

    def add_(
        self, params: Sequence[Tensor], updates: Mapping[Tensor, Tensor], keep: Mapping[Tensor, Tensor] | float
    ) -> None:
        """Multiplies each parameter by its entry of `keep`, then adds its update, which its owner has. Collective."""
        parts = placement.locals_of(params)
        if isinstance(keep, float | int):
            if keep != 1:
                torch._foreach_mul_(parts, keep)
        else:
            torch._foreach_mul_(parts, [keep[p].to(part.device) for p, part in zip(params, parts, strict=True)])
        sharded = [p for p in params if p in self._owner]
        steps = dict(updates)
        if sharded:
            deltas = [torch.zeros_like(p) for p in sharded]
            placement.scatter_(deltas, [self._owner[p] for p in sharded], [updates.get(p) for p in sharded])
            steps.update((p, placement.local(delta)) for p, delta in zip(sharded, deltas, strict=True))
        torch._foreach_add_(parts, [steps[p].to(part.dtype) for p, part in zip(params, parts, strict=True)])

    def divide(self, states: Mapping[Tensor, State]) -> dict[Tensor, State]:
        """This rank's part of all states: of a sharded parameter, slices of large tensors, and small tensors whole.

        Collective where any parameter is sharded.
        """
        out = dict(states)
        params = list(self._owner)
        for indices in _by_group(params).values():
            members = [params[i] for i in indices]
            group = placement.group_of(members[0])
            mine = [{k: (v.shape, str(v.dtype)) for k, v in states.get(p, {}).items()} for p in members]
            tables = [json.loads(text) for text in placement.exchange(json.dumps(mine), group)]
            targets, owners, values = [], [], []
            for i, p in enumerate(members):
                owner = self._owner[p]
                out[p] = {k: _part(p, shape, dtype) for k, (shape, dtype) in tables[owner][i].items()}
                targets += out[p].values()
                owners += [owner] * len(out[p])
                values += [states.get(p, {}).get(k) for k in out[p]]
            placement.scatter_(targets, owners, values, group=group)
        return {p: state for p, state in out.items() if state or p not in self._owner}

    def collect(self, parts: Mapping[Tensor, State]) -> dict[Tensor, State]:
        """The inverse of `divide`: whole states on the owners, empty ones elsewhere. Collective too."""
        out: dict[Tensor, State] = {}
        cut: list[tuple[Tensor, str]] = []
        for p, state in parts.items():
            mine = self.computes(p)
            cut += [(p, k) for k, v in state.items() if placement.is_sharded(v)]
            out[p] = {k: placement.local(v) for k, v in state.items() if mine and not placement.is_sharded(v)}
        sent = [_on_the_mesh_of(p, parts[p][k]) for p, k in cut]
        for (p, k), whole in zip(cut, placement.gather(sent, [self._owner[p] for p, _ in cut]), strict=True):
            if whole is not None:
                out[p][k] = whole
        return out


def _by_group(tensors: Iterable[Tensor]) -> dict[int, list[int]]:
    """The indices of the sharded tensors, by the group of ranks that share them."""
    groups: dict[int, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if placement.is_sharded(tensor):
            groups.setdefault(id(placement.group_of(tensor)), []).append(i)
    return groups


def _part(p: Any, shape: Sequence[int], dtype: str) -> Tensor:
    """Zeros of this shape, sharded along the longest dimension over the mesh of `p`; plain where that is too short."""
    from torch.distributed.tensor import Replicate, Shard, zeros

    kind = getattr(torch, dtype.removeprefix("torch."))
    longest = max(range(len(shape)), key=lambda dim: shape[dim])
    if shape[longest] < p.device_mesh.size():
        return torch.zeros(shape, dtype=kind, device=placement.local(p).device)
    cuts = [Replicate() if placed.is_replicate() else Shard(longest) for placed in p.placements]
    return zeros(*shape, dtype=kind, device_mesh=p.device_mesh, placements=cuts)


def _on_the_mesh_of(p: Any, value: Any) -> Tensor:
    """A slice from a file, moved to the mesh of `p`: its own mesh is another object, which may not communicate."""
    from torch.distributed.tensor import DTensor

    if not placement.is_sharded(p) or value.device_mesh is p.device_mesh:
        return value
    part = value.to_local()
    return DTensor.from_local(
        part, p.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )
