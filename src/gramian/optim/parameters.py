"""Parameters as users' loops treat them: quantized, sparse, reshaped, or replaced by a wrapper."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian import placement
from gramian.checkpoint import clean_name
from gramian.errors import InputError, UnsupportedError
from gramian.layers.lookup import is_lazy
from gramian.optim.route import Route

__all__ = [
    "check_caller",
    "check_not_replaced",
    "check_step",
    "overlaps_itself",
    "reason_to_leave_out",
    "replacements",
]


_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"


def check_caller(name: str) -> None:
    """Raises `UnsupportedError` where torch's ZeroRedundancyOptimizer builds the optimizer.

    It gives each rank some of the parameters, without their names: the roles and the number of matrices, which set the
    length of the steps, would differ by rank.
    """
    if _ZERO not in sys.modules:
        return
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == _ZERO:
            raise UnsupportedError(
                f"{name} under ZeroRedundancyOptimizer is not supported: each rank would know a part of the parameters "
                f"and no names. Use {name}(model) with DDP, or with FSDP2 (fully_shard), which shards its state"
            )
        frame = frame.f_back


def reason_to_leave_out(name: str, p: Tensor) -> str:
    """Why an optimizer leaves out a parameter that holds no real numbers and is not trained; empty if it does not.

    Raises `InputError` for one that is to be trained, and for one whose entries share memory.
    """
    if p.is_floating_point() and p.element_size() > 1:
        if not is_lazy(p) and overlaps_itself(p):
            raise InputError(
                f"{name!r} of shape {tuple(p.shape)} and strides {p.stride()} has entries that share memory, as expand "
                "makes them, and cannot be stepped. Give the tensor before it was expanded, or a clone"
            )
        return ""
    dtype = str(p.dtype).removeprefix("torch.")
    if p.requires_grad:
        raise InputError(
            f"{name!r} is of {p.dtype}; expected real floating-point parameters. Leave others out, or freeze them; for "
            "complex ones, see torch.view_as_real"
        )
    return f"left out: {dtype}, frozen, no real numbers to step"


def overlaps_itself(p: Tensor) -> bool:
    """Whether two entries of a tensor share memory, as those of an expanded one do."""
    local = placement.locals_of([p])[0]
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(local.stride(), local.shape, strict=True) if n > 1):
        if stride <= reach:  # perhaps
            ranges = [torch.arange(n) * s for n, s in zip(local.shape, local.stride(), strict=True) if n > 1]
            offsets = functools.reduce(lambda a, b: (a[:, None] + b).flatten(), ranges)
            return len(offsets.unique()) < len(offsets)
        reach += stride * (size - 1)
    return False


def check_step(params: Sequence[Tensor], routes: Sequence[Route]) -> list[bool]:
    """Which parameters have a gradient. Raises for parameters and gradients that cannot be stepped."""
    present = []
    for p, r in zip(params, routes, strict=True):
        g, shape = p.grad, p.shape
        if shape != r.shape and r.shape is not None:
            raise InputError(
                f"{r.name!r} has shape {tuple(shape)} now and had {r.shape} when the optimizer was built. Build it "
                "again after a parameter has changed its shape"
            )
        present.append(g is not None and g.numel() > 0)
        if g is None:
            continue
        if g.layout is not torch.strided:
            raise UnsupportedError(
                f"sparse gradients are not supported, and {r.name!r} has one; make the embedding with sparse=False"
            )
        if g.shape != shape:
            raise InputError(f"{r.name!r} has shape {tuple(shape)} and a gradient of shape {tuple(g.shape)}")
        if p.is_meta:
            raise UnsupportedError(
                f"{r.name!r} is on the meta device and holds no numbers. Call model.to_empty(device=…), initialize "
                "the model, and build the optimizer then"
            )
    return present


def replacements(groups: Sequence[Mapping[str, Any]], routes: Mapping[Tensor, Route]) -> dict[Tensor, Tensor]:
    """The parameters that a wrapper has put into the groups in place of others, by the one each replaces.

    Accelerate does so under FSDP2. They are told by name, or by place where they have none. Raises `UnsupportedError`
    where they are not the same matrices, as under DeepSpeed's ZeRO and FSDP1, which flatten them.
    """
    by_name = {r.name: r for r in routes.values()}
    numbers = iter(routes.values())
    found = {}
    for group in groups:
        names = [clean_name(name) for name in group.get("param_names", ())]
        for i, p in enumerate(group["params"]):
            number = next(numbers, None)
            if p in routes:
                continue
            old = number if not names else by_name.get(names[i]) if len(names) == len(group["params"]) else None
            if old is None or old.parameter.shape != p.shape:
                raise UnsupportedError(
                    f"the parameters were replaced by tensors of other shapes, such as {tuple(p.shape)}"
                    + (f" for {old.name!r} of shape {tuple(old.parameter.shape)}" if old is not None else "")
                    + ": DeepSpeed's ZeRO and FSDP1 flatten parameters, and flat ones hold no matrices. Use DDP or "
                    "FSDP2 (torch's fully_shard). A parameter that is new joins by add_param_group"
                )
            found[old.parameter] = p
    return found


def check_not_replaced(model: nn.Module, routes: Iterable[Route]) -> None:
    """Raises `InputError` if the model has a parameter under a name that the optimizer knows, and is not stepped."""
    now = {clean_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    routes = list(routes)
    stepped = {r.parameter for r in routes}
    gone = [r.name for r in routes if now.get(r.name, r.parameter) not in stepped]
    if gone:
        raise InputError(
            f"the model has new parameters in place of {len(gone)} that the optimizer was built with, such as "
            f"{gone[0]!r}, and would not train. Call fully_shard, to_empty or whatever replaced them before building "
            "the optimizer, or add them with add_param_group"
        )
