"""The isometry that a layer's shape and geometry allow: a random orthogonal matrix, placed in its weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gramian import random
from gramian.layers import operation_of
from gramian.layout import Layout

__all__ = ["isometry"]


def isometry(layer: nn.Module, layout: Layout, like: Tensor, generator: torch.Generator) -> Tensor:
    """A weight of `layer` under which it is as close to an isometry as its shape allows.

    A matrix, and each of a fused projection's, is orthogonal: `QᵀQ = I` or `QQᵀ = I`.

    A kernel is orthogonal over the taps that matter: along a dimension of stride one, the tap at which the output sees
    the input where it is; along a dimension with a stride, and where the padding does not cover the kernel (so that
    one tap alone would leave out the border), all taps. The matrix (out, in · taps) of each group is then scaled so
    that the mean squared singular value of the whole operation on images is one, over the smaller of its two sides:

        ‖W‖_F² = min(in · Π min(stride, taps), out)        (stride / gcd(stride, dilation) in place of stride)

    - One tap, or all taps of a kernel as long as its stride: an exact isometry (out ≥ in · taps) or a projection.
    - A kernel longer than its stride: windows overlap, and white inputs keep their energy, or each output the mean
      square of the inputs where there are fewer outputs; but it is no isometry of each single image.
    - A kernel shorter than its stride passes over inputs, which no weight can change.

    A transposed convolution is the adjoint of a convolution with the same weight, and is set as that one.

    Args:
        layer: a module whose operation has an `init` in the table of layers.
        layout: of its weight.
        like: a tensor of the weight's shape, dtype and device.
        generator: draws Q.

    Returns:
        The weight.

    Cost: a QR factorization.
    Source: delta-orthogonal: Xiao et al. (1806.05393), §3; strides: this library's own.
    """
    if operation_of(layer).init != "delta":
        if layout.rows:  # fused parts of unequal size
            parts = [_orthogonal((rows, layout.matrices[-1]), like, generator) for rows in layout.rows]
            return layout.join(torch.cat(parts).reshape(layout.matrices))
        return layout.join(_orthogonal(layout.matrices, like, generator))
    # A transposed convolution's weight is (in, out / groups, ...), as that of its adjoint.
    groups, (rows, columns, *sizes) = int(getattr(layer, "groups", 1)), like.shape
    rows //= groups
    taps = [_taps(layer, dim, size) for dim, size in enumerate(sizes)]
    num_taps = math.prod(len(chosen) for chosen in taps)
    covered = math.prod(_reach(layer, dim, len(chosen)) for dim, chosen in enumerate(taps))
    q = _orthogonal((groups, rows, columns * num_taps), like, generator)
    energy = min(columns * covered, rows) / min(columns * num_taps, rows)
    kernel = torch.zeros_like(like)
    window = (slice(None), slice(None), *(slice(chosen.start, chosen.stop) for chosen in taps))
    kernel[window] = (q if energy == 1 else math.sqrt(energy) * q).reshape(kernel[window].shape)
    return kernel


def _taps(layer: nn.Module, dim: int, size: int) -> range:
    """The taps of a kernel along one dimension that are set."""
    everything = range(size)
    if _stride(layer)[dim] > 1:
        return everything
    step = _tuple(layer, "dilation", dim + 1)[dim]
    before, after = _padding(layer, dim, size, step)
    if getattr(layer, "transposed", False):
        # Output t sees the input t + padding − tap · step, so that the outermost inputs must not be cut off.
        low, high = -(-before // step), size - 1 - -(-after // step)
    else:
        # Output t sees the input t − before + tap · step; there are n + before + after − (size − 1) · step outputs.
        low, high = size - 1 - after // step, before // step
    if low > high:
        return everything
    tap = min(max(size // 2, low), high)
    return range(tap, tap + 1)


def _reach(layer: nn.Module, dim: int, taps: int) -> int:
    """How many of `stride` inputs in a row the windows reach along a dimension."""
    stride = _stride(layer)[dim]
    return min(stride // math.gcd(stride, _tuple(layer, "dilation", dim + 1)[dim]), taps)


def _padding(layer: nn.Module, dim: int, size: int, step: int) -> tuple[int, int]:
    padding = layer.padding
    if padding == "valid":
        return 0, 0
    if padding == "same":  # torch puts the odd one behind
        total = step * (size - 1)
        return total // 2, total - total // 2
    both = _tuple(layer, "padding", dim + 1)[dim]
    return both, both


def _stride(layer: nn.Module) -> tuple[int, ...]:
    return _tuple(layer, "stride", 3)


def _tuple(layer: nn.Module, name: str, least: int) -> tuple[int, ...]:
    value = getattr(layer, name)
    return (value,) * least if isinstance(value, int) else tuple(value)


def _orthogonal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    q = random.orthogonal(*shape, generator=generator, dtype=dtype, device=generator.device)
    return q.to(like.device, like.dtype)
