"""Large matrices in parts of few rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

__all__ = ["cut"]


def cut(x: Tensor, size: int | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Cuts the smaller side of each matrix (K, m, n) into equal parts of `size` or fewer: (K·parts, …), and the way back.

    Where the parts cannot be equal, rows (or columns) of zeros are added, and taken away again.

    >>> import torch
    >>> parts, whole = cut(torch.ones(2, 6, 9), 4)
    >>> parts.shape, whole(parts).shape
    (torch.Size([4, 3, 9]), torch.Size([2, 6, 9]))
    """
    num, m, n = x.shape
    small = min(m, n)
    if size is None or small <= size:
        return x, lambda parts: parts
    count = math.ceil(small / size)
    rows = math.ceil(small / count)
    excess = count * rows - small
    if m <= n:
        padded = F.pad(x, (0, 0, 0, excess)) if excess else x
        return padded.reshape(num * count, rows, n), lambda parts: parts.reshape(num, count * rows, n)[:, :m]
    padded = F.pad(x, (0, excess)) if excess else x
    parts = padded.view(num, m, count, rows).transpose(1, 2).reshape(num * count, m, rows)
    return parts, lambda parts: parts.view(num, count, m, rows).transpose(1, 2).reshape(num, m, count * rows)[..., :n]
