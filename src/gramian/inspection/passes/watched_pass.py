"""A forward pass, watched by hooks on the modules and a torch function mode.

The hooks say in which module the computation is; the mode sees the operations, also those that no module wraps:
activations, attention, residual additions, and where autograd is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.batch import mapped
from gramian.inspection.experiments.canceling_sides import canceled
from gramian.inspection.passes.batch_roles import key
from gramian.inspection.passes.current_module import Follower
from gramian.inspection.passes.gate_functions import MOVES, NEGATIONS
from gramian.inspection.passes.last_parameters import Leading
from gramian.inspection.passes.loss_inputs import ends_of, see_loss, see_pull, shifted
from gramian.inspection.passes.moments import as_moments, first_float, packed, squares, version
from gramian.inspection.passes.operations import Operations
from gramian.inspection.passes.random_draws import Draws
from gramian.inspection.passes.raw_inputs import RawData
from gramian.inspection.passes.records import Call, Cut, Ends
from gramian.inspection.passes.step_records import Observed
from gramian.operators import leaves_of
from gramian.recording.taps import in_vmap
from gramian.recording.tracking import tensors_of
from gramian.recording.unfused import UNFUSED, first_steps

__all__ = ["Watcher"]

# Operations that cut the graph and are looked into, and steps of torch's recurrences.
MOST_CUTS, MOST_STEPS = 64, 4

_MASKING = {torch.masked_fill, Tensor.masked_fill, Tensor.masked_fill_, torch.where, Tensor.where}


# What gives some of the values, or all in another shape.
_SELECTIONS = {
    Tensor.__getitem__, Tensor.gather, torch.gather, Tensor.squeeze, torch.squeeze, Tensor.unsqueeze, torch.unsqueeze,
    Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, Tensor.index_select, torch.index_select,
    Tensor.select, Tensor.take_along_dim, torch.take_along_dim,
}  # fmt: skip


class Watcher(Follower):
    """Adds what it sees of a forward pass to an `Observed`; with `careful`, it looks for the first non-finite value.

    With `live` the pass is one of the user's own: every operation runs as it is, so that the results are the same to
    the last bit, and losses are not kept.
    """

    def __init__(self, model: nn.Module, seen: Observed, *, careful: bool = False, live: bool = False) -> None:
        super().__init__(model)
        self.seen, self.careful, self.live = seen, careful, live
        self.order = 0
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.ended: tuple[Tensor, Ends] | None = None  # the last output whose values have ends
        self.bounded: dict[int, Ends] = {}  # of values of which some or all are an output with ends
        self.is_elsewhere = False  # whether the last parameter used outside the model is another network's
        held = (t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor))
        self.held = {id(t) for t in held if t.is_leaf and t.requires_grad and id(t) not in self.names}
        self.raw = RawData(self.names)
        self.measured: dict[int, tuple[int, tuple[Tensor, Tensor]]] = {}  # with the tensor's version
        self.draws = Draws(seen, self.names)
        self.operations = Operations(seen, self.names, self._read, self._squares, live=live)
        self.leading = Leading(self.names)
        seen.leading = self.leading.found if live else None
        self.alive: dict[int, ref[Tensor]] = {}  # what tables know by its id
        self.num_derivatives = 0
        self.strange: list[Tensor] = []  # kept, so that no id is used twice
        self.first_non_finite: tuple[str, str] | None = None

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Those that are followed; a live one leaves the model's own hooks to the caller, who is in one."""
        return ((name, module) for name, module in super().modules() if not self.live or module is not self.model)

    @contextmanager
    def installed(self) -> Iterator[Self]:
        """A context in which it watches."""
        try:
            with super().installed():
                yield self
        finally:
            self.alive.clear()
            self.bounded.clear()
            self.measured.clear()
            self.strange.clear()
            self.raw.clear()
            self.operations.clear()
            self.draws.clear()
            self.leading.clear()
            self.ended = None

    def entered(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            self.seen.ungraded.add(name)
        if self.live:
            self.leading.lead(tensors_of((*args, *kwargs.values())), module)
        if not name:
            self.held -= {id(t) for t in tensors_of((*args, *kwargs.values()))}
        if not name and not self.live and not self.careful:
            self.seen.passes += 1
            called = [t for t in tensors_of((*args, *kwargs.values())) if t.ndim]
            given = [t for t in called if not t.requires_grad]
            if not in_vmap():  # whose tensors have no storage
                self.seen.fed |= {key(t) for t in given}
            # What the loss differentiates by is data too, where no parameter has made it.
            self.raw.start(given + [t for t in called if t.requires_grad and self._is_of_data(t)])
        if not self.careful and isinstance(module, nn.modules.batchnorm._BatchNorm):
            given = first_float(*args, *kwargs.values())
            if given is not None and given.ndim > 1 and given.numel() > given.shape[1]:
                with torch._C.DisableTorchFunction():  # before the call, which updates the statistics
                    self._compare_statistics(name, module, given)

    def _is_of_data(self, t: Tensor) -> bool:
        return not any(leaf in self.names for leaf in (id(t), *leaves_of(t)))

    def returned(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        with torch._C.DisableTorchFunction():
            self._returned(name, module, args, kwargs, output)

    def _returned(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.seen.called.add(name)
        made = first_float(output)
        if made is None or self.careful:
            return
        self.seen.is_narrow |= made.dtype in (torch.float16, torch.bfloat16)
        if not name and self.seen.output is None:
            self.seen.output = made.detach()
            if self.ended is not None and (made is self.ended[0] or made._base is self.ended[0]):
                self.seen.ends = self.ended[1]
            found: list[Ends | None] = []
            mapped(output, lambda t: found.append(self.bounded.get(id(t))) or t if t.is_floating_point() else t)
            self.seen.output_ends = tuple(found)
        self.operations.made_by.setdefault(id(made), []).append(name)
        self._know(made)
        given = first_float(*args, *kwargs.values())
        if any(True for _ in module.children()) and not any(True for _ in module.parameters(recurse=False)):
            return
        if given is not None and given.ndim == 4:
            self.seen.image_sizes.setdefault(name, (given.shape[2], given.shape[3]))
        self.order += 1
        kind, order, versions = type(module).__name__, self.order, [version(t) for t in (made, given)]
        if "Conv" in kind or kind == "Linear":
            self.operations.is_convolutional = "Conv" in kind

        def keep(*sizes: float) -> None:
            left = [t if version(t) == v else None for t, v in zip((made, given), versions, strict=True)]
            after = as_moments(left[0], *sizes[:2])
            before = as_moments(left[1], *sizes[2:]) if given is not None else None
            self.seen.calls.append(Call(name, kind, order, before, after, made.shape))

        self._read((*self._squares(made), *(self._squares(given) if given is not None else ())), keep)

    def _read(self, scalars: Sequence[Tensor], keep: Callable[..., None]) -> None:
        """Gives `keep` the numbers of tensors on the device: now, and in a pass of the user's own in its order."""
        keep(*map(float, scalars))

    def _squares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers for the moments of a tensor, which often is one module's output and the next's input."""
        known, now = self.measured.get(id(t)), version(t)
        if known is None or known[0] != now:
            known = self.measured[id(t)] = now, squares(t)
            self._know(t)
        return known[1]

    def _know(self, t: Tensor) -> None:
        """Keeps what is known of a tensor by its id for as long as there is the tensor."""

        def forget(_: object, key: int = id(t)) -> None:
            for table in (self.alive, self.measured, self.bounded, self.operations.made_by):
                table.pop(key, None)

        if id(t) not in self.alive:
            self.alive[id(t)] = ref(t, forget)

    def _compare_statistics(self, name: str, module: nn.modules.batchnorm._BatchNorm, given: Tensor) -> None:
        """Keeps how far the stored statistics of a batch norm are from those of this batch."""
        mean, variance = module.running_mean, module.running_var
        if mean is None or variance is None:
            return
        wide = given.detach().transpose(0, 1).float()
        others, spread = tuple(range(1, wide.ndim)), (-1, *(1,) * (wide.ndim - 1))
        found_mean = wide.mean(others)
        found_variance = (wide - found_mean.view(spread)).square_().mean(others)
        if not self.live and name not in self.seen.called:
            eps = module.eps
            shift = (found_mean.square() / (found_variance + eps)).mean().sqrt()
            ratio = ((1 + eps) / (found_variance + eps)).log().abs().mean().exp()
            self.seen.initial_statistics[name] = float(shift), float(ratio)
        if module.momentum and module.num_batches_tracked is not None:  # what is left of the initial values, 0 and 1
            left = (1 - module.momentum) ** module.num_batches_tracked
            left = torch.where(module.num_batches_tracked > 0, left, 0.0)  # a count that was not kept
            found_mean, found_variance = (1 - left) * found_mean, (1 - left) * found_variance + left
        eps = module.eps
        shift = ((mean - found_mean).square() / (found_variance + eps)).mean().sqrt()
        ratio = ((variance.clamp(min=0) + eps) / (found_variance + eps)).log().abs().mean().exp()
        is_again = name in self.seen.called

        def keep(initial: float, shift: float, ratio: float) -> None:
            if initial:  # nothing was averaged yet, or the statistics were lost
                self.seen.statistics |= {name: (math.inf, math.inf)} if _is_trained(module) else {}
            elif is_again:  # on two kinds of data, say, of whose mixture the statistics are
                self.seen.statistics.pop(name, None)
            else:
                self.seen.statistics[name] = (shift, ratio)

        self._read(((mean == 0).all() & (variance == 1).all(), shift, ratio), keep)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if in_vmap():  # values cannot be read: only which parameters are used
            self._use((*args, *kwargs.values()))
            return func(*args, **kwargs)
        if func in UNFUSED and not self.live:
            with torch._C.DisableTorchFunction():  # the data as they are given, and not as steps
                self.raw.follow(self.seen, self.place, func, args, list(tensors_of((*args, *kwargs.values()))), None)
            few = None if self.careful else first_steps(func, args, kwargs, MOST_STEPS)
            if few is None:
                return self._unfused(func, *args, **kwargs)
            with torch.random.fork_rng([t.device for t in tensors_of(args[:1]) if t.is_cuda]):
                self._unfused(func, *few)
            return func(*args, **kwargs)
        if not self.careful and not self.live:
            if func is F.binary_cross_entropy_with_logits:
                self._see_ends(args[0] if args else kwargs.get("input"))
            with torch._C.DisableTorchFunction():
                see_loss(self.seen, self.place, func, args, kwargs, self.bounded.get(id(args[0])) if args else None)
                if not self.stack and not self.seen.canceled:
                    self.seen.canceled = canceled(func, args, self.model)
        given = (*args, *kwargs.values()) if self.careful and self.first_non_finite is None else None
        output = func(*args, **kwargs)
        name = self.place
        with torch._C.DisableTorchFunction():
            if given is not None and _breaks(func, given, output):
                self.first_non_finite = (name, getattr(func, "__name__", str(func)))
            if not self.careful:
                self._see(name, func, args, kwargs, output)
                if not self.live:
                    see_pull(self.seen, func, output)
        return output

    def _see_ends(self, scores: Any) -> None:
        """Keeps the function between whose ends what a loss of scores is given was made."""
        if self.ended is not None and (scores is self.ended[0] or getattr(scores, "_base", None) is self.ended[0]):
            self.seen.scores_end = self.seen.scores_end or self.ended[1]

    def _unfused(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """The same result by operations that are seen."""
        self.operations.unfused += 1
        try:
            with self:
                return UNFUSED[func](*args, **kwargs)
        finally:
            self.operations.unfused -= 1

    def _see(self, name: str, func: Any, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        self.order += 1
        given = list(tensors_of((*args, *kwargs.values())))
        self._use(given)
        for t in given:
            if isinstance(t, nn.Parameter):
                self.is_elsewhere = not self.stack and id(t) not in self.names
            is_kept = isinstance(t, nn.Parameter) or id(t) in self.held
            if is_kept and t.requires_grad and self.stack and id(t) not in self.names:
                self.seen.strangers.setdefault(id(t), (name, tuple(t.shape)))
                self.strange.append(t)
        if not self.live:
            self.raw.follow(self.seen, name, func, args, given, output)
        made = output if isinstance(output, Tensor) else None
        if func is torch.autograd.grad:
            self._differentiated(kwargs, output)
        if made is None:
            if not self.live:
                self.operations.routings.see(name, self.order, func, args, kwargs, output)
            self.operations.gating.divided(func, given, output)
            self.operations.elementwise.see(self.seen, func, args, given, output)
            return
        if not self.live:
            self.draws.see(name, self.order, func, given, made, is_loss=not self.stack)
        ends = ends_of(func, args, kwargs) or self._scaled(func, args)
        if ends is not None:
            self.ended = (made, ends)
        elif func in _SELECTIONS and given:
            ends = self.bounded.get(id(given[0]))
        elif given and made is given[0] and func not in MOVES:  # what was written into has other values
            self.bounded.pop(id(made), None)
            self.ended = None if self.ended is not None and self.ended[0] is made else self.ended
        if ends is not None and not self.live:
            self.bounded[id(made)] = ends
            self._know(made)
        if not made.requires_grad and made.ndim and any(t.requires_grad for t in given):
            self._cut(name, getattr(func, "__name__", str(func)), given)
        if made.is_nested or any(t.is_nested for t in given):
            args, kwargs, given, made = mapped((args, dict(kwargs), given, made), packed)
        self.operations.is_outside = not self.stack and not self.live
        if not self.is_elsewhere or self.stack:  # not in a discriminator, a teacher or a loss with weights of its own
            self.operations.see(name, self.order, func, args, kwargs, given, made)
        elif not self.live:
            self.operations.heads.see(func, args, kwargs, given, made)

    def _scaled(self, func: Any, args: tuple) -> Ends | None:
        """The ends of values times a number or plus one, as a tanh's times the largest action, and of negatives."""
        ends = self.bounded.get(id(args[0])) if args else None
        if ends is not None and func in NEGATIONS:
            return shifted(ends, torch.mul, -1.0)
        of_second = self.bounded.get(id(args[1])) if len(args) == 2 else None
        if ends is not None:
            return shifted(ends, func, args[1]) if len(args) == 2 else None
        return shifted(of_second, func, args[0], is_reversed=True) if of_second is not None else None

    def _differentiated(self, kwargs: Mapping[str, Any], found: Any) -> None:
        """Keeps which of the derivatives, of those that are to be differentiated again, is zero everywhere."""
        self.num_derivatives += 1
        if kwargs.get("create_graph") and all(t is None or not bool(t.any()) for t in found):
            self.seen.zero_derivatives += (self.num_derivatives,)

    def _use(self, values: Iterable[Any]) -> None:
        for t in tensors_of(values):
            if id(t) in self.names:
                self.seen.used.setdefault(self.names[id(t)], self.order)

    def _cut(self, name: str, function: str, given: list[Tensor]) -> None:
        if len(self.seen.cuts) < MOST_CUTS:
            behind = frozenset(self.names[leaf] for t in given for leaf in {id(t), *leaves_of(t)} if leaf in self.names)
            self.seen.cuts.append(Cut(name, function, self.order, behind))


def _is_trained(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether the weight and bias of a norm have values that no initialization gives."""
    if norm.weight is None or norm.bias is None:
        return False
    return len(norm.weight) > 1 and len(norm.weight.detach().unique()) > 1 and bool(norm.bias.detach().any())


def _breaks(func: Any, given: tuple, output: Any) -> bool:
    """Whether a function makes the first value that is not finite; a −∞ that hides a score is meant."""
    if not all(bool((t < math.inf).all()) for t in tensors_of(given) if t.is_floating_point()):
        return False
    if not all(bool((t < math.inf).all()) for t in tensors_of((output,)) if t.is_floating_point()):
        return True
    return func not in _MASKING and _all_finite(given) and not _all_finite((output,))


def _all_finite(values: Iterable[Any]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors_of(values) if t.is_floating_point())
