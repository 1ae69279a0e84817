"""The operator norm of a convolution, from the convolution itself at a stated input size."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from gramian.errors import InputError, ShapeError
from gramian.linalg import spectral_norm_ex

__all__ = ["conv_norm", "conv_norm_circular"]

TOLERANCE = 2e-3


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
    """Return the largest singular value of a zero-padded convolution on (i, *size) images, and its stated error.

    `gm.linalg.spectral_norm` of the convolution and its transpose as a `LinearMap`. The reshaped kernel's norm is
    another number: up to √(h w) times too small.

    Args:
        kernel: (out, in / groups, h, w).
        size: height and width of the input.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`.

    Raises:
        ShapeError: the kernel does not have four axes, or is larger than the padded input.
        InputError: "same" padding with a stride.

    Cost: some 10 to 60 convolutions and as many transposed ones. Accuracy: the value is never above the norm, and the
    norm is above value + error with `gm.linalg`'s small probability; stops at 0.2 %.

    Source: as `gm.linalg.spectral_norm`; for circular padding Sedghi et al. 1805.10408.

    Example:
        >>> round(conv_norm(torch.ones(1, 1, 1, 1) * 3, (5, 5))[0], 4)
        3.0
    """
    if kernel.ndim != 4:
        raise ShapeError(f"conv_norm: expected a kernel (o, i, h, w), got {tuple(kernel.shape)}")
    if padding == "same" and stride not in (1, (1, 1)):
        raise InputError("conv_norm: padding 'same' needs stride 1, as in torch; give the padding in pixels")
    largest = float(kernel.abs().max()) if kernel.numel() else 0.0
    if not largest > 0 or not math.isfinite(largest):
        return largest, 0.0
    unit = 2.0 ** math.frexp(largest)[1]
    weight = (kernel.double() / unit).float()
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    shape = (weight.shape[1] * groups, *size)

    try:
        value, certificate = spectral_norm_ex(_Convolution(weight, shape, options), rtol=TOLERANCE)
    except RuntimeError as failure:
        raise ShapeError(f"conv_norm: {str(failure).splitlines()[0]}") from None
    return float(value) * unit, float(value * certificate.error_bound) * unit


def conv_norm_circular(kernel: Float[Tensor, "o i h w"], size: tuple[int, int]) -> float:
    """Return the operator norm under circular padding, exactly; for zero padding it is an approximation.

    The largest singular value over all frequencies of the kernel's Fourier transform (o × i at each).

    Source: Sedghi, Gupta & Long 1805.10408, theorem 6.

    Example:
        >>> conv_norm_circular(torch.ones(1, 1, 3, 3), (8, 8))
        9.0
    """
    transform = torch.fft.rfft2(kernel.double(), s=list(size))
    return float(torch.linalg.svdvals(transform.permute(2, 3, 0, 1)).max())


class _Convolution:
    """A convolution of flattened images as a `LinearMap`, and its transpose, which is its own derivative's."""

    def __init__(self, weight: Tensor, shape: tuple[int, ...], options: dict[str, Any]) -> None:
        self.weight, self.images, self.options = weight, shape, options
        self.dtype, self.device = weight.dtype, weight.device
        out = functional.conv2d(weight.new_zeros(1, *shape), weight, **options)
        self.outputs = tuple(out.shape[1:])
        self.shape = (math.prod(self.outputs), math.prod(shape))

    def matmat(self, x: Tensor) -> Tensor:
        """C X of X (n, b)."""
        images = x.mT.reshape(-1, *self.images)
        return functional.conv2d(images, self.weight, **self.options).flatten(1).mT

    def matvec(self, x: Tensor) -> Tensor:
        """C x."""
        return self.matmat(x[:, None])[:, 0]

    def adjoint(self) -> _Transposed:
        """Cᵀ."""
        return _Transposed(self)


class _Transposed:
    """Cᵀ: for a linear map, the vector-Jacobian product."""

    def __init__(self, convolution: _Convolution) -> None:
        self.convolution = convolution
        self.dtype, self.device = convolution.dtype, convolution.device
        self.shape = convolution.shape[::-1]

    def matmat(self, y: Tensor) -> Tensor:
        """Cᵀ Y of Y (m, b)."""
        inner = self.convolution
        with torch.enable_grad():
            images = y.new_zeros(y.shape[1], *inner.images).requires_grad_()
            out = functional.conv2d(images, inner.weight, **inner.options)
        return torch.autograd.grad(out, images, y.mT.reshape(out.shape))[0].flatten(1).mT

    def matvec(self, y: Tensor) -> Tensor:
        """Cᵀ y."""
        return self.matmat(y[:, None])[:, 0]

    def adjoint(self) -> _Convolution:
        """C."""
        return self.convolution
