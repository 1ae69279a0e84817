"""Counts over the entries of a matrix: not finite, zero, lost in a narrower dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.checkpoint.formats import dtype_name

__all__ = ["Entries", "clipped", "count_entries", "count_non_finite"]

NARROW = (torch.float16, torch.bfloat16)

# Largest magnitude that rounds to a finite number, and largest that rounds to zero (ties to even).
# tests/test_noise.py derives them again.
LARGEST = {torch.float16: 65519.99609375, torch.bfloat16: 2.0**127 * (2 - 2.0**-8) - 2.0**104}
LEAST = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}

# Entries beyond this many typical ones are extreme: 2 in 10⁹ of a Gaussian matrix.
EXTREME = 6.0
TYPICAL = 0.6745  # median of |x| of a standard normal variable
PART = 1 << 20  # entries looked at at a time
SAMPLE = 1 << 16  # entries whose median is taken


@dataclass(frozen=True)
class Entries:
    """Counts over all entries of a matrix, and magnitudes of the finite ones.

    Attributes:
        num_nonfinite: entries that are NaN or infinite.
        num_zeros: entries that are exactly zero.
        largest: the largest magnitude.
        typical: the standard deviation, estimated from the median magnitude.
        square_sum: Σ w², in float64.
        overflows, underflows: finite entries that a cast makes infinite, and nonzero ones that it makes zero, by dtype.
    """

    num_nonfinite: int = 0
    num_zeros: int = 0
    largest: float = 0.0
    typical: float = 0.0
    square_sum: float = 0.0
    overflows: Mapping[str, int] = field(default_factory=dict)
    underflows: Mapping[str, int] = field(default_factory=dict)

    @property
    def clipping_level(self) -> float | None:
        """The magnitude beyond which entries are extreme; `None` where none is."""
        level = EXTREME * self.typical
        return level if 0 < level < self.largest else None


def count_entries(parts: Iterable[Float[Tensor, "k n"]]) -> Entries:
    """Return the counts over the slices of a matrix. Cost: about four passes over each slice in the cache."""
    nonfinite, zeros, largest, squares = 0, 0, 0.0, 0.0
    overflows, underflows = ({dtype_name(dtype): 0 for dtype in NARROW} for _ in range(2))
    samples: list[Tensor] = []
    for part in parts:
        wide = part if part.dtype in (torch.float32, torch.float64) else part.float()
        magnitude = wide.abs()
        high = float(magnitude.amax())
        if not math.isfinite(high):
            finite = magnitude.isfinite()
            nonfinite += finite.numel() - int(finite.sum())
            magnitude = magnitude.where(finite, 0)
            high = float(magnitude.amax())
        largest = max(largest, high)
        norm = float(torch.linalg.vector_norm(magnitude, dtype=torch.float64))
        squares += norm * norm  # infinite beyond 1e154, where ** would raise
        zeros += part.numel() - int(torch.count_nonzero(wide))
        for dtype in NARROW:
            if part.dtype == dtype:
                continue
            name = dtype_name(dtype)
            if high > LARGEST[dtype]:
                overflows[name] += int(torch.count_nonzero(magnitude > LARGEST[dtype]))
            small = (
                int(torch.count_nonzero(magnitude <= LEAST[dtype]))
                if dtype == torch.float16 or underflows["float16"]
                else 0
            )
            if small:
                underflows[name] += small - int((magnitude == 0).sum())
        samples.append(magnitude.flatten()[:: max(1, magnitude.numel() // 4096)])
    drawn = torch.cat(samples) if samples else torch.zeros(0)
    drawn = drawn[:: max(1, len(drawn) // SAMPLE)]
    median = float(drawn.median()) if len(drawn) else 0.0
    if not median and len(drawn):  # more than half are zero: of the others
        median = float(drawn[drawn > 0].median()) if bool((drawn > 0).any()) else 0.0
    return Entries(nonfinite, zeros, largest, median / TYPICAL, squares, overflows, underflows)


def count_non_finite(tensor: Tensor) -> int:
    """Return the number of entries that are NaN or infinite, in any dtype; a mask's −∞ beside zeros do not count."""
    if not tensor.dtype.is_floating_point and not tensor.dtype.is_complex:
        return 0
    count, masked, others = 0, 0, False
    for part in tensor.flatten().split(PART):
        wide = part.float() if part.dtype.itemsize < 2 else part  # torch tests no float8
        finite = wide.isfinite()
        bad = finite.numel() - int(finite.sum())
        count += bad
        if not wide.is_complex():
            masked += int(torch.isneginf(wide).sum())
            others = others or (bad != finite.numel() and bool((wide.where(finite, 0) != 0).any()))
    return 0 if masked == count and not others and count < tensor.numel() else count


def clipped(w: Float[Tensor, "m n"], level: float, scale: float) -> Float[Tensor, "m n"]:
    """Return `scale · w` in float32, clipped to ± level."""
    return (w.to(torch.float64) * scale if w.dtype == torch.float64 else w.float() * scale).clamp(-level, level).float()
