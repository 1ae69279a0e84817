"""The shape of batches that are broadcast. `torch.broadcast_shapes` imports sympy, which takes half a second."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch


def broadcast(*shapes: Sequence[int]) -> torch.Size | None:
    """The shape that batches broadcast to; None where they do not fit.

    >>> broadcast((3, 1), (4,)), broadcast((3,), (4,))
    (torch.Size([3, 4]), None)
    """
    found: list[int] = []
    for sizes in zip_longest(*(tuple(shape)[::-1] for shape in shapes), fillvalue=1):
        wide = [size for size in sizes if size != 1] or [1]
        if any(size != wide[0] for size in wide):
            return None
        found.append(wide[0])
    return torch.Size(found[::-1])
