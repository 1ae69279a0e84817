"""The operator norm of a convolution, from the convolution itself at a stated input size."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from gramian.errors import InputError, ShapeError
from gramian.linalg.engine import krylov
from gramian.linalg.engine.precision import full_precision

__all__ = ["conv_norm", "conv_norm_circular"]

STEPS, LEAST_STEPS, TOLERANCE = 60, 6, 2e-3


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
    rounding, and some singular value is within the error; stops at 0.2 %.

    Source: Golub & Van Loan, Matrix Computations, §10.1; for circular padding Sedghi et al. 1805.10408.

    >>> round(conv_norm(torch.ones(1, 1, 1, 1) * 3, (5, 5))[0], 5)
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
    shape = (1, weight.shape[1] * groups, *size)

    def gram(x: Tensor) -> Tensor:
        with torch.enable_grad():
            image = x.view(shape).requires_grad_()
            out = functional.conv2d(image, weight, **options)  # type: ignore[arg-type]
        return torch.autograd.grad(out, image, out.detach())[0].flatten()

    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(math.prod(shape), device=weight.device, generator=generator)
    try:
        with full_precision():
            value, error = _leading_eigenvalue(gram, x)
    except RuntimeError as failure:
        raise ShapeError(f"conv_norm: {str(failure).splitlines()[0]}") from None
    top = math.sqrt(max(value, 0.0))
    return top * unit, (math.sqrt(max(value, 0.0) + error) - top) * unit


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


def _leading_eigenvalue(gram: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, float]:
    """Return the largest eigenvalue of a symmetric positive semi-definite map, by Lanczos, and its pair's residual."""

    def top(found: krylov.Krylov) -> tuple[float, float]:
        theta, _, residuals = krylov.ritz_pairs(found)
        return float(theta[0, -1]), float(residuals[0, -1])

    def stop(found: krylov.Krylov) -> int:
        if float(found.residual.norm()) <= 1e-6 * max(float(found.t.amax()), 1e-30):
            return 0  # exhausted
        if found.t.shape[-1] < LEAST_STEPS:
            return 1
        value, residual = top(found)
        return 0 if residual <= 2 * TOLERANCE * value else 2  # the pairs take as long as a step

    return top(krylov.lanczos(lambda y: gram(y[0, 0])[None, None], x[None, None], STEPS, stop=stop, first=1))
