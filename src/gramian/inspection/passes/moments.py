"""The size of a tensor, and of what differs in it between samples, from two numbers on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gramian.batch import tensors
from gramian.recording.taps import in_vmap

__all__ = ["Moments", "all_finite", "as_moments", "first_float", "moments", "packed", "squares", "version"]

# Between these a sum of squares of float32 numbers has neither lost nor overflown any that count.
LOW, HIGH = 1e-24, 1e30


@dataclass(frozen=True)
class Moments:
    """The size of a tensor whose first dimension holds the samples.

    Attributes:
        rms: root mean square of all entries.
        between: root mean square over positions of the standard deviation between samples.
        is_finite: whether all entries are.
    """

    rms: float
    between: float
    is_finite: bool


def moments(t: Tensor) -> Moments:
    """The size of a tensor: the means of its squares around the mean over samples and of that mean, two passes."""
    return as_moments(t, *map(float, squares(t)))


def squares(t: Tensor) -> tuple[Tensor, Tensor]:
    """The mean square of what differs between samples, and that of the samples' mean: scalars on the device."""
    wide = _by_sample(t)
    mean = wide.mean(0)  # and not var_mean, which took 5 to 28 times as long on a processor
    return (wide - mean).square_().mean(), mean.square().mean()


def all_finite(t: Tensor) -> bool:
    """Whether all entries are finite: their sum is not where one is not, and takes a thirtieth of the time to tell."""
    return bool(t.sum().isfinite()) or bool(t.isfinite().all())  # the sum of finite ones may overflow


def as_moments(t: Tensor | None, between: float, square: float) -> Moments:
    """The moments, from the numbers of `squares`; where these have lost or overflown, from the tensor if it is left."""
    is_lost = not LOW < between + square < HIGH or between == 0.0
    if is_lost and t is not None and t.numel():
        wide = _by_sample(t)
        largest = float(wide.abs().amax())
        if not math.isfinite(largest):
            return Moments(largest, largest, is_finite=False)
        scale = largest or 1.0  # squares of very large and very small values exist after division
        between, square = (float(v) * scale * scale for v in squares(wide / scale))
    elif t is not None and not t.numel():
        between = square = 0.0
    return Moments(math.sqrt(between + square), math.sqrt(between), is_finite=math.isfinite(between + square))


def _by_sample(t: Tensor) -> Tensor:
    """The values as float32, with samples in the first dimension: rows where there is one sample."""
    wide = packed(t.detach()).float()
    if not wide.numel():
        return wide.reshape(0, 1)
    if wide.ndim == 0 or wide.shape[0] < 2:
        wide = wide.reshape(-1, 1) if wide.ndim < 2 else wide.reshape(-1, wide.shape[-1])
    return wide


def first_float(*values: Any) -> Tensor | None:
    """The first tensor of numbers, with a dimension, in what a module takes or gives; none whose values are hidden."""
    if in_vmap():
        return None
    for value in values:
        for t in tensors(value) if not isinstance(value, nn.Module) else ():
            if t.is_floating_point() and t.ndim and (not t.is_nested or t.layout is torch.jagged):
                return packed(t)
    return None


def packed(t: Tensor) -> Tensor:
    """The rows of all samples of a jagged tensor; any other as it is."""
    return t.values() if t.layout is torch.jagged else t


def version(t: Tensor | None) -> int:
    """How often a tensor was written to."""
    return 0 if t is None or t.is_inference() else t._version
