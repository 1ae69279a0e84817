"""Collective capture: which ranks capture a model together, each on its own batches, and how they stay matched."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gramian import placement
from gramian.calls import wrappings
from gramian.checkpoint import clean_name
from gramian.errors import UnsupportedError

__all__ = ["Collective", "collective_of"]


@dataclass(frozen=True)
class Collective:
    """The ranks of DDP or FSDP2 that capture together, or this process alone.

    `model` is the module that each rank calls: under DDP the module inside, whose passes do not communicate.
    `together`: there are other ranks, and statistics are merged. `sharded`: every pass is collective, since it gathers
    the other ranks' shards.
    """

    model: nn.Module
    together: bool = False
    sharded: bool = False
    group: Any = None

    def steps(self, batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
        """`(batch, counts)` for each step; where passes are collective, as many on all ranks (`placement.in_step`)."""
        if self.sharded:
            return placement.in_step(batches, self.group)
        return ((batch, True) for batch in batches)

    def agreed_pass(self) -> Any:
        """A context for all passes: an error on one rank is raised on all. Empty where passes are collective."""
        return placement.agreed("capture", self.group) if self.together and not self.sharded else nullcontext()

    def agreed_loss(self) -> Any:
        """The same for the code between forward and backward pass, where passes are collective. Else empty."""
        return placement.agreed("capture", self.group) if self.sharded else nullcontext()

    @contextmanager
    def resharded(self) -> Iterator[None]:
        """A context that at its end reshards weights left gathered by a forward pass without its backward pass."""
        try:
            yield
        finally:
            for module in _fsdp_modules(self.model) if self.sharded else ():
                module.reshard()


def collective_of(model: nn.Module) -> Collective:
    """The ranks over which `model` is wrapped by DDP or sharded by FSDP2.

    Raises `UnsupportedError` for a model that is sharded in another way than by `fully_shard` over ranks with batches
    of their own: under tensor parallelism several ranks have the same batch.
    """
    for inner in wrappings(model):  # of a compiled model too, which a capture runs uncompiled
        if isinstance(inner, DistributedDataParallel):
            return Collective(inner.module, together=True, group=inner.process_group)
    sharded = [(name, p) for name, p in model.named_parameters() if placement.is_sharded(p)]
    if not sharded:
        return Collective(model)
    groups = {id(placement.group_of(p)) for _, p in sharded}
    over_batches = _fsdp_modules(model) and len(groups) == 1
    for name, parameter in sharded:
        if not over_batches or sum(not p.is_replicate() for p in parameter.placements) > 1:  # type: ignore[attr-defined]
            raise UnsupportedError(
                f"capture: {clean_name(name)!r} is placed as {parameter.placements}; "  # type: ignore[attr-defined]
                "only models sharded by fully_shard, over one mesh and without tensor parallelism, are captured"
            )
    return Collective(model, together=True, sharded=True, group=placement.group_of(sharded[0][1]))


def _fsdp_modules(model: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]
