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
from gramian.layers.lookup import is_lazy
from gramian.recording.accumulation import Accumulator
from gramian.recording.forms import Form, read
from gramian.recording.joined_weights import uses_of_parts
from gramian.recording.layout_sides import BlockView, Side, sides_of
from gramian.recording.padding import Padding
from gramian.recording.stacks import uses_of
from gramian.recording.taps import Pass, in_backward, in_vmap, tapped
from gramian.recording.tracking import Tracker, acts_by_rows, name_of, tensors_of
from gramian.recording.unfused import UNFUSED, cells_hidden
from gramian.site import Site
from gramian.statistics import Statistics

__all__ = ["MAX_DIM", "Recorder"]

MAX_DIM = 8192
"""Sides wider than this keep only the diagonal of their second moment: a vocabulary of 32,000 would take 8 GiB."""

NO_GRAD = "it ran without autograd: in torch.no_grad(), or checkpoint(use_reentrant=True)"
INFERENCE = "it ran in torch.inference_mode(), whose Inference tensors have no gradient"
VMAP = "it ran inside torch.vmap, where values cannot be read"
NOT_REACHED = "no gradient reached it"
WITHOUT_AUTOGRAD = frozenset({NO_GRAD, INFERENCE, NOT_REACHED})
"""The reasons of sites that have no G because no gradient came, and not because their use was not understood."""


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
        self.padding = Padding()
        self.leaf = torch.zeros((), requires_grad=True)
        self.running: list[str] = []  # names of the tied parameters whose modules are running, innermost last
        self.paused = 0  # parametrizations that are being computed
        self.failed: list[tuple[Site, str]] = []
        self.sides: dict[tuple, tuple[Side, Side] | None] = {}  # of uses like those before, of a recurrence, say

    def begin(self, current: Pass, mask: Tensor | None = None) -> None:
        """Starts a forward pass: uses from now on belong to it. Rows outside the mask are left out of A."""
        self.current, self.padding = current, Padding(mask)
        self.tracker.reset()
        self.accumulator.reset()

    def end(self) -> None:
        """Ends the forward pass: nothing is recorded from now on."""
        self.current, self.padding = None, Padding()
        self.paused = 0
        self.tracker.reset()
        self.accumulator.reset()

    def finish(self) -> None:
        """Completes the statistics: blocks without a use get a site with the reason, and every G its count."""
        stats = self.stats
        for block in self.found.blocks:
            stats.aliases |= dict.fromkeys(block.aliases, block.name)
            stats.parameters[block.name] = block.parameter.numel()
            others = self.tracker.other_uses.get(block.name, {})
            with_data = sorted(name for name, fixed in others.items() if not fixed)
            if with_data:
                stats.other_uses[block.name] = with_data
            if not stats.blocks.get(block.name):
                used = ", ".join(sorted(others))
                reason = f"used only by {used}, which is not captured" if used else "no batch reached it"
                stats.blocks[block.name] = [Site(name=block.name, reason=reason)]
        for other in self.found.rest:
            known = other.elementwise or is_lazy(other.parameter)
            if not known and sum(size > 1 for size in other.parameter.shape) > 1:  # else a vector, whatever its shape
                stats.parameters[other.name] = other.parameter.numel()
        for site, reason in self.failed:  # its sums lack rows
            site.A, site.G, site.reason = None, None, reason
        stats.settle()
        for site in stats.sites():
            if site.G is None and not site.reason:
                site.reason = NOT_REACHED

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
                    handles.append(block.module.register_forward_pre_hook(self._pause))
                    handles.append(block.module.register_forward_hook(self._parametrized(block), always_call=True))
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()
            self.end()
            self.accumulator.flush()

    def _pause(self, *_: Any) -> None:
        self.paused += 1

    def _parametrized(self, block: Block) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            self.paused -= 1
            if isinstance(output, Tensor) and output.shape == block.parameter.shape:
                self.tracker.hold(output, block)

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in UNFUSED:
            with self, cells_hidden():
                return UNFUSED[func](*args, **kwargs)
        output = func(*args, **kwargs)
        if self.current is None or self.paused or in_backward():
            return output
        tensors = list(tensors_of((*args, *kwargs.values())))
        tracker = self.tracker
        held, loose, fixed = tracker.held(tensors), tracker.joined(tensors), all(map(tracker.is_fixed, tensors))
        uses: list[tuple[Form, BlockView]] = []
        used: set[int] = set()
        if (held or loose) and isinstance(output, Tensor):
            for form in read(func, tracker.is_weight, args, kwargs):
                found = self._uses(form, fixed)
                used |= {id(form.weight)} if found else set()
                uses += found
            if uses:
                output = self._record(uses, output, self.current, in_place=any(output is t for t in tensors))
        others, loose = [one for one in held if id(one.tensor) not in used], [t for t in loose if id(t) not in used]
        name = name_of(func) + (", as an input" if uses else "")
        self.padding.follow(func, args, kwargs, tensors, output, by_rows=bool(uses) or acts_by_rows(func))
        tracker.follow(func, name, args, kwargs, tensors, others, loose, fixed, output)
        return output

    def _uses(self, form: Form, fixed: bool) -> list[tuple[Form, BlockView]]:
        """The uses in a product: of one matrix, of those of a stack, or of weights put together."""
        view, whole = self.tracker.resolve(form.weight), self.tracker.join(form.weight)
        parts = [] if whole is None else uses_of_parts(form, whole)
        parts = parts if view is None else [(form, view)]
        return [use for part, one in parts if not _is_no_use(form, one, fixed) for use in uses_of(part, one)]

    def _record(self, uses: list[tuple[Form, BlockView]], output: Tensor, current: Pass, *, in_place: bool) -> Tensor:
        """Adds the inputs of a call's uses to A, and returns its output with a tap that will add the gradient to G."""
        if not (torch.is_grad_enabled() or self.record_without_grad):
            return output
        found = [(form, view, self._sides_of(form, view)) for form, view in uses]
        if in_vmap():
            for form, view, sides in found:
                site = self._site(form, view, sides)
                site.calls, site.reason = site.calls + 1, VMAP
            return output
        if current.dummy:  # the same graph as on the ranks that have a batch, so that the collectives match
            known = any(sides is not None for *_, sides in found)
            return tapped(output, self.leaf, lambda grad: None, in_place=in_place) if known else output
        called: list[Site] = []
        waiting: list[tuple[Site, Form, Side]] = []
        for form, view, sides in found:
            site = self._site(form, view, sides)
            if not any(site is one for one in called):
                called.append(site)
                site.calls += 1
            if sides is None:
                site.reason = f"its layout {view.block.layout.pattern!r} does not match its use in {form.op}"
                continue
            with self._noting(site, form), torch.no_grad(), torch._C.DisableTorchFunction():
                self.accumulator.add_inputs(site, form, sides[0], self.padding.of(form))
                if self.padding.is_missed(form, view.part is not None):
                    self.stats.padded.setdefault(view.block.name, form.op)
            waiting.append((site, form, sides[1]))
            if not torch.is_grad_enabled():
                site.reason = INFERENCE if torch.is_inference_mode_enabled() else NO_GRAD
        if not waiting or not torch.is_grad_enabled():
            return output

        def on_gradient(grad: Tensor) -> None:
            if current.accepts_gradients():
                for site, form, side in waiting:
                    with self._noting(site, form):
                        self.accumulator.add_gradients(site, form, side, grad, current)

        return tapped(output, self.leaf, on_gradient, in_place=in_place)

    def _sides_of(self, form: Form, view: BlockView) -> tuple[Side, Side] | None:
        key = id(view.block), view.dims, view.part, form.in_dims, form.out_dims, form.groups, form.onehot
        if key not in self.sides:
            self.sides[key] = sides_of(form, view)
        return self.sides[key]

    @contextmanager
    def _noting(self, site: Site, form: Form) -> Iterator[None]:
        """A context in which an error becomes the site's reason: it must not reach the user's model."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            line = (str(error).splitlines() or [""])[0]
            self.failed.append((site, f"its use in {form.op} was not understood: {type(error).__name__}: {line}"))

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


def _is_no_use(form: Form, view: BlockView, fixed: bool) -> bool:
    """Whether a product or lookup is no use of a layer: it measures the weight, or permutes its rows.

    The product of a weight with a fixed vector is a step towards its norm (spectral_norm); rows by index are looked up
    in a table, and of any other matrix they are rearranged.
    """
    vector = form.source.ndim == 1 and form.source.is_floating_point()
    return (fixed and vector) or (form.op == "indexing" and view.block.role != "embedding")


def _drop(names: list[str]) -> None:
    if names:
        names.pop()
