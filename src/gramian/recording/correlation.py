"""The second moment of a convolution's windows, computed without the windows.

Two elements of a window at offsets k and l meet the image at two points that differ by l − k wherever the window lies.
Summed over *all* positions at which a window touches the image, the moment is therefore the image's autocorrelation
at the lag l − k. It is block Toeplitz: (2K − 1)ᵈ distinct blocks in place of K²ᵈ. By the Fourier transform it costs one
product of the channels for each frequency. The positions that the convolution does not visit lie at the border; their
windows are subtracted, and of these only the kernel elements that touch the image.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gramian.gram import Sums, power_of_two
from gramian.linalg import syrk
from gramian.linalg.engine.precision import in_full_precision
from gramian.recording.windows import windows

__all__ = ["diagonal_of_windows", "moment_of_windows", "pays"]

_PRODUCTS = 2**24
"""Elements of the products of channels at all frequencies that are in memory at once."""


def pays(shape: Sequence[int], kernel: Sequence[int], pads: Sequence[tuple[int, int]], dilation: Sequence[int]) -> bool:
    """Whether `moment_of_windows` takes fewer operations than multiplying the windows of x (N, C, *space)."""
    num, space = shape[0], shape[2:]
    size = math.prod(kernel)
    outputs = _outputs(space, kernel, pads, dilation)
    if size == 1 or not num or min(outputs) < 1:
        return False
    frequencies = math.prod(s + d * (k - 1) for s, k, d in zip(space, kernel, dilation, strict=True)) / 2
    lags = math.prod(2 * k - 1 for k in kernel)
    border = sum(d * (k - 1) * math.prod(outputs) / p for k, d, p in zip(kernel, dilation, outputs, strict=True))
    plain = 2 * num * math.prod(outputs) * size**2
    return frequencies * (8 * num + 4 * lags) + num * border * size**2 / 2 < 0.5 * plain


def diagonal_of_windows(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pads: list[tuple[int, int]],
    dilation: tuple[int, ...],
) -> Sums:
    """The sums of the squares of all windows of x (N, C, *space), (C, *kernel) each, and of the windows.

    Windows of one place are added up over the samples first. Cost: two passes over x.
    """
    x = x if x.dtype == torch.float64 else x.float()
    scale = power_of_two(x)
    x = x if scale is None else x / scale
    both = torch.stack((x.square().sum(0), x.sum(0)))
    found = windows(both, kernel, stride, pads, dilation)
    total, first = found.sum(tuple(range(1, 1 + len(kernel)))).flatten(1).double()
    return Sums(total, first, len(x) * math.prod(found.shape[1 : 1 + len(kernel)]), scale)


@in_full_precision
def moment_of_windows(
    x: Tensor,
    kernel: Sequence[int],
    pads: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Sums:
    """The sums over all windows w of x (N, C, *space), padded by zeros: w runs over (C, *kernel), at stride 1.

    Accuracy: ε log(size) ‖x‖². Cost: four multiplications for each of (size + K − 1)ᵈ / 2 frequencies and pair of
    channels, where the windows take K²ᵈ for each of sizeᵈ positions.
    """
    x = x if x.dtype == torch.float64 else x.float()
    scale = power_of_two(x)
    x = x if scale is None else x / scale
    channels, offsets = x.shape[1], list(itertools.product(*(range(k) for k in kernel)))
    correlation, lags = _autocorrelation(x, kernel, dilation)
    where = torch.tensor([[lags[tuple(b - a for a, b in zip(k, m, strict=True))] for m in offsets] for k in offsets])
    blocks = correlation[where.to(x.device)]
    total = blocks.permute(2, 0, 3, 1).reshape(channels * len(offsets), -1)
    _subtract_border(total, x, kernel, pads, dilation)
    total = (total + total.mT) / 2
    ones = (1,) * len(kernel)
    first = windows(x.sum(0, keepdim=True), tuple(kernel), ones, list(pads), tuple(dilation))
    first = first.flatten(0, len(kernel)).sum(0).flatten().double()
    return Sums(total, first, len(x) * math.prod(_outputs(x.shape[2:], kernel, pads, dilation)), scale)


def _outputs(
    space: Sequence[int], kernel: Sequence[int], pads: Sequence[tuple[int, int]], dilation: Sequence[int]
) -> list[int]:
    """The number of positions of the convolution along each dimension."""
    return [s + b + a - d * (k - 1) for s, k, (b, a), d in zip(space, kernel, pads, dilation, strict=True)]


def _autocorrelation(
    x: Tensor, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, dict[tuple[int, ...], int]]:
    """R[lag] (C, C) = Σ_n Σ_q x(q) x(q + lag·dilation)ᵀ for every lag between two offsets, and each lag's index."""
    dims = tuple(range(2, x.ndim))
    lengths = [s + d * (k - 1) for s, k, d in zip(x.shape[2:], kernel, dilation, strict=True)]
    spectrum = torch.fft.rfftn(x, lengths, dims).flatten(2).permute(2, 0, 1).contiguous()  # (frequencies, N, C)
    lags = list(itertools.product(*(range(1 - k, k) for k in kernel)))
    phase = torch.zeros((), dtype=torch.float64)
    weight = torch.ones((), dtype=torch.float64)
    for axis, (length, d) in enumerate(zip(lengths, dilation, strict=True)):
        last = axis == len(lengths) - 1
        f = torch.arange(length // 2 + 1 if last else length, dtype=torch.float64)
        tau = torch.tensor([float(lag[axis] * d) for lag in lags], dtype=torch.float64)
        phase = phase.unsqueeze(-1) + 2 * math.pi / length * (
            tau.reshape(-1, *(1,) * axis, 1) * f
        )  # (lags, frequencies of the axes so far)
        if last:  # the half of the spectrum that rfftn leaves out is the conjugate of this one
            weight = torch.where((f == 0) | (2 * f == length), 1.0, 2.0).double() / math.prod(lengths)
    wave = torch.polar(weight.expand(phase.shape), phase).flatten(1).to(spectrum.device, spectrum.dtype)
    num_channels = x.shape[1]
    found = x.new_zeros(len(lags), num_channels**2)
    each = max(1, _PRODUCTS // num_channels**2)
    for part, waves in zip(spectrum.split(each), wave.split(each, 1), strict=True):
        cross = torch.bmm(part.mH, part).flatten(1)  # conj(X_i) X_j at each frequency
        found += waves.real @ cross.real - waves.imag @ cross.imag
    return found.unflatten(1, (num_channels, num_channels)), {lag: i for i, lag in enumerate(lags)}


def _subtract_border(
    total: Tensor, x: Tensor, kernel: Sequence[int], pads: Sequence[tuple[int, int]], dilation: Sequence[int]
) -> None:
    """Subtracts from `total` the windows that touch the image at positions where the convolution has no output.

    Axis by axis: windows outside along this axis, inside along those before, anywhere along those after.
    """
    outputs = _outputs(x.shape[2:], kernel, pads, dilation)
    numbers = torch.arange(len(total), device=x.device).reshape(x.shape[1], *kernel)
    num = len(kernel)
    for axis, (size, k, (before, _), d) in enumerate(zip(x.shape[2:], kernel, pads, dilation, strict=True)):
        span = d * (k - 1)
        outside = [*range(before - span, 0), *range(outputs[axis], before + size)]
        for position in outside:
            touching = [i for i in range(k) if 0 <= position + d * i - before < size]
            if not touching:
                continue
            points = torch.tensor([position + d * i - before for i in touching], device=x.device)
            strip = x.index_select(axis + 2, points)
            all_pads = [(r, r) for r in (dilation[e] * (kernel[e] - 1) for e in range(num))]
            pad = [pads[e] if e < axis else (0, 0) if e == axis else all_pads[e] for e in range(num)]
            sizes = [len(touching) if e == axis else kernel[e] for e in range(num)]
            steps = [1 if e == axis else dilation[e] for e in range(num)]
            rows = windows(strip, tuple(sizes), (1,) * num, pad, tuple(steps)).flatten(0, num).flatten(1)
            index = numbers.index_select(axis + 1, torch.tensor(touching, device=x.device)).flatten()
            total[index.unsqueeze(1), index] -= syrk(rows)
