"""Sweeping: a forward and a backward pass through a model of which one part at a time is in memory.

What goes from block to block waits on the disk, in both directions. A block is run again in the backward sweep, under
`captured`, as a small model whose loss is the inner product of its output with the gradient that came back: so its
second moments are those of one pass through the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gramian.batch import tensors
from gramian.calls import prepared
from gramian.compression.sharded.passing import HIDDEN, Arguments, Call, Item, Kept, filled, gradient, hidden_of
from gramian.compression.sharded.shards import OUTSIDE, Shards
from gramian.compression.sharded.spool import Spool
from gramian.errors import UnsupportedError
from gramian.objective import Fisher, Objective
from gramian.recording import evaluating
from gramian.recording.onepass import captured
from gramian.statistics import Statistics

__all__ = ["Sweep"]


class _Stop(Exception):
    """Ends a forward pass whose rest is not wanted."""


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
        self.once = objective  # of items that have a number of draws themselves
        self.in_tuple = False  # whether a block's output is the first of a tuple

    def probe(self, batch: Any) -> tuple[int, Tensor]:
        """How many bytes a pass of a batch through the first block keeps for its backward pass, and what enters it."""
        item, first = Item("probe", batch), self.shards.blocks[0]
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with self.shards.loaded(first) as alone, evaluating(alone):
            with self.shards.loaded(OUTSIDE) as model, evaluating(model):
                self._enter(model, item, probe=True)
            own = {p.untyped_storage().data_ptr() for p in alone.parameters()}
            call = self._given(item, 0)
            hidden = self.hidden(item, 0).requires_grad_(True)
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                self._run(self.shards.block(first), call, hidden)
        for name in ("given", "0"):
            self.spool.drop(f"{item.name}.{name}")
        return sum(size for place, size in kept.items() if place not in own), hidden

    @torch.no_grad()
    def forward(self, items: Sequence[Item], *, keep: bool = True) -> Iterator[str]:
        """Runs all items up to what follows the last block; yields the name of each part that is done.

        Args:
            items: new ones.
            keep: whether what enters the blocks is kept, for `backward`.
        """
        with self.shards.loaded(OUTSIDE) as model, evaluating(model):
            for item in items:
                self._enter(model, item)
        yield OUTSIDE
        for index, name in enumerate(self.shards.blocks):
            with self.shards.loaded(name) as alone, evaluating(alone):
                self._advance(index, items)
            for item in () if keep else items:
                self.spool.drop(f"{item.name}.{index}")
            yield name

    def outputs(self, items: Sequence[Item], generator: torch.Generator | None) -> None:
        """The loss of each item, and with a generator the gradients that its losses have at the last block's output."""
        with self.shards.loaded(OUTSIDE) as model, evaluating(model):
            for item in items:
                back = generator is not None and item.back
                leaf = self.hidden(item, len(self.shards.blocks)).requires_grad_(back)
                with torch.set_grad_enabled(back):
                    output, _ = self._through(model, item, leaf)
                    result = self.objective.criterion(output, item.batch)
                    loss, units = self.objective.checked(result, empty=item.draws is not None)
                    item.loss, item.units = float(loss.detach()), float(units)
                    losses = self._losses(item, output, generator) if back and item.units else []
                grads = [gradient(one, leaf, last=i + 1 == len(losses)) for i, one in enumerate(losses)]
                if back:
                    self._hand(item, len(self.shards.blocks), torch.stack(grads or [torch.zeros_like(leaf)]))

    def backward(
        self,
        items: Sequence[Item],
        extra: Sequence[Item],
        seed: int,
        asked: Mapping[str, Collection[str]],
        done: Collection[str] = (),
        after: Callable[[str], None] = lambda name: None,
    ) -> Iterator[tuple[str, nn.Module, Statistics]]:
        """The statistics of each part, from the last block to what is outside, while the part is in memory.

        Args:
            items: after `forward` and `outputs`.
            extra: more such items, which add nothing to the statistics, for `calls`.
            seed: of the generator that `outputs` had.
            asked: by part the names of its blocks that are captured; of other parts there are no statistics.
            done: parts that an earlier sweep with this spool went through, the first ones: they are left out.
            after: called with the name of each part when it is done, and all that the next one needs is in the spool.
        """
        last = len(self.shards.blocks)
        places = dict(enumerate(self.shards.blocks)) | {last: OUTSIDE}
        first = next(index for index, name in places.items() if name in asked)
        lowest = 0 if OUTSIDE in asked else first  # nothing has to go back further
        for index in (*reversed(range(lowest, last)), last):
            name = places[index]
            if name in done or (index == last and name not in asked):
                continue
            with self.shards.loaded(name) as part:
                if name in asked:
                    flags = iter([item.back for item in items])
                    options: dict[str, Any] = {"differentiates": lambda stats, flags=flags: next(flags)}
                    options["asked"] = asked[name]
                    options["generator"] = torch.Generator().manual_seed(seed)
                    options["onward"] = partial(self._onward, index) if index < last else None
                    calls = (self._call(item, index) for item in items)
                    yield name, part, self._told(captured(part, calls, self.objective_of(name), **options), items)
                for item in (*(() if name in asked else items), *extra) if index < last else ():
                    self._carry(part, item, index)
            after(name)
            for item in (*items, *extra):
                self.spool.drop(f"{item.name}.{index}")
                self.spool.drop(f"{item.name}.back.{index + 1}")

    def calls(self, items: Sequence[Item], part: str) -> Iterator[Call]:
        """Items with draws as calls of a part, one in memory at a time, for `objective_of(part, by_turn=True)`."""
        index = len(self.shards.blocks) if part == OUTSIDE else self.shards.blocks.index(part)
        return (self._call(item, index) for item in items)

    def objective_of(self, part: str, *, by_turn: bool = False) -> Objective:
        """The objective of calls of a part: the gradients that come back, times the output.

        Args:
            part: its name.
            by_turn: whether the next of a call's gradients is used at each time, and not all at once.
        """
        own = self.once if by_turn else self.objective

        def rows(call: Call) -> Tensor | None:
            return self.objective.mask(call.item.batch)

        def now(call: Call) -> Tensor:
            if not by_turn:
                return call.gradients
            call.turn += 1
            return call.gradients[call.turn - 1 : call.turn]

        if part != OUTSIDE:
            block = self.shards.block(part)
            return Objective(
                predict=lambda model, call: self._run(block, call.given, call.hidden),
                criterion=lambda output, call: (0 * output.mean(), call.item.units),  # known; that NaN comes is seen
                fisher="sampled",
                sampled=lambda output, call, generator: ((output * g).sum() for g in now(call)),
                rows=rows,
            )

        def sampled(output: tuple[Any, Tensor], call: Call, generator: torch.Generator) -> Iterator[Tensor]:
            """Each loss as it was drawn before, with what came back to the first block's input."""
            how: Fisher = "sampled" if by_turn else own.fisher
            losses = list(own.losses(output[0], call.item.batch, how, generator))
            losses = [torch.stack(losses).sum()] if by_turn else losses
            for loss, back in zip(losses, now(call), strict=True):
                yield loss + (output[1] * back).sum()

        return Objective(
            predict=lambda model, call: self._through(model, call.item, call.hidden),
            criterion=lambda output, call: self.objective.criterion(output[0], call.item.batch),
            fisher="sampled",
            sampled=sampled,
            rows=rows,
        )

    def _losses(self, item: Item, output: Any, generator: torch.Generator | None) -> list[Tensor]:
        assert generator is not None
        if item.draws is None:
            return list(self.objective.losses(output, item.batch, self.objective.fisher, generator))
        each = (self.once.losses(output, item.batch, "sampled", generator) for _ in range(item.draws))
        return [torch.stack(list(losses)).sum() for losses in each]

    def _carry(self, part: nn.Module, item: Item, index: int) -> None:
        """Hands the gradients of an item that adds nothing to statistics on to the block before."""
        if not item.back:
            return
        call = self._call(item, index)
        block = self.shards.block(self.shards.blocks[index])
        with evaluating(part), torch.enable_grad():
            output = self._run(block, call.given, call.hidden)
            losses = [(output * g).sum() for g in call.gradients]
            grads = [gradient(one, call.hidden, last=i + 1 == len(losses)) for i, one in enumerate(losses)]
        self._hand(item, index, torch.stack(grads))

    def hidden(self, item: Item, index: int) -> Tensor:
        """The hidden states that enter a block, or leave the last one."""
        return self.spool.get(f"{item.name}.{index}")["hidden"]

    def back(self, item: Item, index: int) -> Tensor:
        """The gradients of what enters a block, or leaves the last one."""
        return self.spool.get(f"{item.name}.back.{index}")["gradients"]

    def _enter(self, model: nn.Module, item: Item, *, probe: bool = False) -> None:
        """Runs what is before the blocks, and notes what each is called with."""
        kept: list[Kept] = []

        def see(index: int, args: tuple, kwargs: dict) -> Any:
            hidden = hidden_of(args, kwargs)
            if not kept:
                kept.append(Kept(hidden))
            self._check(index == len(item.calls), kept[0].hidden, hidden, (args, kwargs))
            if probe and index == 0:
                self.in_tuple = not isinstance(self.shards.block(self.shards.blocks[0])(*args, **kwargs), Tensor)
            item.calls.append(kept[0].without((args, kwargs)))
            if index + 1 == len(self.shards.blocks):
                raise _Stop
            return (hidden,) if self.in_tuple else hidden

        self.shards.run = see
        item.batch = prepared(model, item.batch)
        with torch.set_grad_enabled(probe), suppress(_Stop):
            self.objective.predict(model, item.batch)
        if len(item.calls) != len(self.shards.blocks):
            raise self._refused(f"runs {len(item.calls)} of its {len(self.shards.blocks)} blocks")
        self.spool.put(f"{item.name}.given", kept[0].tensors)
        self.spool.put(f"{item.name}.0", {"hidden": kept[0].hidden})

    def _check(self, in_order: bool, first: Tensor, hidden: Tensor, call: Any) -> None:
        what = ""
        if not in_order:
            what = "does not run its blocks once, one after the other"
        elif hidden is not first:
            what = "changes what goes from block to block outside of its blocks"
        elif any(t is not hidden and t.requires_grad for t in tensors(call)):
            what = "hands more to its blocks than hidden states that its gradient depends on"
        if what:
            raise self._refused(what)

    def _refused(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"compress: {type(self.shards.model).__name__} {what}, so that these cannot be loaded one by one. Load it "
            "with from_pretrained, and give the model"
        )

    def _advance(self, index: int, items: Sequence[Item]) -> None:
        """Runs one block for all items."""
        block = self.shards.block(self.shards.blocks[index])
        for item in items:
            output = self._run(block, self._given(item, index), self.hidden(item, index))
            self.spool.put(f"{item.name}.{index + 1}", {"hidden": output})

    def _run(self, block: nn.Module, given: Arguments, hidden: Tensor) -> Tensor:
        args, kwargs = filled(given, {HIDDEN.name: hidden})
        output = block(*args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def _through(self, model: nn.Module, item: Item, leaving: Tensor) -> tuple[Any, Tensor]:
        """The model's output for what leaves the last block, and what enters the first."""
        entered: list[Tensor] = []

        def pass_on(index: int, args: tuple, kwargs: dict) -> Any:
            hidden = hidden_of(args, kwargs)
            entered.append(hidden)
            hidden = leaving if index + 1 == len(self.shards.blocks) else hidden
            return (hidden,) if self.in_tuple else hidden

        self.shards.run = pass_on
        output = self.objective.predict(model, item.batch)
        if len(entered) != len(self.shards.blocks):
            raise self._refused("is called several times for a batch")
        return output, entered[0]

    def _call(self, item: Item, index: int) -> Call:
        inside = index < len(self.shards.blocks)
        call = self._given(item, index) if inside else ((), {})
        hidden = self.hidden(item, index).requires_grad_(inside and item.back)
        gradients = self.back(item, index + 1 if inside else 0) if item.back else torch.empty(0)
        return Call(item, call, hidden, gradients)

    def _given(self, item: Item, index: int) -> Arguments:
        """What a block is called with, the hidden states' place still empty."""
        return filled(item.calls[index], self.spool.get(f"{item.name}.given"))

    def _onward(self, index: int, call: Call, gradients: list[Tensor]) -> None:
        self._hand(call.item, index, gradients[0])

    def _hand(self, item: Item, index: int, gradients: Tensor) -> None:
        self.spool.put(f"{item.name}.back.{index}", {"gradients": gradients})

    def _told(self, stats: Statistics, items: Sequence[Item]) -> Statistics:
        back = [item for item in items if item.back]
        loss = sum(item.loss for item in back) / sum(item.units for item in back)
        return replace(stats, fisher=self.objective.fisher, loss=loss)
