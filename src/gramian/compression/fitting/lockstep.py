"""Lockstep: forward passes that stop where a layer's output is first used, and go on when they are told to."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gramian.recording.hooks import hooks
from gramian.recording.tracking import name_of, tensors_of

__all__ = ["Stop", "Walk", "watched"]

ADDS = frozenset({"add", "radd", "iadd"})
PASSES = frozenset({functional.dropout, torch.dropout, functional.dropout1d, functional.dropout2d})
"""What hands its input on where nothing is trained."""
LOOKS = frozenset({"size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point"})
"""Methods that look at a tensor's form and not at its values."""


@dataclass(eq=False)
class Stop:
    """A layer's output just before its first use.

    Args:
        name: of the layer.
        inputs: of the layer.
        outputs: the output, and copies of it that dropout made; where they are changed, the pass goes on with that.
        other: what the output is about to be added to; `None` where its first use is another.
    """

    name: str
    inputs: Tensor
    outputs: list[Tensor]
    other: Tensor | None = None


class Walk:
    """A forward pass in a thread of its own, of which one runs at a time.

    Args:
        run: the pass. Gradients and autocast are in it as they are around `Walk(run)`.
    """

    _here = threading.local()

    def __init__(self, run: Callable[[], Any]) -> None:
        self._go, self._came = threading.Semaphore(0), threading.Semaphore(0)
        self._uses = _Uses(self)
        self._error: BaseException | None = None
        self._closed = False
        self.stop: Stop | None = None
        kind = next((kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)), None)
        cast = None if kind is None else (kind, torch.get_autocast_dtype(kind))
        inside = contextvars.copy_context()
        self._thread = threading.Thread(target=lambda: inside.run(self._main, run, cast), daemon=True)
        self._thread.start()

    def advance(self) -> Stop | None:
        """Goes on to the next stop, which is returned and stays in `stop`; `None` at the end. The pass's error is
        raised here.
        """
        self.stop = None
        if self._thread.is_alive():
            self._go.release()
            self._came.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self.stop

    def close(self) -> None:
        """Ends the pass where it stands."""
        self._closed = True
        while self._thread.is_alive():
            self._go.release()
            self._thread.join(0.01)

    def _main(self, run: Callable[[], Any], cast: tuple[str, torch.dtype] | None) -> None:
        self._go.acquire()
        Walk._here.walk = self
        try:
            with torch.no_grad(), torch.autocast(*cast) if cast else nullcontext(), self._uses:
                if not self._closed:
                    run()
                self._uses.rest()
        except _Closed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.stop = None
            self._came.release()

    def _pause(self, stop: Stop) -> None:
        if self._closed:
            raise _Closed
        self.stop = stop
        self._came.release()
        self._go.acquire()
        if self._closed:
            raise _Closed


class _Closed(BaseException):
    """A pass that is not needed any more; no model's own `except Exception` keeps it."""


class _Uses(TorchFunctionMode):
    """Stops a walk before the first use of the outputs that wait."""

    def __init__(self, walk: Walk) -> None:
        super().__init__()
        self.walk = walk
        self.waiting: dict[int, Stop] = {}

    def rest(self) -> None:
        """Stops for outputs that nothing has used: they are the model's own."""
        for stop in dict.fromkeys(self.waiting.values()):
            self.walk._pause(stop)
        self.waiting.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(tensors_of((*args, *kwargs.values()))) if self.waiting else []
        used = list(dict.fromkeys(self.waiting[id(t)] for t in tensors if id(t) in self.waiting))
        if not used:
            return func(*args, **kwargs)
        name = name_of(func)
        if name in LOOKS:
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") == "__get__":  # an attribute, which is a use only if it is a tensor
            found = func(*args, **kwargs)
            if not isinstance(found, Tensor):
                return found
        if func in PASSES and len(used) == 1:
            output = func(*args, **kwargs)
            used[0].outputs.append(output)
            self.waiting[id(output)] = used[0]
            return output
        if name in ADDS and len(tensors) == 2 and len(used) == 1 and kwargs.get("alpha", 1) == 1:
            (other,) = [t for t in tensors if id(t) not in self.waiting] or [None]
            same = other is not None and other.shape == used[0].outputs[0].shape
            used[0].other = other if same else None
        for stop in used:
            for output in stop.outputs:
                self.waiting.pop(id(output), None)
            self.walk._pause(stop)
        return func(*args, **kwargs)


@contextmanager
def watched(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """A context in which walks stop at these layers' outputs.

    Args:
        layers: by name; each called with one tensor.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple, Any], None]:
        def enter(module: nn.Module, args: tuple, output: Any) -> None:
            walk: Walk | None = getattr(Walk._here, "walk", None)
            if walk is not None and args and isinstance(output, Tensor):
                walk._uses.waiting[id(output)] = Stop(name, args[0], [output])

        return enter

    with hooks([layer.register_forward_hook(hook(name), prepend=True) for name, layer in layers.items()]):
        yield
