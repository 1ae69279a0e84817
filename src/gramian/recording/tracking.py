"""Tracking: which tensors of a forward pass hold the weight of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gramian.block import Block, Blocks
from gramian.recording.sides import BlockView, view_of

__all__ = ["Tracker"]

# Functions whose result is the same weight in another dtype, device or memory layout.
_COPIES = {
    getattr(Tensor, name)
    for name in ("to", "type", "float", "double", "half", "bfloat16", "type_as", "contiguous", "clone", "cpu", "cuda")
}


class Tracker:
    """Finds the block behind a tensor: a parameter, a view or copy of one, or what a parametrization makes of it.

    `other_uses` lists, by block, the functions that took its weight and are not captured.
    """

    def __init__(self, found: Blocks) -> None:
        self.blocks = found.blocks
        self.parameters = {id(b.parameter): _all_of(b) for b in found.blocks}
        self.rest = {id(r.parameter) for r in found.rest}
        # Of the current pass, by identity; the tensor is kept, so that no other gets its id.
        self.views: dict[int, tuple[Tensor, BlockView]] = {}
        self.other_uses: dict[str, set[str]] = {}

    def resolve(self, tensor: Any) -> BlockView | None:
        """The block's weight that a value holds, if any."""
        if not isinstance(tensor, Tensor):
            return None
        view = self.parameters.get(id(tensor)) or (self.views.get(id(tensor)) or (None, None))[1]
        if view is not None:
            return view
        if isinstance(tensor, nn.Parameter):
            return None if id(tensor) in self.rest else self._find(tensor)
        base = tensor._base
        whole = self.resolve(base) if base is not None else None
        if base is None or whole is None:
            return None
        view = view_of(tensor, base, whole)
        if view is None:
            self.other_uses.setdefault(whole.block.name, set()).add("a slice of it")
        return view

    def is_weight(self, value: Any) -> bool:
        """Whether a value holds a block's weight."""
        return self.resolve(value) is not None

    def follow(self, func: Callable, args: tuple, output: Tensor) -> None:
        """Tracks the output where it is a copy of a weight; any other function of one is noted in `other_uses`."""
        for arg in args:
            if not isinstance(arg, Tensor) or output is arg or not output.is_floating_point():
                continue
            view = self.resolve(arg)
            if view is None:
                continue
            if func in _COPIES or (func is torch._weight_norm and output.shape == arg.shape):
                self.views[id(output)] = (output, view)
            elif output._base is None:
                self.other_uses.setdefault(view.block.name, set()).add(getattr(func, "__name__", str(func)))

    def hold(self, tensor: Tensor, block: Block) -> BlockView:
        """Notes that a tensor holds the whole weight of a block, in this pass."""
        view = _all_of(block)
        self.views[id(tensor)] = (tensor, view)
        return view

    def reset(self) -> None:
        """Forgets the views and copies of the last forward pass."""
        self.views.clear()

    def _find(self, parameter: nn.Parameter) -> BlockView | None:
        """The block in whose place a module holds this parameter for now: FSDP2 unshards into a fresh one."""
        for block in self.blocks:
            for name, module in block.owners:
                if module._parameters.get(name.rpartition(".")[2]) is parameter:
                    return self.hold(parameter, block)
        return None


def _all_of(block: Block) -> BlockView:
    return BlockView(block, tuple(range(block.parameter.ndim)))
