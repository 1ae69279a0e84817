"""Targets: the layers of a model that can be factored, and for each other one the reason why not."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from gramian.block import Block, blocks
from gramian.compression.calibration.experts import expert_name, is_stack
from gramian.compression.layers.lowrank import HOOKS, LowRank
from gramian.compression.layers.modules import clean_module_name, module_name
from gramian.compression.layers.opening import inner_name
from gramian.compression.layers.quantized import Quantized
from gramian.errors import InputError, some
from gramian.layers import is_affine, layer_of, layout_of, operation_of, runs_as_its_class

__all__ = ["Target", "adapted", "by_pattern", "targets", "why_not"]


class Target(NamedTuple):
    """A layer that can be factored.

    Args:
        name: of the module.
        module: the layer, dense or factored already.
        block: of its weight; `None` for a factored layer, whose matrix is the product of two.
        inputs, outputs: the parameters at whose sites A and G of the layer are.
        dense: parameters of the weight as it is.
        rank: of a factored layer; 0 for a dense one.
        table: whether rows of the matrix are looked up.
        tied: the names of other layers with the same weight.
        entry: which matrix of a stack of experts it is; `None` for a weight of its own.
    """

    name: str
    module: nn.Module
    block: Block | None
    inputs: str
    outputs: str
    dense: int
    rank: int = 0
    table: bool = False
    tied: tuple[str, ...] = ()
    entry: int | None = None


def targets(
    model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> tuple[list[Target], dict[str, str]]:
    """The layers that can be factored, and by name of each other layer with a matrix why it is not.

    Args:
        model: any module.
        include: name patterns; only layers that match one are factored.
        exclude: name patterns of layers that stay as they are.

    Raises:
        InputError: a pattern matches no layer.
    """
    found: list[Target] = []
    reasons: dict[str, str] = {}
    factored = {id(child): low for low in model.modules() if isinstance(low, LowRank) for child in low}
    adapters = adapted(model)
    found_blocks = blocks(model)
    for block in found_blocks.blocks:
        if is_stack(block):
            why = by_pattern(block.name, include, exclude) or adapters.get(id(block.module), "")
            each = [] if why else _experts(block)
            why = why or next(filter(None, map(_unprofitable, each)), "")
            if why:
                reasons[block.name] = why
                continue
            for target in each:
                why = by_pattern(target.name, include, exclude)
                if why:
                    reasons[target.name] = why
                else:
                    found.append(target)
            continue
        low = factored.get(id(block.module))
        name = module_name(block)
        tied: tuple[str, ...] = ()
        inner = ""
        if low is None:
            others = {id(module): other.rpartition(".")[0] for other, module in block.owners}
            tied = tuple(other for key, other in others.items() if key != id(block.module))
            inner = inner_name(block.module, block.name.rpartition(".")[2])
            if inner and not tied:
                name = f"{name}.{inner}".lstrip(".")
                reason = adapters.get(id(block.module), "")
            elif tied:
                reason = _why_not_tied(block, adapters)
            else:
                reason = why_not(block) or adapters.get(id(block.module), "")
            table = operation_of(block.module).factors == "table"
            numel = block.parameter.numel()
            target = Target(name, block.module, block, block.name, block.name, numel, table=table, tied=tied)
        else:
            name = name.rpartition(".")[0]
            if block.module is low[1]:
                continue  # told with the first
            first, second = (f"{name}.{i}.weight" if name else f"{i}.weight" for i in (0, 1))
            dense = sum(low.get_parameter(f"{i}.weight").numel() for i in (0, 1))
            target = Target(name, low, None, first, second, dense, low.rank, low.is_table)
            reason = "its factors have rank 1" if low.rank == 1 else ""
            if block.aliases:
                reason = f"its factors are tied to {', '.join(block.aliases)}"
        is_bare = not inner and not type(block.module).__module__.startswith("torch.nn.")
        if reason and low is None and is_bare and not block.name.endswith(".weight"):
            name = block.name  # of a module of the user's own, which may hold several
            reason = reason.replace(f"{block.kind} is not factored", f"a parameter of {block.kind} itself", 1)
        reason = by_pattern(name, include, exclude) or reason or _unprofitable(target)
        for other in tied:
            excluded = by_pattern(other, include, exclude)
            reason = reason or (excluded and f"tied to {other}, which is {excluded}")
        if reason:
            reasons[name] = reason
        else:
            found.append(target)
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            reasons[clean_module_name(name)] = "quantized already"
    for rest in found_blocks.rest:
        wide = [size for size in rest.parameter.shape if size > 1]
        if len(wide) > 2 and not rest.elementwise:
            stack = f"a stack of {math.prod(wide[:-2])} matrices in one parameter is not factored"
            reasons[rest.name] = by_pattern(rest.name, include, exclude) or stack
    names = [name for target in found for name in (target.name, *target.tied)] + list(reasons)
    for pattern in (*(include or ()), *exclude):
        if not fnmatch.filter(names, pattern):
            raise InputError(f"compress: {pattern!r} matches no layer; names are like {some(names)}")
    return found, reasons


def _experts(block: Block) -> list[Target]:
    """The matrices of a stack, each a layer of its own once the stack is opened."""
    num = len(block.parameter)
    dense = block.parameter.numel() // num
    return [
        Target(expert_name(block.name, e), block.module, block, block.name, block.name, dense, entry=e)
        for e in range(num)
    ]


def by_pattern(name: str, include: Sequence[str] | None, exclude: Sequence[str]) -> str:
    for pattern in exclude:
        if fnmatch.fnmatchcase(name, pattern):
            return f"excluded by {pattern!r}"
    if include is not None and not any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
        return "not included"
    return ""


def _unprofitable(target: Target) -> str:
    """Told where even rank 1 is no smaller than the layer."""
    if target.block is None:
        return ""
    n = target.block.shape[-1]
    m = target.dense // n
    return "" if m + n < m * n else f"two factors of its {m} × {n} matrix are no smaller than it"


def adapted(model: nn.Module) -> dict[int, str]:
    """The reason for each layer in an adapter, or under one (PEFT's keep the layer they adapt as `base_layer`)."""
    reasons: dict[int, str] = {}
    for outer in model.modules():
        if isinstance(getattr(outer, "base_layer", None), nn.Module):
            what = f"{type(outer).__name__} adapts it: merge the adapter into the weight first (merge_and_unload)"
            reasons |= {id(inner): what for inner in outer.modules()}
    return reasons


def _why_not_tied(block: Block, adapters: dict[int, str]) -> str:
    """Why a weight with several owners is not factored: each has to be one that can be, with the same matrix."""
    layouts = set()
    for name, module in block.owners:
        alone = replace(block, owners=((name, module),))
        reason = why_not(alone) or adapters.get(id(module), "")
        if reason:
            return f"tied to {', '.join(block.aliases)}" + (f"; {reason}" if module is not block.module else "")
        layouts.add(getattr(layout_of(module), "matrices", ()))
    turned = {operation_of(m).factors for _, m in block.owners} - {"linear", "table"}
    if turned or len(layouts) > 1:
        return f"tied to {', '.join(block.aliases)}, which see it as different matrices"
    return ""


def why_not(block: Block) -> str:
    """Why a dense layer is not factored by itself; empty where it is."""
    module, kind = block.module, block.kind
    others = [name for name, owner in block.owners if owner is not module]
    tied = f"tied to {', '.join(block.aliases)}" if others else ""
    if not operation_of(module).factors or not runs_as_its_class(module):
        own = "" if layer_of(module).operation == "unknown" else _own_forward(module)
        return ", ".join(filter(None, [f"{kind} is not factored{own}", tied]))
    if not is_affine(module):
        return f"{kind} has other parameters than a weight and a bias, or a weight that is made of others"
    if tied:
        return tied
    if getattr(module, "max_norm", None) is not None:
        return "max_norm changes its rows as they are looked up"
    groups = getattr(module, "groups", 1)
    if groups > 1:
        depthwise = " (depthwise)" if block.role == "elementwise" else ""
        return f"{groups} groups{depthwise} are not factored"
    return _beyond(module)


def _own_forward(module: nn.Module) -> str:
    return "" if runs_as_its_class(module) or not operation_of(module).factors else ": its forward is its own"


def _beyond(module: nn.Module) -> str:
    """What a layer has beside a weight, a bias, options and hooks that a factored one would lose."""
    kind = type(module).__name__
    classes = type(module).__mro__
    base = next((cls for cls in classes if cls.__module__.startswith("torch.nn") and cls is not nn.Module), classes[0])
    extra = sorted(n for cls in classes if issubclass(cls, base) and cls is not base for n in vars(cls))
    extra = [name for name in extra if not name.startswith("__") and name != "forward"]  # that one was compared
    if extra:
        return f"{kind} has {some(extra)} of its own, which a factored layer would lose"
    if list(module.buffers(recurse=False)) or list(module.children()):
        return f"{kind} holds buffers or layers, which a factored layer would lose"
    kept = [name for name, value in vars(module).items() if name.endswith("_hooks") and name not in HOOKS and value]
    if kept:
        return f"it has {some(kept)}, which a factored layer would lose"
    return ""
