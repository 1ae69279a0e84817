"""The forward passes of a model that is watched in its training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gramian.batch import fields
from gramian.calls import unwrapped, wrappings
from gramian.inspection.passes.nonfinite_origin import Pass
from gramian.inspection.passes.signal import in_words
from gramian.inspection.passes.step_records import Observed
from gramian.inspection.passes.watched_pass import Watcher
from gramian.placement import is_sharded
from gramian.recording.taps import in_backward

__all__ = ["Forward"]


class Forward:
    """Sees the forward passes in training: what the last one was given, and all of the one that is looked at.

    A compiled model's pass is not seen from inside; the same batch is run once more, uncompiled, when `look_again` is
    called.

    Attributes:
        root: the user's own module.
        seen: of the pass that was looked at, in this step.
        failure: why modules are not seen, or empty.
        last: the last pass.
        passes: in training, since `clear()`.
        evaluations: passes in evaluation mode that can be differentiated, since `clear()`.
        is_replayed: whether the model is compiled.

    Args:
        model: as it is trained.
        begins: called before each pass in training; says whether to look at it.
        ends: called with the output, after it; `None` where nothing is to be done then.
    """

    def __init__(self, model: nn.Module, begins: Callable[[], bool], ends: Callable[[Any], None] | None) -> None:
        self.root = unwrapped(model)
        self.seen: Observed | None = None
        self.last: Pass | None = None
        self.passes = self.evaluations = 0
        self.handles: list[Any] = []
        self._begins, self._ends = begins, ends
        self._watcher: _Live | None = None
        self._inside = ExitStack()  # the hooks and the mode of the pass that is watched
        self._is_asleep = False
        entry, self.is_replayed, self.failure = _entry(model)
        if not self.failure:
            before, after = _Hook(self._before), _Hook(self._after)
            self.handles.append(entry.register_forward_pre_hook(before, with_kwargs=True))
            self.handles.append(entry.register_forward_hook(after, with_kwargs=True, always_call=True))

    def close(self) -> None:
        """Removes the hooks."""
        self._inside.close()
        for handle in self.handles:
            handle.remove()
        self.handles, self.last, self.seen, self._watcher = [], None, None, None

    def clear(self) -> None:
        """Begins the next step."""
        self.passes, self.evaluations, self.seen = 0, 0, None

    def asleep(self) -> ExitStack:
        """A context in which passes are not the user's."""
        inside = ExitStack()
        self._is_asleep = True
        inside.callback(setattr, self, "_is_asleep", False)
        return inside

    def around(self, function: Callable, again: Callable | None) -> Callable:
        """A function that makes the passes in place of the model's call."""
        for handle in self.handles:
            handle.remove()
        self.is_replayed |= hasattr(function, "_torchdynamo_orig_callable")

        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            is_counted = self._is_counted()
            if is_counted:
                self._begin(args, kwargs, None if again is None else Pass.of(args, kwargs, again))
            else:
                self.evaluations += self._is_differentiated()
            output = None
            try:
                output = function(*args, **kwargs)
            finally:
                if is_counted:
                    self._end(output)
            return output

        return watched

    def _is_counted(self) -> bool:
        """Whether a pass that begins now is the user's, in training, and no recomputation."""
        return self.root.training and self._is_differentiated()

    def _is_differentiated(self) -> bool:
        return not self._is_asleep and torch.is_grad_enabled() and not in_backward()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._is_differentiated():
            return
        if self.root.training:
            self._begin(args, kwargs, Pass.of(args, kwargs))
        else:
            self.evaluations += 1

    def _after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if (self._watcher is not None or self._ends is not None) and self._is_counted():
            self._end(output)

    def _begin(self, args: tuple, kwargs: dict[str, Any], last: Pass | None) -> None:
        self.passes += 1
        self.last = last
        is_due = self._begins()
        if is_due and not self.is_replayed and not self.failure and self.seen is None and self._watcher is None:
            self.seen = Observed()
            self._watcher = _Live(self.root, self.seen, live=True)
            self._inside.enter_context(self._watcher.installed())
            self._watcher._try(self._watcher.entering(""), self.root, args, kwargs)

    def _end(self, output: Any) -> None:
        """The pass ends with an output; with `None`, it raised, or gave nothing to differentiate."""
        watcher, self._watcher = self._watcher, None
        if output is None:
            self.seen = self.seen if watcher is None else None
            self._inside.close()
            return
        if watcher is not None:
            watcher._try(watcher.leaving(""), self.root, (), {}, output)
            self._inside.close()
            self._finish(watcher, output)
        if self._ends is not None:
            self._ends(output)

    def look_again(self) -> None:
        """Runs the last pass once more to see it, without a backward pass, if it could not be seen itself."""
        if not self.is_replayed or self.seen is not None or self.last is None or self.failure:
            return
        self.seen = Observed()
        watcher = _Live(self.root, self.seen, live=True)
        outputs: list[Any] = []

        def called(*args: Any, **kwargs: Any) -> None:
            watcher.entering("")(self.root, args, kwargs)
            outputs.append((last.call or self.root)(*args, **kwargs))
            watcher.leaving("")(self.root, args, kwargs, outputs[0])

        last = self.last
        try:
            again = Pass(last.args, last.kwargs, last.autocasts, called)
            with self.asleep(), torch.enable_grad(), again.run(self.root, watcher):
                pass
        except Exception as error:  # the user's run went well, and goes on
            watcher.failure = watcher.failure or f"running the batch again failed: {in_words(error)}"
        self._finish(watcher, outputs[0] if outputs else None)

    def _finish(self, watcher: _Live, output: Any) -> None:
        watcher._try(watcher.settle)
        self.failure = self.failure or watcher.failure
        if self.seen is not None:
            self.seen.output = None
            self.seen.loss = self.seen.first_loss = _loss_in(output)


class _Hook:
    """A hook that stays behind when its module is copied or pickled, and is no part of compiled code."""

    def __init__(self, function: Callable | None = None) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        if self.function is not None and not torch.compiler.is_compiling():
            self.function(*args)

    def __reduce__(self) -> tuple[type[_Hook], tuple]:
        return _Hook, ()


class _Live(Watcher):
    """A watcher of the user's own forward pass, which no error of ours may stop, and which waits for no device."""

    failure = ""

    def __init__(self, model: nn.Module, seen: Observed, *, careful: bool = False, live: bool = False) -> None:
        super().__init__(model, seen, careful=careful, live=live)
        self.waiting: list[tuple[Sequence[Tensor], Callable[..., None]]] = []

    def _read(self, scalars: Sequence[Tensor], keep: Callable[..., None]) -> None:
        self.waiting.append((scalars, keep))

    def settle(self) -> None:
        """Reads all numbers that wait, from each device at once."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for scalars, _ in self.waiting:
            for scalar in scalars:
                by_device.setdefault(scalar.device, []).append(scalar.float())
        read = {device: iter(torch.stack(of).tolist()) for device, of in by_device.items()}
        for scalars, keep in self.waiting:
            self._try(keep, *[next(read[scalar.device]) for scalar in scalars])
        self.waiting.clear()

    def _try(self, what: Callable, *args: Any) -> None:
        if not self.failure:
            try:
                what(*args)
            except Exception as error:
                self.failure = f"watching failed: {in_words(error)}"

    def _see(self, name: str, func: Any, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        self._try(super()._see, name, func, args, kwargs, output)

    def _returned(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._try(super()._returned, name, module, args, kwargs, output)

    def _compare_statistics(self, name: str, module: nn.modules.batchnorm._BatchNorm, given: Tensor) -> None:
        self._try(super()._compare_statistics, name, module, given)


def _entry(model: nn.Module) -> tuple[nn.Module, bool, str]:
    """The module at which passes begin and end, whether what is inside is compiled, and why it cannot be seen."""
    outer = [*wrappings(model)]
    root = outer[-1]
    modules = dict(root.named_modules())
    if isinstance(root, torch.jit.ScriptModule):
        return root, False, "the model is a ScriptModule, which takes no hooks"
    if any(map(is_sharded, root.parameters())):
        return (
            root,
            False,
            "parameters are sharded (FSDP2): skipped steps are not seen either, and numbers are of this rank's shards",
        )
    compiled = next((m for m in outer if hasattr(m, "_orig_mod")), None)
    in_place = [m for m in (*outer, *modules.values()) if getattr(m, "_compiled_call_impl", None) is not None]
    if any(m is root for m in in_place) and compiled is None:
        return root, False, "the model is compiled in place, and takes no hooks: give torch.compile(model)"
    is_compiled = compiled is not None or bool(in_place) or any(hasattr(m, "_orig_mod") for m in modules.values())
    ranks = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if is_compiled and ranks and any(isinstance(m, nn.SyncBatchNorm) for m in modules.values()):
        return root, True, "a compiled model is run again to see it, and SyncBatchNorm would wait for other ranks"
    return root if compiled is None else compiled, is_compiled, ""


def _loss_in(output: Any) -> float:
    """The loss, where the model returns it; else NaN."""
    named = fields(output)
    found = named.get("loss") if named is not None else getattr(output, "loss", output)
    return float(found.detach()) if isinstance(found, Tensor) and found.numel() == 1 else math.nan
