"""The operator norm of a convolution, from the convolution itself at a stated input size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from gramian.errors import InputError, ShapeError
from gramian.linalg.engine import krylov
from gramian.linalg.engine.precision import full_precision

__all__ = ["conv_norm", "conv_norm_circular", "conv_norms"]

STEPS, LEAST_STEPS, TOLERANCE = 60, 6, 5e-3
# Places of an image up to which they are the rows of products, and not the columns.
FEW = 8


@torch.no_grad()
def conv_norm(
    kernel: Float[Tensor, "o i h w"],
    size: tuple[int, int],
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = "same",
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> tuple[float, float]:
    """Return the largest singular value of a zero-padded convolution on images of a given size, and its error.

    Lanczos on CᵀC, C being the convolution as a linear map from (in, *size) images. The norm of the reshaped kernel is
    another number: up to √(h w) times smaller.

    Args:
        kernel: `(out, in / groups, h, w)`.
        size: height and width of the input.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`.

    Returns: the value, and the error that the residual of its Ritz pair implies.

    Raises:
        ShapeError: the kernel does not have four axes, or is larger than the padded input.
        InputError: "same" padding with a stride.

    Cost: some 15 to 60 convolutions and as many transposed ones. Accuracy: the value is never above the norm but for
    rounding, and some singular value is within the error; stops at 0.5 %.

    Source: Golub & Van Loan, Matrix Computations, §10.1; for circular padding Sedghi et al. 1805.10408.

    >>> round(conv_norm(torch.ones(1, 1, 1, 1) * 3, (5, 5))[0], 5)
    3.0
    """
    if kernel.ndim != 4:
        raise ShapeError(f"conv_norm: expected a kernel (o, i, h, w), got {tuple(kernel.shape)}")
    return conv_norms([kernel], size, stride=stride, padding=padding, dilation=dilation, groups=groups)[0]


@torch.no_grad()
def conv_norms(
    kernels: Sequence[Tensor],
    size: tuple[int, int],
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = "same",
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> list[tuple[float, float]]:
    """`conv_norm` of several kernels of one shape, as the groups of one convolution.

    Args:
        kernels: each as `conv_norm` takes it.
        size, stride, padding, dilation, groups: as there, the same for all.
    """
    if padding == "same" and stride not in (1, (1, 1)):
        raise InputError("conv_norm: padding 'same' needs stride 1, as in torch; give the padding in pixels")
    largest = [float(kernel.abs().max()) if kernel.numel() else 0.0 for kernel in kernels]
    found = [(size, 0.0) for size in largest]
    places = [i for i, value in enumerate(largest) if 0 < value < math.inf]
    if not places:
        return found
    units = [2.0 ** math.frexp(largest[i])[1] for i in places]
    weight = torch.stack([(kernels[i].double() / unit).float() for i, unit in zip(places, units, strict=True)])
    num, spread, sides = len(places), _pair(dilation), tuple(weight.shape[-2:])
    pads = [_pads(padding, i, sides[i], spread[i]) for i in (1, 0)]  # of the last dimension first
    padded = (size[0] + sum(pads[1]), size[1] + sum(pads[0]))
    products = weight.view(num * groups, -1, math.prod(weight.shape[2:]))  # with rows of patches
    turned = products.mT.contiguous()
    channels, options = weight.shape[2] * groups, {"dilation": spread, "stride": _pair(stride)}
    (left, _), (top, _) = pads

    def gram(x: Tensor) -> Tensor:
        image = functional.pad(x.reshape(num, channels, *size), (*pads[0], *pads[1]))
        patches = functional.unfold(image, sides, **options).view(num * groups, products.shape[2], -1)
        if patches.shape[2] > FEW:
            back = products.mT @ (products @ patches)
        else:  # such narrow products take five times as long as those of few rows
            back = (patches.mT.contiguous() @ turned @ products).mT
        whole = functional.fold(back.reshape(num, -1, patches.shape[2]), padded, sides, **options)
        return whole[:, :, top : top + size[0], left : left + size[1]].reshape(num, 1, -1)

    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(channels * math.prod(size), device=weight.device, generator=generator)
    try:
        with full_precision():
            values = _leading_eigenvalues(gram, x.expand(num, 1, -1))
    except RuntimeError as failure:
        raise ShapeError(f"conv_norm: {str(failure).splitlines()[0]}") from None
    for i, unit, value, error in zip(places, units, *values, strict=True):
        top = math.sqrt(max(value, 0.0))
        found[i] = top * unit, (math.sqrt(max(value, 0.0) + error) - top) * unit
    return found


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _pads(padding: int | tuple[int, ...] | str, dim: int, side: int, spread: int) -> tuple[int, int]:
    """The padding before and behind, of a dimension."""
    if isinstance(padding, str):
        total = spread * (side - 1) if padding == "same" else 0
        return total // 2, total - total // 2
    return _pair(padding)[dim], _pair(padding)[dim]


def conv_norm_circular(kernel: Float[Tensor, "o i h w"], size: tuple[int, int]) -> float:
    """Return the operator norm of a convolution with circular padding, which approximates that with zero padding.

    The largest singular value over all frequencies of the kernel's Fourier transform, an (out, in) matrix at each.

    Args:
        kernel: `(out, in, h, w)`.
        size: height and width of the input.

    Returns: the norm. Raises: nothing of its own.

    Cost: one SVD of an (out, in) matrix in float64 for each frequency. Accuracy: rounding.

    Source: Sedghi, Gupta & Long 1805.10408, theorem 6.

    >>> conv_norm_circular(torch.ones(1, 1, 3, 3), (8, 8))
    9.0
    """
    transform = torch.fft.rfft2(kernel.double(), s=list(size))
    return float(torch.linalg.svdvals(transform.permute(2, 3, 0, 1)).max())


def _leading_eigenvalues(gram: Callable[[Tensor], Tensor], x: Tensor) -> tuple[list[float], list[float]]:
    """The largest eigenvalues of symmetric positive semi-definite maps (B, 1, n), and their pairs' residuals."""

    def top(found: krylov.Krylov) -> tuple[Tensor, Tensor]:
        theta, s = torch.linalg.eigh(found.t)
        return theta[:, -1], found.residual[:, 0].double().norm(dim=-1) * s[:, -1, -1].abs()

    def stop(found: krylov.Krylov) -> int:
        exhausted = found.residual.norm(dim=(1, 2)) <= 1e-6 * found.t.amax((1, 2)).clamp_min(1e-30)
        if bool(exhausted.all()):
            return 0
        if found.t.shape[-1] < LEAST_STEPS:
            return 1
        values, residuals = top(found)
        return 0 if bool((residuals <= 2 * TOLERANCE * values).all()) else 2  # the pairs take as long as a step

    values, residuals = top(krylov.lanczos(gram, x, STEPS, stop=stop, first=1))
    return values.tolist(), residuals.tolist()
