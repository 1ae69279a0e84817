"""Memory that is used again and again: on a CPU, a new large tensor costs a page fault for every 4 kB of it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

MOST_BYTES = 32 << 20
"""Of one buffer that is kept. A larger tensor is new each time: what is done with it costs far more."""

_POOL = threading.local()

Made = TypeVar("Made")


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """A contiguous tensor of undefined entries on the device of `like`, valid until the thread asks for `name` again.

    It must not leave the function that asked for it.
    """
    size = math.prod(shape) * dtype.itemsize
    if type(like) is not Tensor or like.device.type != "cpu" or size > MOST_BYTES:
        return torch.empty(shape, dtype=dtype, device=like.device)
    bases: dict[str, Tensor] = _POOL.__dict__.setdefault("bases", {})
    views: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = _POOL.__dict__.setdefault("views", {})
    key = name, shape, dtype
    found = views.get(key)
    if found is None:
        base = bases.get(name)
        with torch.inference_mode(False):
            if base is None or base.numel() < size:
                base = bases[name] = torch.empty(size, dtype=torch.uint8, device="cpu")
                for kept in (views, _POOL.__dict__.get("made", {})):
                    for old in [other for other in kept if other[0] == name]:
                        del kept[old]
            found = views[key] = base[:size].view(dtype).view(shape)
    return found


def arranged(
    name: str, shape: tuple[int, ...], size: int, dtype: torch.dtype, like: Tensor, make: Callable[[Tensor], Made]
) -> Made:
    """What `make` makes of a scratch tensor of so many entries, as several tensors in it: kept for each shape."""
    memory = scratch(name, (size,), dtype, like)
    if not is_kept(memory):
        return make(memory)
    kept: dict[tuple[str, tuple[int, ...], torch.dtype], Made] = _POOL.__dict__.setdefault("made", {})
    key = name, shape, dtype
    if key not in kept:
        with torch.inference_mode(False):
            kept[key] = make(memory)
    return kept[key]


def is_kept(x: Tensor) -> bool:
    """Whether a tensor that `scratch` gave will be given again."""
    return type(x) is Tensor and x.device.type == "cpu" and x.untyped_storage().nbytes() <= MOST_BYTES


def release() -> None:
    """Gives back what this thread keeps."""
    _POOL.__dict__.clear()
