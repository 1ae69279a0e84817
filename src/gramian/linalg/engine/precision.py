"""Float32 products in float32, whatever torch was told about their precision.

After `torch.set_float32_matmul_precision("medium")`, or "high" on a GPU, torch multiplies float32 matrices in bfloat16
or TensorFloat-32, where the processor has units for it. A method that counts on float32 then misses its accuracy a
thousandfold: estimates are wrong, and certified methods fail one after the other, down to the slowest in float64.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Found = TypeVar("Found")

FULL = ("ieee", "none")
"""What torch calls full precision; "none" is its default."""

_LOCK = threading.Lock()
_inside = 0
_before: list[tuple[Any, str]] = []


def _settings() -> list[Any]:
    """Where torch keeps the precision of products; an older one has no such setting for a processor."""
    found = (getattr(of, "matmul", None) for of in (torch.backends.mkldnn, torch.backends.cuda))
    return [setting for setting in found if hasattr(setting, "fp32_precision")]


@contextmanager
def full_products() -> Iterator[None]:
    """Within it float32 products are not narrowed, in any thread, since torch's setting is one for the process."""
    global _inside
    with _LOCK:
        if _inside == 0:
            _before[:] = [_raised(x) for x in _settings() if x.fp32_precision not in FULL]
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if _inside == 0:
                for setting, value in _before:
                    setting.fp32_precision = value


def _raised(setting: Any) -> tuple[Any, str]:
    """Set it to full precision; it, and what restores it: "none" where its value was inherited."""
    value = setting.fp32_precision
    setting.fp32_precision = "none"
    inherited = setting.fp32_precision == value
    setting.fp32_precision = "ieee"
    return setting, "none" if inherited else value


def in_full_precision(function: Callable[Arguments, Found]) -> Callable[Arguments, Found]:
    """The function, called within `full_products`."""

    @wraps(function)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Found:
        with full_products():
            return function(*args, **kwargs)

    return wrapper
