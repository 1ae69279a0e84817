"""Recording: every use of a block's weight in a forward pass, whatever module or function it happens in.

A torch function mode sees each call with its arguments. Where one of them is a block's parameter (or its transpose, a
slice of it, a cast), the call's `Form` says what the rows are; the inputs are added to A at once, and a tap in the
graph adds the gradient to G when the backward pass comes by. Nothing of a layer outlives that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from gramian.block import Block, Blocks
from gramian.gram import At, DiagonalGram, Gram, sums
from gramian.recording.forms import FORMS, Form
from gramian.recording.sides import Held, Side, sides_of, view_of
from gramian.recording.unfused import UNFUSED
from gramian.statistics import Site, Statistics

__all__ = ["MAX_DIM", "Pass", "Recorder"]

MAX_DIM = 8192
"""Sides wider than this keep only the diagonal of their second moment: a vocabulary of 32,000 would take 8 GiB."""

# Functions whose result is the same weight in another dtype, device or memory layout.
_COPIES = {
    getattr(Tensor, name)
    for name in ("to", "type", "float", "double", "half", "bfloat16", "type_as", "contiguous", "clone", "cpu", "cuda")
}

NO_GRAD = "it ran without autograd: in torch.no_grad(), or checkpoint(use_reentrant=True)"


@dataclass(eq=False)
class Pass:
    """One forward pass and what its backward pass will mean.

    `factor` is how much larger the gradients that come are than those of the sum of losses: 1 where capture itself
    differentiates, and what arrives at the loss where the user does (1/units, a GradScaler's scale, 1/accumulation).
    `None`: unknown yet. `listening`: whether gradients count now; with `task`, only those of that backward pass (not a
    gradient penalty's, which comes through the same graph). A `shadow` is run for the company of other ranks, which
    wait for this one's shards: the same passes through the graph, of which nothing counts.
    """

    factor: Tensor | float | None = None
    listening: bool = True
    task: int | None = None
    units: float = 0.0
    skip_non_finite: bool = False
    overflowed: dict[tuple[int, At | None], Tensor] = field(default_factory=dict)
    shadow: bool = False


class _Tap(torch.autograd.Function):
    """The identity, which tells the gradient that passes. `leaf` makes all taps, and only them, be reached."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, leaf: Tensor, hear: Callable[[Tensor], None]) -> Tensor:
        ctx.hear = hear
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # Nothing of what is computed here is the network's: no mode of ours or the user's sees it.
        with torch._C.DisableTorchFunction():
            ctx.hear(grads[0].detach())
        return grads[0], None, None


class _Stream:
    """Adds rows to a second moment, small batches of them (a recurrent step's) together."""

    def __init__(self, gram: Gram | DiagonalGram) -> None:
        self.gram = gram
        self.waiting: list[Tensor] = []
        self.num = 0

    def add(self, rows: Tensor, count: float | None) -> None:
        if rows.shape[-2] >= self.gram.dim or isinstance(self.gram, DiagonalGram):
            self.gram.update(rows, count)
            return
        # A copy: rows may lie in a parameter's memory, which a step changes and FSDP2 frees when the layer is done.
        self.waiting.append(rows.clone())
        self.num += rows.shape[-2]
        if self.num >= self.gram.dim:
            self.flush(count)

    def flush(self, count: float | None) -> None:
        if self.waiting:
            self.gram.update(torch.cat(self.waiting, -2), count)
            self.waiting, self.num = [], 0


class Recorder(TorchFunctionMode):
    """Sees every use of the blocks' weights while it is entered, and adds it to `stats`.

    `current` is the pass that uses belong to; while it is `None` (and in a recomputation by activation checkpointing)
    nothing is recorded, though attention and recurrence run written out all the same, so that what is recomputed is
    what was computed.
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
        self.found, self.stats, self.max_dim = found, stats, max_dim
        self.precision, self.record_without_grad = precision, record_without_grad
        self.current: Pass | None = None
        self.mask: Tensor | None = None
        self.leaf = torch.zeros((), requires_grad=True)
        self.streams: dict[int, _Stream] = {}
        self.held: dict[int, tuple[Tensor, Held]] = {}
        self.owners: list[str] = []
        self.parameters = {id(b.parameter): Held(b, tuple(range(b.parameter.ndim))) for b in found.blocks}
        self.rest = {id(r.parameter) for r in found.rest}
        self.others: dict[str, set[str]] = {}
        self.latest: tuple[tuple, tuple, Tensor] | None = None
        self.queued = False

    # -- what is called --

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in UNFUSED:
            with self:
                return UNFUSED[func](*args, **kwargs)
        output = func(*args, **kwargs)
        if self.current is None or not isinstance(output, Tensor) or _in_backward():
            return output
        if func in FORMS:
            form = FORMS[func](lambda x: self._resolve(x) is not None, *args, **kwargs)
            held = self._resolve(form.weight) if form is not None else None
            if form is not None and held is not None:
                return self._use(form, held, output)
        self._follow(func, args, output)
        return output

    def _follow(self, func: Any, args: tuple, output: Tensor) -> None:
        """Copies of a weight stand for it; any other function of one is noted, as a use that is not captured."""
        for arg in args:
            if not isinstance(arg, Tensor) or output is arg or not output.is_floating_point():
                continue
            held = self._resolve(arg)
            if held is None:
                continue
            if func in _COPIES or (func is torch._weight_norm and output.shape == arg.shape):
                self.held[id(output)] = (output, held)
            elif output._base is None:
                self.others.setdefault(held.block.name, set()).add(getattr(func, "__name__", str(func)))

    def _resolve(self, tensor: Any) -> Held | None:
        """Which block's weight `tensor` holds, if any."""
        if not isinstance(tensor, Tensor):
            return None
        held = self.parameters.get(id(tensor)) or (self.held.get(id(tensor)) or (None, None))[1]
        if held is not None:
            return held
        if isinstance(tensor, nn.Parameter):
            return None if id(tensor) in self.rest else self._find(tensor)
        base = tensor._base
        whole = self._resolve(base) if base is not None else None
        if base is None or whole is None:
            return None
        held = view_of(tensor, base, whole)
        if held is None:
            self.others.setdefault(whole.block.name, set()).add("a slice of it")
        return held

    def _find(self, parameter: nn.Parameter) -> Held | None:
        """A parameter that a module holds for now in place of a block's: FSDP2 unshards into a fresh one."""
        for block in self.found.blocks:
            for name, module in block.owners:
                if module._parameters.get(name.rpartition(".")[2]) is parameter:
                    held = Held(block, tuple(range(parameter.ndim)))
                    self.held[id(parameter)] = (parameter, held)
                    return held
        return None

    # -- what is recorded --

    def _use(self, form: Form, held: Held, output: Tensor) -> Tensor:
        current = self.current
        assert current is not None
        if not (torch.is_grad_enabled() or self.record_without_grad):
            return output
        sides = sides_of(form, held)
        if current.shadow:
            return output if sides is None else self._tapped(output, lambda grad: None)
        site = self._site(form, held, sides)
        site.calls += 1
        if sides is None:
            site.reason = f"its layout {held.block.layout.pattern!r} does not go with its use in {form.op}"
            return output
        inputs, outputs = sides
        with torch.no_grad(), torch._C.DisableTorchFunction():
            self._add_inputs(site, form, inputs)
        if not torch.is_grad_enabled():
            site.reason = NO_GRAD
            return output
        device = output.device

        def hear(grad: Tensor) -> None:
            if not current.listening or current.factor is None or current.task not in (None, _task()):
                return
            rows = form.outputs(grad)
            rows = outputs.arrange(rows if rows.dtype == torch.float64 else rows.float())
            if site.G is None:
                site.G = self._moment(outputs, device)
            self._add_gradients(site, site.G, outputs.at, current, rows)

        return self._tapped(output, hear)

    def _tapped(self, output: Tensor, hear: Callable[[Tensor], None]) -> Tensor:
        base = output._base
        if base is not None and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous():
            # The product of rows under another shape (a linear layer's): tapped in place, and shaped anew. The old view
            # must go: a hook that is registered on a view whose base has since changed crashes torch.
            shape = output.shape
            return _Tap.apply(base, self.leaf, lambda grad: hear(grad.reshape(shape))).view(shape)  # type: ignore[union-attr]
        return _Tap.apply(output if base is None else output.clone(), self.leaf, hear)  # type: ignore[return-value]

    def _add_inputs(self, site: Site, form: Form, side: Side) -> None:
        if site.A is None and form.onehot:
            site.A = DiagonalGram(side.dim, device=form.weight.device)
        site.A = site.A or self._moment(side, form.weight.device)
        if form.onehot:
            for index in form.inputs(self.mask):
                site.A.update(index)
            return
        if form.moment is not None and isinstance(site.A, Gram) and side.names == side.vector and not side.at:
            site.A.add(*form.moment())
            return
        # Projections of one tensor (queries, keys and values; gate and up) share its second moment.
        key = (id(form.source), form.source._version, form.op, form.in_dims, side.key, type(site.A), id(self.mask))
        for rows in form.inputs(self.mask):
            rows = side.arrange(rows)
            if form.op != "linear" or isinstance(site.A, DiagonalGram) or rows.shape[-2] < side.dim or side.at:
                self._stream(site.A, rows, None, side.at)
                continue
            if self.latest is None or self.latest[0] != key:
                self.latest = (
                    key,
                    sums(rows, self.precision),
                    form.source,
                )  # the source is kept, so that its id stays its own
            site.A.add(*self.latest[1])

    def _add_gradients(self, site: Site, gram: Gram | DiagonalGram, at: At | None, current: Pass, rows: Tensor) -> None:
        """Adds output gradients to G, their factor taken out. Its count is set once all units are known."""
        assert current.factor is not None
        if isinstance(gram, DiagonalGram) or rows.shape[-2] < gram.dim:
            rows = rows / current.factor
            if current.skip_non_finite:
                rows = torch.where(self._overflows(site, gram, at, current, rows), 0.0, rows)
            self._stream(gram, rows, 0.0, at)
            return
        # The sums are smaller than the rows: what can be done with them is.
        total, first, _, scale = sums(rows, self.precision)
        if current.skip_non_finite:
            over = self._overflows(site, gram, at, current, first)
            total, first = torch.where(over, 0.0, total), torch.where(over, 0.0, first)
        unit = torch.as_tensor(1.0 / current.factor, dtype=torch.float64, device=first.device)
        gram.add(total, first, 0.0, unit if scale is None else scale.double() * unit, at)

    def _overflows(self, site: Site, gram: Gram | DiagonalGram, at: At | None, current: Pass, values: Tensor) -> Tensor:
        """Whether a scaled gradient overflowed: one that a GradScaler skips. It adds nothing, nor do its units.

        Where a weight is used several times in a pass (recurrent steps), nothing is added after the first overflow
        (what came before stays), and its units are left out once.
        """
        before = current.overflowed.get((id(site), at))
        bad = ~values.isfinite().all()
        over = bad if before is None else bad | before
        current.overflowed[id(site), at] = over
        units = torch.where(over if before is None else bad & ~before, current.units, 0.0).double()
        if site.skipped is None:
            site.skipped = torch.zeros_like(gram.count)
        if at is None:
            site.skipped += units
        else:
            index = torch.tensor(at.index, device=units.device)
            site.skipped.index_add_(at.axis, index, units.expand_as(site.skipped.index_select(at.axis, index)))
        return over

    def _stream(self, gram: Gram | DiagonalGram, rows: Tensor, count: float | None, at: At | None) -> None:
        if at is not None:
            gram.update(rows, count, at)
            return
        self.streams.setdefault(id(gram), _Stream(gram)).add(rows, count)
        if _in_backward() and not self.queued:
            self.queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self.flush)

    def flush(self) -> None:
        """Adds what waits for company, so that the statistics are whole."""
        self.queued = False
        gradients = {id(site.G) for site in self.stats.sites() if site.G is not None}
        for key, stream in self.streams.items():
            stream.flush(0.0 if key in gradients else None)

    def _moment(self, side: Side, device: torch.device) -> Gram | DiagonalGram:
        kind = Gram if side.dim <= self.max_dim else DiagonalGram
        return kind(side.dim, side.batch, device=device)

    def _site(self, form: Form, held: Held, sides: tuple[Side, Side] | None) -> Site:
        """The site of this use: by the name under which the parameter was reached, operation, and orientation."""
        names = [name for name, _ in held.block.owners]
        name = next((n for n in reversed(self.owners) if n in names), names[0])
        transposed = sides is not None and sides[0].rows
        batch = sides[0].batch if sides is not None else ()
        sites = self.stats.blocks.setdefault(held.block.name, [])
        for site in sites:
            same = (site.name, site.op, site.transposed) == (name, form.op, transposed)
            if same and (site.A is None or site.A.batch == batch):
                return site
        sites.append(Site(name=name, op=form.op, transposed=transposed))
        return sites[-1]

    def begin(self, current: Pass, mask: Tensor | None = None) -> None:
        """What is used from now on belongs to `current`; rows outside the mask do not count in A."""
        self.current, self.mask = current, mask
        self.held.clear()
        self.latest = None

    def end(self) -> None:
        """Nothing is recorded from now on."""
        self.current = self.mask = self.latest = None
        self.held.clear()

    def finish(self) -> None:
        """Every block has sites, those that no batch reached last, with the reason; G has its count."""
        stats = self.stats
        for block in self.found.blocks:
            stats.aliases |= dict.fromkeys(block.aliases, block.name)
            if not stats.blocks.get(block.name):
                used = ", ".join(sorted(self.others.get(block.name, ())))
                reason = f"used only by {used}, which is not captured" if used else "no batch reached it"
                stats.blocks[block.name] = [Site(name=block.name, reason=reason)]
        stats.settle()
        for site in stats.sites():
            if site.G is None and not site.reason:
                site.reason = "no gradient reached it"

    # -- which module is running, where a weight is tied --

    @contextmanager
    def installed(self) -> Iterator[Recorder]:
        """Entered, with the hooks that say which of a tied weight's modules is running, and parametrized weights."""
        handles = []
        try:
            for block in self.found.blocks:
                for name, module in block.owners if block.aliases else ():
                    handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.owners.append(name)))
                    handles.append(module.register_forward_hook(lambda *_: _drop(self.owners), always_call=True))
                if isinstance(block.module, ParametrizationList):
                    handles.append(block.module.register_forward_hook(self._parametrized(block)))
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()
            self.end()
            self.flush()

    def _parametrized(self, block: Block) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if isinstance(output, Tensor) and output.shape == block.parameter.shape:
                self.held[id(output)] = (output, Held(block, tuple(range(output.ndim))))

        return hook


def _drop(names: list[str]) -> None:
    if names:
        names.pop()


def _task() -> int:
    """The number of the backward pass that is running; -1 outside of any."""
    return torch._C._current_graph_task_id()


def _in_backward() -> bool:
    return _task() != -1
