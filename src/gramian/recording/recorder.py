"""Recording: every use of a block's weight in a forward pass, in whatever module or function it happens.

A torch function mode sees each call with its arguments. Where one of them is a block's parameter (or its transpose, a
slice, a cast), the call's `Form` says what the rows are. The inputs are added to A at once, and a tap in the graph adds
the gradient to G during the backward pass. So at most one layer's rows are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from gramian.block import Block, Blocks
from gramian.recording.accumulation import Accumulator
from gramian.recording.forms import FORMS, Form
from gramian.recording.sides import BlockView, Side, sides_of
from gramian.recording.taps import Pass, in_backward, tapped
from gramian.recording.tracking import Tracker
from gramian.recording.unfused import UNFUSED
from gramian.statistics import Site, Statistics

__all__ = ["MAX_DIM", "Recorder"]

MAX_DIM = 8192
"""Sides wider than this keep only the diagonal of their second moment: a vocabulary of 32,000 would take 8 GiB."""

NO_GRAD = "it ran without autograd: in torch.no_grad(), or checkpoint(use_reentrant=True)"


class Recorder(TorchFunctionMode):
    """Sees every use of the blocks' weights while it is entered, and adds it to `stats`.

    `current` is the forward pass that uses belong to. While it is `None`, and in a recomputation by activation
    checkpointing, nothing is recorded. Attention and recurrence run unfused even then, so that a recomputation repeats
    the computation.
    """

    def __init__(
        self,
        found: Blocks,
        stats: Statistics,
        *,
        max_dim: int = MAX_DIM,
        precision: str = "float32",
        record_without_grad: bool = True,
    ) -> None:
        super().__init__()
        self.found, self.stats = found, stats
        self.tracker = Tracker(found)
        self.accumulator = Accumulator(max_dim, precision)
        self.record_without_grad = record_without_grad
        self.current: Pass | None = None
        self.mask: Tensor | None = None
        self.leaf = torch.zeros((), requires_grad=True)
        self.running: list[str] = []  # names of the tied parameters whose modules are running, innermost last

    def begin(self, current: Pass, mask: Tensor | None = None) -> None:
        """Starts a forward pass: uses from now on belong to it. Rows outside the mask are left out of A."""
        self.current, self.mask = current, mask
        self.tracker.reset()
        self.accumulator.reset()

    def end(self) -> None:
        """Ends the forward pass: nothing is recorded from now on."""
        self.current = self.mask = None
        self.tracker.reset()
        self.accumulator.reset()

    def finish(self) -> None:
        """Completes the statistics: blocks without a use get a site with the reason, and every G its count."""
        stats = self.stats
        for block in self.found.blocks:
            stats.aliases |= dict.fromkeys(block.aliases, block.name)
            if not stats.blocks.get(block.name):
                used = ", ".join(sorted(self.tracker.other_uses.get(block.name, ())))
                reason = f"used only by {used}, which is not captured" if used else "no batch reached it"
                stats.blocks[block.name] = [Site(name=block.name, reason=reason)]
        stats.settle()
        for site in stats.sites():
            if site.G is None and not site.reason:
                site.reason = "no gradient reached it"

    @contextmanager
    def installed(self) -> Iterator[Recorder]:
        """Enters the mode, with hooks on the modules of tied and parametrized weights."""
        handles = []
        try:
            for block in self.found.blocks:
                for name, module in block.owners if block.aliases else ():
                    handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name)))
                    handles.append(module.register_forward_hook(lambda *_: _drop(self.running), always_call=True))
                if isinstance(block.module, ParametrizationList):
                    handles.append(block.module.register_forward_hook(self._parametrized(block)))
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()
            self.end()
            self.accumulator.flush()

    def _parametrized(self, block: Block) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if isinstance(output, Tensor) and output.shape == block.parameter.shape:
                self.tracker.hold(output, block)

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in UNFUSED:
            with self:
                return UNFUSED[func](*args, **kwargs)
        output = func(*args, **kwargs)
        if self.current is None or not isinstance(output, Tensor) or in_backward():
            return output
        if func in FORMS:
            form = FORMS[func](self.tracker.is_weight, *args, **kwargs)
            view = self.tracker.resolve(form.weight) if form is not None else None
            if form is not None and view is not None:
                return self._record(form, view, output, self.current)
        self.tracker.follow(func, args, output)
        return output

    def _record(self, form: Form, view: BlockView, output: Tensor, current: Pass) -> Tensor:
        """Adds the inputs of a use to A, and returns its output with a tap that will add the gradient to G."""
        if not (torch.is_grad_enabled() or self.record_without_grad):
            return output
        sides = sides_of(form, view)
        if current.dummy:  # the same graph as on the ranks that have a batch, so that the collectives match
            return output if sides is None else tapped(output, self.leaf, lambda grad: None)
        site = self._site(form, view, sides)
        site.calls += 1
        if sides is None:
            site.reason = f"its layout {view.block.layout.pattern!r} does not match its use in {form.op}"
            return output
        inputs, outputs = sides
        with torch.no_grad(), torch._C.DisableTorchFunction():
            self.accumulator.add_inputs(site, form, inputs, self.mask)
        if not torch.is_grad_enabled():
            site.reason = NO_GRAD
            return output

        def on_gradient(grad: Tensor) -> None:
            if current.accepts_gradients():
                self.accumulator.add_gradients(site, form, outputs, grad, current)

        return tapped(output, self.leaf, on_gradient)

    def _site(self, form: Form, view: BlockView, sides: tuple[Side, Side] | None) -> Site:
        """The site of a use: by the name under which the parameter was used, the operation, and the orientation."""
        names = [name for name, _ in view.block.owners]
        name = next((n for n in reversed(self.running) if n in names), names[0])
        transposed = sides is not None and sides[0].along_rows
        batch = sides[0].batch if sides is not None else ()
        sites = self.stats.blocks.setdefault(view.block.name, [])
        for site in sites:
            same = (site.name, site.op, site.transposed) == (name, form.op, transposed)
            if same and (site.A is None or site.A.batch == batch):
                return site
        sites.append(Site(name=name, op=form.op, transposed=transposed))
        return sites[-1]


def _drop(names: list[str]) -> None:
    if names:
        names.pop()
