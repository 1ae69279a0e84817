"""Parameters as users' loops treat them: quantized, sparse, replaced by a wrapper, or with one rate set for all."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian.checkpoint import clean_name
from gramian.errors import GramianWarning, InputError, UnsupportedError
from gramian.optim.routing import Route

__all__ = [
    "check_caller",
    "check_gradients",
    "check_not_replaced",
    "check_state",
    "reason_to_leave_out",
    "replacements",
    "warn_of_one_rate",
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

    Raises `InputError` for one that is to be trained.
    """
    if p.is_floating_point() and p.element_size() > 1:
        return ""
    dtype = str(p.dtype).removeprefix("torch.")
    if p.requires_grad:
        raise InputError(
            f"{name!r} is of {p.dtype}; expected real floating-point parameters. Leave others out, or freeze them; for "
            "complex ones, see torch.view_as_real"
        )
    return f"left out: {dtype}, frozen, no real numbers to step"


def check_gradients(params: Iterable[Tensor], routes: Mapping[Tensor, Route]) -> None:
    """Raises `UnsupportedError` for a sparse gradient, before anything moves."""
    for p in params:
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise UnsupportedError(
                f"sparse gradients are not supported, and {routes[p].name!r} has one; make the embedding with "
                "sparse=False"
            )


def replacements(group: Mapping[str, Any], routes: Mapping[Tensor, Route]) -> dict[Tensor, Tensor]:
    """The parameters of a group that a wrapper has put there in place of others, by the one each replaces.

    Accelerate does so under FSDP2. Raises `UnsupportedError` where they are not the same matrices, as under DeepSpeed's
    ZeRO and FSDP1, which flatten them.
    """
    by_name = {r.name: r for r in routes.values()}
    names = [clean_name(name) for name in group.get("param_names", ())]
    found = {}
    for i, p in enumerate(group["params"]):
        if p in routes:
            continue
        old = by_name.get(names[i]) if len(names) == len(group["params"]) else None
        if old is None or old.parameter.shape != p.shape:
            raise UnsupportedError(
                f"the parameters were replaced by tensors of other shapes, such as {tuple(p.shape)}"
                + (f" for {old.name!r} of shape {tuple(old.parameter.shape)}" if old is not None else "")
                + ": DeepSpeed's ZeRO and FSDP1 flatten parameters, and flat ones hold no matrices. Use DDP or FSDP2 "
                "(torch's fully_shard)"
            )
        found[old.parameter] = p
    return found


def check_not_replaced(model: nn.Module, routes: Iterable[Route]) -> None:
    """Raises `InputError` if the model has another parameter now under the name of one that the optimizer steps."""
    now = {clean_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    gone = [r.name for r in routes if now.get(r.name, r.parameter) is not r.parameter]
    if gone:
        raise InputError(
            f"the model has new parameters in place of {len(gone)} that the optimizer was built with, such as "
            f"{gone[0]!r}, and would not train. Call fully_shard, to_empty or whatever replaced them before building "
            "the optimizer"
        )


def check_state(name: str, found: Mapping[str, Any], buffers: Iterable[str]) -> None:
    """Raises `InputError` for the state of another optimizer.

    Args:
        name: of this optimizer.
        found: the `state_dict()`.
        buffers: the names of the buffers that this direction may have.
    """
    groups = found.get("param_groups", ())
    if not all("direction" in group for group in groups):
        kept = {key for state in found.get("state", {}).values() for key in state}
        adam = "Call load_adamw(state), which carries over what fits" if "exp_avg_sq" in kept else "Start without it"
        raise InputError(
            f"{name}.load_state_dict: this is the state of another optimizer"
            + (f", with {', '.join(sorted(kept))}" if kept else "")
            + f". {adam}"
        )
    own = set(buffers)
    for group in groups:
        for key in group["params"] if group["direction"] == "matrix" else ():
            kept = set(found["state"].get(key, {}))
            if kept - own:
                raise InputError(
                    f"{name}.load_state_dict: this is the state of another direction, with {', '.join(sorted(kept))}, "
                    f"where {name} has {', '.join(sorted(own))}. Load it into the optimizer that saved it"
                )


def warn_of_one_rate(groups: Sequence[Mapping[str, Any]], built: Sequence[float]) -> bool:
    """Warns if groups that were built with several rates all have the same now, above zero; returns whether it did."""
    rates = {group["lr"] for group in groups if isinstance(group["lr"], (int, float))}
    if len(set(built)) < 2 or len(groups) != len(built) or len(rates) > 1 or not max(rates, default=0):
        return False
    several = ", ".join(f"{rate:g}" for rate in sorted(set(built)))
    warnings.warn(
        f"all parameter groups have the rate {max(rates):g} now, but were built with {several}: what sets one rate for "
        "all sets AdamW's too. Multiply each group's own rate (LambdaLR), give a list (OneCycleLR(optimizer, "
        "[g['lr'] for g in optimizer.param_groups], …)), or build the optimizer with rest_lr equal to lr",
        GramianWarning,
        stacklevel=7,  # torch wraps a step in three functions
    )
    return True
