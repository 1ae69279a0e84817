"""Scaling by powers of two, which rounds nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

FEW = 1 << 15
"""Entries up to which a call of torch's costs more than a new tensor of that size."""


def pow2(exponent: Tensor) -> Tensor:
    """2^exponent in float64, exactly, for −1022 ≤ exponent ≤ 1023 (torch.exp2 may be one rounding off)."""
    return ((exponent.clamp(-1022, 1023) + 1023) << 52).view(torch.float64)


def scale(x: Tensor, exponent: Tensor, *, inplace: bool = False) -> Tensor:
    """x · 2^exponent, exact also where 2^exponent itself overflows or underflows; `inplace` in the memory of x.

    It multiplies by two halves of the power; on a CPU by one factor, or none, where that suffices.
    """
    tail = (1,) * (x.ndim - exponent.ndim)
    for e in _steps(exponent, x.dtype):
        factor = pow2(e).to(x.dtype).reshape(*e.shape, *tail)
        x = x.mul_(factor) if inplace else x * factor
    return x


def scaled_alike(tensors: Iterable[Tensor], exponent: Tensor) -> Iterator[Tensor]:
    """Each of several float64 tensors times 2^exponent, as by `scale`."""
    factors = [pow2(e) for e in _steps(exponent, torch.float64)]
    for x in tensors:
        for factor in factors:
            x = x * factor.reshape(*exponent.shape, *(1,) * (x.ndim - exponent.ndim))
        yield x


def _steps(exponent: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Exponents that sum to `exponent`, whose powers of two `dtype` holds: on a CPU one or none if that suffices."""
    if exponent.device.type == "cpu" and exponent.numel():
        largest = int(exponent.abs().amax())
        if largest < -math.log2(torch.finfo(dtype).tiny):
            return [exponent] if largest else []
    half = exponent // 2
    return [half, exponent - half]


def peak(x: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """The largest magnitude of an entry, NaN if there is one; over the dimensions `dim`, which are kept, or over all.

    >>> peak(torch.tensor([[1.0, -3.0]]))
    tensor(3.)
    """
    if x.device.type == "cpu" and x.numel() <= FEW:
        return x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    if dim is None:
        return torch.maximum(x.amax(), -x.amin())
    return torch.maximum(x.amax(dim, keepdim=True), -x.amin(dim, keepdim=True))


def largest_entry(x: Tensor) -> Tensor:
    """The largest |entry| of each matrix in float64; NaN if the matrix has one."""
    if not x[0:1].numel():
        return x.new_zeros(x.shape[0], dtype=torch.float64)
    return peak(x, tuple(range(1, x.ndim))).to(torch.float64).reshape(-1)


def exponent_above(top: Tensor, multiple: int = 1) -> Tensor:
    """The least e, a multiple of `multiple`, with top < 2^e; 0 for zero."""
    e = torch.frexp(top).exponent.long()
    return -((-e) // multiple) * multiple


def exponent_of(x: Tensor, *, multiple: int = 1) -> Tensor:
    """The least e, a multiple of `multiple`, with every |x| < 2^e in each matrix; 0 for a zero or empty matrix."""
    return exponent_above(largest_entry(x), multiple)


def unit_peak(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (B, m, n) in `dtype`, each matrix scaled to a largest entry near 1.

    On a CPU x keeps its scale where every largest entry is between 2⁻¹² and 2¹².
    """
    top = peak(x, (-2, -1))
    if x.device.type == "cpu" and x.dtype != torch.float16 and bool(((top > 2.0**-12) & (top < 2.0**12)).all()):
        return x.to(dtype)
    return (x / top.clamp_min(torch.finfo(x.dtype).tiny)).to(dtype)
