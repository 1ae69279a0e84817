"""Tracking: which tensors of a forward pass hold the weight of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.block import Block, Blocks
from gramian.recording.joined_weights import JOINS, Joined, joined, of_view
from gramian.recording.layout_sides import BlockView, view_of

__all__ = ["Held", "Tracker", "acts_by_rows", "name_of", "tensors_of"]

# Functions whose result is the same weight in another dtype, device or memory layout, or the weight that is applied:
# scaled, rounded, with some entries dropped.
_COPIES: set[Callable] = {
    getattr(Tensor, name)
    for name in (
        *("to", "type", "float", "double", "half", "bfloat16", "type_as", "contiguous", "clone", "cpu", "cuda"),
        "detach",
    )
} | {
    *(torch.clone, torch.detach, torch._weight_norm, F.dropout, torch.dropout, F.normalize, torch.renorm),
    *(torch.fake_quantize_per_tensor_affine, torch.fake_quantize_per_channel_affine),
    Tensor.data.__get__,  # type: ignore[attr-defined]
}
# Functions whose result is a weight in standardized form (NFNet, weight standardization), if no data enters.
_NORMALIZERS: set[Callable] = {
    *(F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm),
    *(torch.batch_norm, torch.layer_norm, torch.group_norm, torch.instance_norm, torch.rms_norm),
}
_BY_ROWS: set[Callable] = {F.dropout, F.layer_norm, F.rms_norm, F.softmax, torch.softmax, Tensor.softmax, Tensor.to}
_SELECTS = {Tensor.__getitem__, Tensor.index_select, torch.index_select}
_OPERATORS = {"truediv": "div", "rtruediv": "div", "rdiv": "div", "rmul": "mul", "radd": "add", "idiv": "div"}


class Held(NamedTuple):
    """What a tensor has of a block: `view` says which of its matrices, or is `None` for a slice or another shape."""

    tensor: Tensor
    block: Block
    view: BlockView | None


class Tracker:
    """Finds the block behind a tensor: a parameter, a view or copy of one, or what a parametrization makes of it.

    A product, sum or other elementwise function of a weight and of tensors that no data enters (a scale, a mask, a
    norm of the weight) is the weight that is applied, and tracked in its place. `other_uses` lists, by block, the
    functions that took its weight and are not captured, and whether their other arguments were fixed: no data.
    """

    def __init__(self, found: Blocks) -> None:
        self.blocks = found.blocks
        self.parameters = {id(b.parameter): _all_of(b) for b in found.blocks}
        self.rest = {id(r.parameter) for r in found.rest}
        modules = {module for b in found.blocks for _, module in b.owners}
        self.buffers = {id(t): t for m in modules for t in m._buffers.values() if t is not None}
        # Of the current pass, by identity; the tensor is kept, so that no other gets its id.
        self.views: dict[int, tuple[Tensor, BlockView]] = {}
        self.fixed: dict[int, Tensor] = {}  # what no data enters
        self.joins: dict[int, Joined] = {}  # weights put together
        # The weight that is applied, in another shape: with the shape that it takes again, and what it holds then.
        self.reshaped: dict[int, tuple[Tensor, torch.Size, BlockView]] = {}
        self.other_uses: dict[str, dict[str, bool]] = {}

    def held(self, tensors: Iterable[Tensor]) -> list[Held]:
        """Those of some tensors that hold a block, or a part of one."""
        found = []
        for tensor in tensors:
            view, base = self.resolve(tensor), tensor._base
            whole = view if view is not None or base is None else self.resolve(base)
            if whole is None and (other := self.reshaped.get(id(tensor if base is None else base))) is not None:
                whole = other[2]
            if whole is not None:
                found.append(Held(tensor, whole.block, view))
        return found

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
        if base is None:
            return None
        _, shape, again = self.reshaped.get(id(base), (None, None, None))
        if again is not None:
            return again if tensor.shape == shape and _is_reshape(tensor, base) else None
        whole = self.resolve(base)
        return None if whole is None else view_of(tensor, base, whole)

    def join(self, tensor: Any) -> Joined | None:
        """The weights that were put together in a tensor, if any."""
        found = self.joins.get(id(tensor))
        if found is None and isinstance(tensor, Tensor) and (whole := self.joins.get(id(tensor._base))) is not None:
            return of_view(tensor, whole)
        return found

    def joined(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Those of some tensors that are weights put together, or a part of such."""
        return [t for t in tensors if id(t) in self.joins or id(t._base) in self.joins] if self.joins else []

    def is_weight(self, value: Any) -> bool:
        """Whether a value holds a block's weight, or several."""
        return self.resolve(value) is not None or self.join(value) is not None

    def is_fixed(self, tensor: Tensor) -> bool:
        """Whether no data enters a tensor: a parameter, a buffer of a layer, a number, or a function of such alone."""
        base = tensor if tensor._base is None else tensor._base
        if isinstance(base, nn.Parameter) or id(base) in self.fixed or id(base) in self.views:
            return True
        return id(base) in self.buffers or (tensor.ndim == 0 and not tensor.requires_grad)

    def follow(
        self,
        func: Callable,
        name: str,
        args: tuple,
        kwargs: Mapping[str, Any],
        tensors: list[Tensor],
        others: list[Held],
        loose: list[Tensor],
        fixed: bool,
        output: Any,
    ) -> None:
        """Tracks the output where it is the weight in another form; any other function of one is noted by its name.

        `tensors` are all that the function was given; `others` those of them whose use was not captured, and `loose`
        the same of weights put together.
        """
        made = list(tensors_of((output,)))
        for t in made:
            if fixed and tensors:
                self.fixed[id(t)] = t
            elif self.fixed or self.views:  # data was written into it
                base = t if t._base is None else t._base
                self.fixed.pop(id(base), None)
        made = [t for t in made if t.is_floating_point()]
        whole = None
        if fixed and others and func in JOINS:
            whole = joined(func, name, args, kwargs, self.resolve, made[0])
            if whole is not None:
                self.joins[id(made[0])] = whole
        copied = False
        for held in others:
            if not made or all(_is_view_of(t, held.tensor) for t in made) or (whole and held.view is not None):
                continue  # a view is found by its base
            if any(t is held.tensor for t in made):
                if not fixed and self.views.pop(id(held.tensor), None) is not None:
                    self.note(held, name, fixed)
                continue
            if not copied and self._follow_form(func, args, held, fixed, made[0]):
                copied = True
                continue
            self.note(held, name, fixed)
        for tensor in loose:
            self._follow_joined(func, tensor, fixed, made)

    def _follow_form(self, func: Callable, args: tuple, held: Held, fixed: bool, output: Tensor) -> bool:
        """Tracks the output of a function of a weight, if it can be applied in the weight's place."""
        if held.view is not None:
            view = self._in_another_form(func, args, held, fixed, output)
            if view is not None:
                self.views[id(output)] = (output, view)
            return view is not None
        tensor, base = held.tensor, held.tensor._base
        _, shape, view = self.reshaped.get(id(tensor), (None, None, None))
        if view is None and base is not None and _is_reshape(tensor, base):
            shape, view = base.shape, self.resolve(base)
        if view is None or shape is None or not fixed or not _keeps(func, args, tensor, output):
            return False
        self.reshaped[id(output)] = (output, shape, view)
        return True

    def _follow_joined(self, func: Callable, tensor: Tensor, fixed: bool, made: list[Tensor]) -> None:
        """The same for weights put together; what is not captured is noted by the function that did so."""
        if not made or all(_is_view_of(t, tensor) for t in made):
            return
        whole = self.join(tensor)
        if whole is not None and fixed and _keeps(func, (tensor,), tensor, made[0]):
            self.joins[id(made[0])] = replace(whole, tensor=made[0])
            return
        whole = whole or self.joins[id(tensor if tensor._base is None else tensor._base)]
        for _, _, view in whole.views():
            self.note(Held(tensor, view.block, view), whole.name, fixed)

    def note(self, held: Held, name: str, fixed: bool) -> None:
        """Notes a use that is not captured."""
        if held.view is None:
            name = f"{name} (of a slice or reshape of it)"
        uses = self.other_uses.setdefault(held.block.name, {})
        uses[name] = uses.get(name, True) and fixed

    def hold(self, tensor: Tensor, block: Block) -> BlockView:
        """Notes that a tensor holds the whole weight of a block, in this pass."""
        view = _all_of(block)
        self.views[id(tensor)] = (tensor, view)
        return view

    def reset(self) -> None:
        """Forgets the views and copies of the last forward pass."""
        self.views.clear()
        self.fixed.clear()
        self.joins.clear()
        self.reshaped.clear()

    def _in_another_form(
        self, func: Callable, args: tuple, held: Held, fixed: bool, output: Tensor
    ) -> BlockView | None:
        """What the output of a function of a weight holds of its block, if it can be applied in the weight's place."""
        view = held.view
        assert view is not None
        if _keeps(func, args, held.tensor, output) and (fixed or func in _COPIES):
            return view
        index = _selection(func, args, held.tensor)
        stacked = view.dims[0] == 0 and view.index is None and view.part is None and held.tensor.ndim > 2
        return replace(view, index=index % len(held.tensor)) if index is not None and stacked else None

    def _find(self, parameter: nn.Parameter) -> BlockView | None:
        """The block in whose place a module holds this parameter for now: FSDP2 unshards into a fresh one."""
        for block in self.blocks:
            for name, module in block.owners:
                if module._parameters.get(name.rpartition(".")[2]) is parameter:
                    return self.hold(parameter, block)
        return None


def tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among some values, and in the lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(value)


def name_of(func: Any) -> str:
    """The name of a function of torch, as a user writes it."""
    name = getattr(func, "__name__", str(func))
    if name == "__getitem__":
        return "indexing"
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name.strip("_").replace("linalg_", "linalg.")


def _all_of(block: Block) -> BlockView:
    return BlockView(block, tuple(range(block.parameter.ndim)))


def _is_reshape(tensor: Tensor, base: Tensor) -> bool:
    """Whether a view has all entries of its base, in their order."""
    return tensor.numel() == base.numel() and tensor.is_contiguous() and base.is_contiguous()


def _keeps(func: Callable, args: tuple, weight: Tensor, output: Tensor) -> bool:
    """Whether a function of a weight, and of what no data enters, gives a weight with its entries at their places."""
    if output.shape != weight.shape:
        return False
    return func in _COPIES or _is_elementwise(func) or (func in _NORMALIZERS and bool(args) and args[0] is weight)


def _is_view_of(tensor: Tensor, other: Tensor) -> bool:
    return tensor._base is not None and tensor._base is (other if other._base is None else other._base)


@cache
def _is_elementwise(func: Callable) -> bool:
    """Whether a function acts entry by entry, as torch's own table of operators says."""
    name = name_of(func)
    packet = getattr(torch.ops.aten, _OPERATORS.get(name, name), None)
    overloads = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


def acts_by_rows(func: Callable) -> bool:
    """Whether a function acts on each row of a matrix alone: entry by entry, or a norm over the last dimension."""
    return func in _BY_ROWS or _is_elementwise(func)


def _selection(func: Callable, args: tuple, weight: Tensor) -> Tensor | None:
    """The index by which a call selects matrices along the first dimension of a stack; `None` for any other call."""
    if func not in _SELECTS or len(args) < 2 or args[0] is not weight:
        return None
    index = args[1] if func is Tensor.__getitem__ else args[2] if len(args) > 2 and args[1] == 0 else None
    whole = isinstance(index, Tensor) and index.ndim == 1 and index.dtype in (torch.int32, torch.int64)
    return index if whole else None
