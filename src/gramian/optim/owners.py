"""Sharded parameters: one rank works on each whole matrix, all ranks step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gramian import placement

__all__ = ["Owners", "not_finite"]


def not_finite(grads: Sequence[Tensor]) -> Tensor:
    """Which gradients hold a NaN or an infinity, (P,), the same on all ranks that share one of them."""
    parts = [placement.local(g) for g in grads]
    # The largest entry: NaN if there is one.
    peaks = [
        torch.linalg.vector_norm(x, math.inf) if x.numel() else x.new_zeros(()) for x in parts
    ]
    bad = ~torch.isfinite(torch.stack([peak.float() for peak in peaks]))
    groups: dict[int, list[int]] = {}
    for i, g in enumerate(grads):
        if placement.is_sharded(g):
            groups.setdefault(id(placement.group_of(g)), []).append(i)
    for indices in groups.values():
        votes = bad[indices].long()
        placement.all_reduce_sum([votes], placement.group_of(grads[indices[0]]))
        bad[indices] = votes > 0
    return bad


class Owners:
    """Which rank works on which sharded parameter; everybody works on those that are whole."""

    def __init__(self) -> None:
        self._owner: dict[Tensor, int] = {}

    def gather(self, params: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """The whole gradient of each parameter that this rank works on. Collective where any is sharded."""
        grads = {p: p.grad for p in params if p.grad is not None}
        sharded = [p for p in params if placement.is_sharded(p)]
        if sharded:
            self._assign(sharded)
            wholes = placement.gather([grads[p] for p in sharded], [self._owner[p] for p in sharded])
            for p, whole in zip(sharded, wholes, strict=True):
                if whole is None:
                    del grads[p]
                else:
                    grads[p] = whole
        return {p: placement.local(g) for p, g in grads.items()}

    def add_(self, params: Sequence[Tensor], updates: Mapping[Tensor, Tensor], keep: Tensor | None) -> None:
        """Adds to each parameter its update, which its owner has; before that, multiplies it by its entry of `keep`."""
        parts = [placement.local(p) for p in params]
        if keep is not None:
            torch._foreach_mul_(parts, list(keep.to(parts[0].device).unbind()))
        sharded = [p for p in params if placement.is_sharded(p)]
        steps = dict(updates)
        if sharded:
            deltas = [torch.zeros_like(p) for p in sharded]
            placement.scatter_(deltas, [self._owner[p] for p in sharded], [updates.get(p) for p in sharded])
            steps.update((p, placement.local(delta)) for p, delta in zip(sharded, deltas, strict=True))
        torch._foreach_add_(parts, [steps[p].to(part.dtype) for p, part in zip(params, parts, strict=True)])

    def _assign(self, params: Sequence[Tensor]) -> None:
        """Shares out the parameters that have no owner yet, the same way on all ranks."""
        new = [p for p in params if p not in self._owner]
        by_group: dict[int, list[Tensor]] = {}
        for p in new:
            by_group.setdefault(id(placement.group_of(p)), []).append(p)
        for members in by_group.values():
            size = placement.world(placement.group_of(members[0])).size
            costs = [p.numel() * min(p.shape[0], p.numel() // p.shape[0]) for p in members]
            self._owner.update(zip(members, placement.assign(costs, size), strict=True))
