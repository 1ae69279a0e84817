"""Float32 products and convolutions in float32, whatever torch was told about their precision, and under autocast.

After `torch.set_float32_matmul_precision("medium")`, or "high" on a GPU, torch multiplies float32 matrices in bfloat16
or TensorFloat-32, where the processor has units for it; convolutions have settings of their own, on an Nvidia GPU
TensorFloat-32 by default. A method that counts on float32 then misses its accuracy a thousandfold: estimates are wrong,
and certified methods fail one after the other, down to the slowest in float64.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Found = TypeVar("Found")

FULL = ("ieee", "none")
"""What torch calls full precision; "none" is its default."""


class _Kept:
    """Settings of the process that are full precision as long as any thread needs them to be: inside the context."""

    def __init__(self, *places: tuple[Any, str]) -> None:
        found = (getattr(backend, name, None) for backend, name in places)
        # An older torch has no such setting for a processor.
        self.settings: list[Any] = [setting for setting in found if hasattr(setting, "fp32_precision")]
        self.lock, self.inside = threading.Lock(), 0
        self.before: list[tuple[Any, str]] = []

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.before = [_raised(x) for x in self.settings if x.fp32_precision not in FULL]
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                for setting, value in self.before:
                    setting.fp32_precision = value


def _raised(setting: Any) -> tuple[Any, str]:
    """Set it to full precision; it, and what restores it: "none" where its value was inherited."""
    value = setting.fp32_precision
    setting.fp32_precision = "none"
    inherited = setting.fp32_precision == value
    setting.fp32_precision = "ieee"
    return setting, "none" if inherited else value


_backends: Any = torch.backends
_PRODUCTS = _Kept((_backends.mkldnn, "matmul"), (_backends.cuda, "matmul"))
_LAYERS = _Kept(*((backend, name) for backend in (_backends.mkldnn, _backends.cudnn) for name in ("conv", "rnn")))


def full_products() -> AbstractContextManager[None]:
    """A context in which float32 products are not narrowed, in any thread, since torch's setting is of the process."""
    return _PRODUCTS


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """A context in which products on devices of that kind are in the dtype of their factors."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


@cache
def _accelerator() -> str:
    """The kind of device beside the processor, "cpu" where there is none."""
    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None else found.type


@contextmanager
def full_precision() -> Iterator[None]:
    """Like `full_products`, where a model is run to measure it: convolutions and recurrence are not narrowed either."""
    with _PRODUCTS, _LAYERS:
        yield


def in_full_precision(function: Callable[Arguments, Found]) -> Callable[Arguments, Found]:
    """The function, called within `full_products` and without autocast."""

    @wraps(function)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Found:
        with full_products(), without_autocast("cpu"), without_autocast(_accelerator()):
            return function(*args, **kwargs)

    return wrapper
