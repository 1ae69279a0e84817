"""The windows of a convolution in any number of dimensions (im2col), a bounded number at once."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["chunks_of_windows", "paddings", "patches", "windows"]

_CHUNK = 2**24
"""Elements of a chunk of windows: large enough for products at full speed, and far below a layer's memory."""


def paddings(padding: object, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[tuple[int, int]]:
    """What torch's `padding` adds before and after each dimension; of an odd sum, "same" adds the larger part after."""
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    sizes = (padding,) if isinstance(padding, int) else tuple(padding)  # type: ignore[arg-type]
    sizes = sizes * (len(kernel) if len(sizes) == 1 else 1)
    return [(size, size) for size in sizes]


def windows(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pads: list[tuple[int, int]],
    dilation: tuple[int, ...],
) -> Tensor:
    """A view (N, *positions, C, *kernel) of x (N, C, *space), padded by zeros."""
    flat = [size for pair in reversed(pads) for size in pair]
    x = F.pad(x, flat) if any(flat) else x
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(axis + 2, d * (k - 1) + 1, s)[..., ::d]
    return x.movedim(1, 1 + len(kernel))


def chunks_of_windows(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pads: list[tuple[int, int]],
    dilation: tuple[int, ...],
) -> Iterator[Tensor]:
    """The windows as rows (N·positions, C·kernel), some samples at a time."""
    num = len(kernel)
    positions = math.prod(
        max(0, (size + before + after - d * (k - 1) - 1) // s + 1)
        for size, (before, after), k, s, d in zip(x.shape[2:], pads, kernel, stride, dilation, strict=True)
    )
    each = max(1, positions * x.shape[1] * math.prod(kernel))
    for part in x.split(max(1, _CHUNK // each)):
        yield windows(part, kernel, stride, pads, dilation).flatten(0, num).flatten(1)


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """The windows of a convolution's input as rows (im2col): the rows that its matrix multiplies.

    `patches(conv, x) @ conv.weight.flatten(1).T` is the convolution without its bias, in 1, 2 or 3 dimensions.

    Args:
        module: a `Conv1d`, `Conv2d` or `Conv3d`, whose padding, stride and dilation are used.
        x: `(N, i, *space)`, or one sample without N.

    Returns: `(N·L, i·h·w)`, a row for each of the L positions.
    Raises: nothing of its own.
    Cost: memory for all windows: `h·w` times that of x at stride 1.
    Source: Chellapilla et al., High Performance Convolutional Neural Networks for Document Processing (2006), §3.

    >>> patches(nn.Conv1d(1, 1, 2), torch.tensor([[[1.0, 2.0, 3.0]]]))
    tensor([[1., 2.],
            [2., 3.]])
    """
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    num = len(module.kernel_size)
    x = x if x.ndim == num + 2 else x.unsqueeze(0)
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        pads = [(0, 0)] * num
    else:
        pads = paddings(module.padding, module.kernel_size, module.dilation)
    found = windows(x, module.kernel_size, module.stride, pads, module.dilation)
    return torch.flatten(found.flatten(0, num), 1)
