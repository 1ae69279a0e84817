"""How convolutions are read: the rows of a kernel's matrix are windows of the input, or of the output's gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gramian.gram import Sums
from gramian.recording.correlation import diagonal_of_windows, moment_of_windows, pays
from gramian.recording.form import Form, IsWeight, rows_of
from gramian.recording.windows import chunks_of_windows, paddings, windows

__all__ = ["convolution", "transposed_convolution"]


def convolution(
    is_weight: IsWeight,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Form | None:
    num = weight.ndim - 2
    x = input if input.ndim == weight.ndim else input.unsqueeze(0)
    stride, dilation = _tuple(stride, num), _tuple(dilation, num)
    kernel = tuple(weight.shape[2:])
    pads = paddings(padding, kernel, dilation)

    def diagonals(grad: Tensor | None) -> Sums:
        if grad is None:
            return diagonal_of_windows(x.detach(), kernel, stride, pads, dilation)
        ones = (1,) * num
        return diagonal_of_windows(
            grad if grad.ndim == weight.ndim else grad.unsqueeze(0), ones, ones, [(0, 0)] * num, ones
        )

    short = groups == 1 and set(stride) == {1} and pays(x.shape, kernel, pads, dilation)
    return Form(
        "convolution",
        weight,
        input,
        lambda mask: chunks_of_windows(x.detach(), kernel, stride, pads, dilation),
        lambda grad: rows_of((grad if grad.ndim == weight.ndim else grad.unsqueeze(0)).movedim(1, -1)),
        tuple(range(1, weight.ndim)),
        (0,),
        groups,
        moment=(lambda: moment_of_windows(x.detach(), kernel, pads, dilation)) if short else None,
        diagonals=diagonals if groups == 1 else None,
    )


def transposed_convolution(
    is_weight: IsWeight,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Form | None:
    """The adjoint of a convolution: the inputs are pixels, and each belongs to a window of the output's gradient."""
    num = weight.ndim - 2
    x = input if input.ndim == weight.ndim else input.unsqueeze(0)
    stride, dilation, kernel = _tuple(stride, num), _tuple(dilation, num), tuple(weight.shape[2:])
    pads = paddings(_tuple(padding, num), kernel, dilation)

    def outputs(grad: Tensor) -> Tensor:
        grad = grad if grad.ndim == weight.ndim else grad.unsqueeze(0)
        found = windows(grad, kernel, stride, pads, dilation)
        for axis, size in enumerate(x.shape[2:]):  # positions that output_padding adds belong to no pixel
            found = found.narrow(axis + 1, 0, size)
        return found.flatten(0, num).flatten(1)

    inputs = rows_of(x.movedim(1, -1))
    return Form(
        "convolution", weight, input, lambda mask: iter([inputs]), outputs, (0,), tuple(range(1, weight.ndim)), groups
    )


def _tuple(value: Any, num: int) -> tuple[int, ...]:
    return (value,) * num if isinstance(value, int) else tuple(value) * (num if len(value) == 1 else 1)
