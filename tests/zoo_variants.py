"""The ways in which people run a model: plain, under autocast, compiled, under DDP and sharded by FSDP2.

    variant = VARIANTS["fsdp2"]
    model = variant.wrap(case.make_model(0))
    with variant.context():
        loss = case.loss(model, batch)

`wrap` may change the model that it is given and returns the one to call. A variant of two ranks runs inside
`distributed.run_on_ranks(function, variant.num_ranks)`, each rank with a batch of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Variant:
    """How to wrap a model and in which context to call it; `rtol` is of its loss against that of the plain model."""

    name: str
    wrap: Callable[[nn.Module], nn.Module]
    context: Callable[[], AbstractContextManager] = nullcontext
    num_ranks: int = 1
    rtol: float = 1e-5


def _plain(model: nn.Module) -> nn.Module:
    return model


def _sharded(model: nn.Module) -> nn.Module:
    """FSDP2 on every module that stands in a row of others, inner ones first, and on the whole."""
    holders = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for module in reversed(list(model.modules())):
        if not isinstance(module, (nn.Sequential, nn.ModuleList)):
            continue
        for child in module.children():
            # What shares a parameter with another module has to be in one group with it, and the whole model is.
            inside = Counter(id(p) for m in child.modules() for p in m.parameters(recurse=False))
            if inside and all(holders[key] == count for key, count in inside.items()):
                fully_shard(child, mesh=_all_ranks())
    return fully_shard(model, mesh=_all_ranks())


@cache
def _all_ranks() -> DeviceMesh:
    return init_device_mesh("cpu", (torch.distributed.get_world_size(),))


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("plain", _plain, rtol=0.0),
        # Eight bits of mantissa, through a few layers.
        Variant("autocast", _plain, partial(torch.autocast, "cpu", torch.bfloat16), rtol=2e-2),
        # The eager backend: dynamo's graphs and guards, without the minutes that a compiler takes.
        Variant("compiled", partial(torch.compile, backend="eager")),
        Variant("ddp", DistributedDataParallel, num_ranks=2),
        Variant("fsdp2", _sharded, num_ranks=2),
    )
}
