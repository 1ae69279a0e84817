"""Sweeping: a forward and a backward pass through a model of which one part at a time is in memory.

What goes from block to block waits on the disk, in both directions. A block is run again in the backward sweep, under
`captured`, as a small model whose loss is the inner product of its output with the gradient that came back: so its
second moments are those of one pass through the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gramian.batch import mapped, tensors
from gramian.calls import prepared
from gramian.compression.shards import OUTSIDE, Shards
from gramian.compression.spool import Spool
from gramian.errors import UnsupportedError
from gramian.objective import Objective
from gramian.recording import evaluating
from gramian.recording.onepass import captured
from gramian.statistics import Statistics

__all__ = ["Item", "Sweep"]


class _Place:
    """Where a tensor of a call belongs that waits in the spool."""

    def __init__(self, name: str) -> None:
        self.name = name


HIDDEN = _Place("hidden")
"""The place of the hidden states."""


class _Stop(Exception):
    """Ends a forward pass whose rest is not wanted."""


@dataclass(eq=False)
class Item:
    """A batch on its way through the model.

    Args:
        name: in the spool.
        batch: as it came.

    Attributes:
        calls: what each block is called with, with places for tensors.
        units: of its loss.
        loss: the sum.
    """

    name: str
    batch: Any
    calls: list[Any] = field(default_factory=list)
    units: float = 0.0
    loss: float = 0.0


@dataclass(eq=False)
class _Call:
    """A call of a part of the model, as a batch: the hidden states that enter, and the gradients that came back."""

    item: Item
    given: tuple[tuple, dict]
    hidden: Tensor
    gradients: Tensor


class Sweep:
    """A pass through a model in shards, part by part.

    Args:
        shards: the model.
        spool: where what is between the parts waits.
        objective: whose gradients go back.

    Raises:
        UnsupportedError: a block is called in another way than one after the other, with hidden states alone to
            differentiate.
    Cost: each part is loaded twice, and what is outside of the blocks three times; two forward passes and a backward
    pass for each loss. On the disk the hidden states of all batches at all blocks.
    Source: activation checkpointing (Chen et al. 1604.06174) with the segments' weights on the disk.
    """

    def __init__(self, shards: Shards, spool: Spool, objective: Objective) -> None:
        self.shards, self.spool, self.objective = shards, spool, objective
        self.in_tuple = False  # whether a block's output is the first of a tuple

    @torch.no_grad()
    def forward(self, items: Sequence[Item]) -> Iterator[str]:
        """Runs all items up to what follows the last block; yields the name of each part that is done."""
        first, *others = self.shards.blocks
        with self.shards.loaded(first) as alone, evaluating(alone):
            with self.shards.loaded(OUTSIDE) as model, evaluating(model):
                for item in items:
                    self._enter(model, item, probe=item is items[0])
            yield OUTSIDE
            self._advance(0, items)
        yield first
        for index, name in enumerate(others, 1):
            with self.shards.loaded(name) as alone, evaluating(alone):
                self._advance(index, items)
            yield name

    def outputs(self, items: Sequence[Item], generator: torch.Generator | None) -> None:
        """The loss of each item, and with a generator the gradients that its losses have at the last block's output."""
        with self.shards.loaded(OUTSIDE) as model, evaluating(model):
            for item in items:
                leaf = self.hidden(item, len(self.shards.blocks)).requires_grad_(generator is not None)
                with torch.set_grad_enabled(generator is not None):
                    output, _ = self._through(model, item, leaf)
                    loss, units = self.objective.checked(self.objective.criterion(output, item.batch))
                    item.loss, item.units = float(loss.detach()), float(units)
                    if generator is None:
                        continue
                    losses = list(self.objective.losses(output, item.batch, self.objective.fisher, generator))
                grads = [
                    torch.autograd.grad(one, leaf, retain_graph=i + 1 < len(losses))[0] if one.requires_grad else None
                    for i, one in enumerate(losses)
                ]
                self.spool.put(
                    f"{item.name}.back",
                    {"gradients": torch.stack([torch.zeros_like(leaf) if g is None else g for g in grads])},
                )

    def backward(self, items: Sequence[Item], seed: int) -> Iterator[tuple[str, nn.Module, Statistics]]:
        """The statistics of each part, from the last block to what is outside, while the part is in memory.

        Args:
            items: after `forward` and `outputs`.
            seed: of the generator that `outputs` had.
        """
        for index in reversed(range(len(self.shards.blocks))):
            name = self.shards.blocks[index]
            with self.shards.loaded(name) as alone:
                objective = Objective(
                    predict=lambda model, call, name=name: self._run(self.shards.block(name), call.given, call.hidden),
                    criterion=lambda output, call: ((output * call.gradients[0]).sum(), call.item.units),
                    fisher="sampled",
                    sampled=lambda output, call, generator: ((output * g).sum() for g in call.gradients),
                    rows=lambda call: self.objective.mask(call.item.batch),
                )
                calls = (self._call(item, index) for item in items)
                yield name, alone, self._told(captured(alone, calls, objective, onward=self._onward), items)
            for item in items:
                self.spool.drop(f"{item.name}.{index}")
        with self.shards.loaded(OUTSIDE) as model:
            drawn = torch.Generator().manual_seed(seed)
            objective = Objective(
                predict=lambda model, call: self._through(model, call.item, call.hidden),
                criterion=lambda output, call: self.objective.criterion(output[0], call.item.batch),
                fisher="sampled",
                sampled=self._outside,
                rows=lambda call: self.objective.mask(call.item.batch),
            )
            calls = (self._call(item, len(self.shards.blocks)) for item in items)
            yield OUTSIDE, model, self._told(captured(model, calls, objective, generator=drawn), items)

    def hidden(self, item: Item, index: int) -> Tensor:
        """The hidden states that enter a block, or leave the last one."""
        return self.spool.get(f"{item.name}.{index}")["hidden"]

    def _enter(self, model: nn.Module, item: Item, *, probe: bool) -> None:
        """Runs what is before the blocks, and notes what each is called with."""
        given: dict[str, Tensor] = {}
        places: dict[int, _Place] = {}
        entered: list[Tensor] = []

        def place(tensor: Tensor) -> _Place:
            if tensor is entered[0]:
                return HIDDEN
            if id(tensor) not in places:
                places[id(tensor)] = _Place(str(len(places)))
                given[places[id(tensor)].name] = tensor
            return places[id(tensor)]

        def see(index: int, args: tuple, kwargs: dict) -> Any:
            hidden = _hidden_of(args, kwargs)
            if not entered:
                entered.append(hidden)
            self._check(index, entered[0], hidden, (args, kwargs))
            if probe and index == 0:
                self.in_tuple = not isinstance(self.shards.block(self.shards.blocks[0])(*args, **kwargs), Tensor)
            item.calls.append(mapped((args, kwargs), place))
            if index + 1 == len(self.shards.blocks):
                raise _Stop
            return (hidden,) if self.in_tuple else hidden

        self.shards.run = see
        item.batch = prepared(model, item.batch)
        with torch.set_grad_enabled(probe):
            try:
                self.objective.predict(model, item.batch)
            except _Stop:
                pass
        if len(item.calls) != len(self.shards.blocks):
            raise UnsupportedError(
                f"compress: {len(item.calls)} of the {len(self.shards.blocks)} blocks of {type(self.shards.model).__name__} "
                "ran. Load it with from_pretrained, and give the model"
            )
        self.spool.put(f"{item.name}.given", given)
        self.spool.put(f"{item.name}.0", {"hidden": entered[0]})

    def _check(self, index: int, first: Tensor, hidden: Tensor, call: Any) -> None:
        what = ""
        if hidden is not first or index >= len(self.shards.blocks):
            what = "changes what goes from block to block outside of its blocks"
        elif any(t is not hidden and t.requires_grad for t in tensors(call)):
            what = "hands more to its blocks than hidden states that its gradient depends on"
        if what:
            raise UnsupportedError(
                f"compress: {type(self.shards.model).__name__} {what}, so that these cannot run one by one. Load it "
                "with from_pretrained, and give the model"
            )

    def _advance(self, index: int, items: Sequence[Item]) -> None:
        """Runs one block for all items."""
        block = self.shards.block(self.shards.blocks[index])
        for item in items:
            given = mapped(item.calls[index], lambda t: t, _filled(self.spool.get(f"{item.name}.given")))
            output = self._run(block, given, self.hidden(item, index))
            self.spool.put(f"{item.name}.{index + 1}", {"hidden": output})

    def _run(self, block: nn.Module, given: tuple[tuple, dict], hidden: Tensor) -> Tensor:
        args, kwargs = mapped(given, lambda t: t, lambda value: hidden if value is HIDDEN else value)
        output = block(*args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def _through(self, model: nn.Module, item: Item, leaving: Tensor) -> tuple[Any, Tensor]:
        """The model's output for what leaves the last block, and what enters the first."""
        entered: list[Tensor] = []

        def pass_on(index: int, args: tuple, kwargs: dict) -> Any:
            hidden = _hidden_of(args, kwargs)
            entered.append(hidden)
            hidden = leaving if index + 1 == len(self.shards.blocks) else hidden
            return (hidden,) if self.in_tuple else hidden

        self.shards.run = pass_on
        return self.objective.predict(model, item.batch), entered[0]

    def _outside(self, output: tuple[Any, Tensor], call: _Call, generator: torch.Generator) -> Iterator[Tensor]:
        """Each loss as drawn before, with what came back to the first block's input."""
        losses = self.objective.losses(output[0], call.item.batch, self.objective.fisher, generator)
        for loss, gradient in zip(losses, call.gradients, strict=True):
            yield loss + (output[1] * gradient).sum()

    def _call(self, item: Item, index: int) -> _Call:
        inside = index < len(self.shards.blocks)
        given = self.spool.get(f"{item.name}.given") if inside else {}
        call = mapped(item.calls[index], lambda t: t, _filled(given)) if inside else ((), {})
        hidden = self.hidden(item, index).requires_grad_(inside)
        return _Call(item, call, hidden, self.spool.get(f"{item.name}.back")["gradients"])

    def _onward(self, call: _Call, gradients: list[Tensor]) -> None:
        self.spool.put(f"{call.item.name}.back", {"gradients": gradients[0]})

    def _told(self, stats: Statistics, items: Sequence[Item]) -> Statistics:
        return replace(stats, fisher=self.objective.fisher, loss=sum(i.loss for i in items) / sum(i.units for i in items))


def _hidden_of(args: tuple, kwargs: dict) -> Tensor:
    found = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(found, Tensor):
        raise UnsupportedError(
            "compress: a block is not called with hidden states first, so that blocks cannot run one by one. Load the "
            "model with from_pretrained, and give that"
        )
    return found


def _filled(given: dict[str, Tensor]) -> Any:
    return lambda value: given[value.name] if isinstance(value, _Place) and value is not HIDDEN else value
