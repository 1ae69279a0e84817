"""Which ranks capture a model together, each on batches of its own, and how they keep pace."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gramian import placement
from gramian.checkpoint import clean_name
from gramian.errors import UnsupportedError

__all__ = ["Ranks", "ranks_of"]


@dataclass(frozen=True)
class Ranks:
    """The ranks of DDP or of FSDP2, or this process alone.

    `model` is what each calls: under DDP the module inside, whose passes do not communicate. `together`: whether there
    are others, whose statistics are merged. `sharded`: whether every pass waits for the others' shards.
    """

    model: nn.Module
    together: bool = False
    sharded: bool = False
    group: Any = None

    def steps(self, batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
        """The batches, each with whether it counts: see `placement.in_step`."""
        if self.sharded:
            return placement.in_step(batches, self.group)
        return ((batch, True) for batch in batches)

    def agreed_pass(self) -> Any:
        """Around all passes: an error on one rank is one on all. Not where the passes themselves communicate."""
        return placement.agreed("capture", self.group) if self.together and not self.sharded else nullcontext()

    def agreed_loss(self) -> Any:
        """Around what is between the forward and the backward pass of sharded ranks, likewise."""
        return placement.agreed("capture", self.group) if self.sharded else nullcontext()

    @contextmanager
    def resharded(self) -> Iterator[None]:
        """Shards at the end what a forward pass without its backward pass leaves whole."""
        try:
            yield
        finally:
            for module in _fsdp_modules(self.model) if self.sharded else ():
                module.reshard()


def ranks_of(model: nn.Module) -> Ranks:
    """The ranks over which `model` is wrapped.

    Raises `UnsupportedError` for a model that is sharded in another way than by `fully_shard` over the batches' ranks:
    tensor parallelism gives several ranks the same batch.
    """
    inner = getattr(model, "_orig_mod", model)  # compiled: a capture runs it uncompiled
    if isinstance(inner, DistributedDataParallel):
        return Ranks(inner.module, together=True, group=inner.process_group)
    sharded = [(name, p) for name, p in model.named_parameters() if placement.is_sharded(p)]
    if not sharded:
        return Ranks(model)
    groups = {id(placement.group_of(p)) for _, p in sharded}
    over_batches = _fsdp_modules(model) and len(groups) == 1
    for name, parameter in sharded:
        if not over_batches or sum(not p.is_replicate() for p in parameter.placements) > 1:  # type: ignore[attr-defined]
            raise UnsupportedError(
                f"capture: {clean_name(name)!r} is placed as {parameter.placements}; "  # type: ignore[attr-defined]
                "only models sharded by fully_shard, over one mesh and without tensor parallelism, are captured"
            )
    return Ranks(model, together=True, sharded=True, group=placement.group_of(sharded[0][1]))


def _fsdp_modules(model: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]
