"""What changed between two tensors of one shape, of whatever dtype: their bits, their values, their NaN."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gramian.checkpoint.formats import dtype_name

__all__ = ["Change", "change_between", "rounding_floor", "same_bits"]

# Elements that are compared at a time, so that memory holds the two tensors and a little more.
SLICE = 1 << 20

# Singular values of a difference count if they exceed the norm of both matrices' rounding errors this many times.
ROUNDING_MARGIN = 2.0


@dataclass(frozen=True)
class Change:
    """The difference of two tensors.

    Args:
        kind: `"equal"`, bit for bit and in dtype; `"cast"`, the one is the other in another dtype; or `"changed"`.
        cast: which of the two was cast: `"float32 → bfloat16: OTHER is MODEL rounded"`.
        relative: ‖new − old‖ / ‖old‖ over the entries that are finite in both; `None` if old is zero there.
        size: ‖old‖ over these.
        num_broken: entries that are NaN or infinite in one and not the same, bit for bit, in the other.
        num_nonfinite: entries that are NaN or infinite in both, with the same bits.
    """

    kind: Literal["equal", "cast", "changed"]
    cast: str = ""
    relative: float | None = None
    size: float = 0.0
    num_broken: int = 0
    num_nonfinite: int = 0


def same_bits(new: Tensor, old: Tensor) -> bool:
    """Whether dtypes, shapes and all bits agree; a NaN equals itself only with its payload."""
    return new.dtype == old.dtype and new.shape == old.shape and torch.equal(_bytes(new), _bytes(old))


@torch.no_grad()
def change_between(new: Tensor, old: Tensor) -> Change:
    """Return the change from `old` to `new`, two tensors of one shape.

    A cast counts as such if it takes every entry of the one to the bits of the other.
    """
    if same_bits(new, old):
        return Change("equal")
    cast = _cast(new, old)
    square, base, num_broken, num_nonfinite = 0.0, 0.0, 0, 0
    for a, b in zip(new.reshape(-1).split(SLICE), old.reshape(-1).split(SLICE), strict=True):
        wide_a, wide_b = _wide(a), _wide(b)
        bad = ~(wide_a.isfinite() & wide_b.isfinite())
        if bool(bad.any()):
            # bits where dtypes agree; else NaN beside NaN and equal infinities are the same
            same = _equal_entries(a, b) if a.dtype == b.dtype else _equal_values(wide_a, wide_b)
            num_broken += int((bad & ~same).sum())
            num_nonfinite += int((bad & same).sum())
            wide_a, wide_b = wide_a.masked_fill(bad, 0), wide_b.masked_fill(bad, 0)
        square += float(torch.linalg.vector_norm(wide_a - wide_b)) ** 2
        base += float(torch.linalg.vector_norm(wide_b)) ** 2
    relative = math.sqrt(square / base) if base else None
    return Change("cast" if cast else "changed", cast, relative, math.sqrt(base), num_broken, num_nonfinite)


def rounding_floor(shape: tuple[int, ...], eps: float, size: float) -> float:
    """Return the level that singular values of rounding errors stay below: twice ½ ε (√m + √n) ‖W‖_F / √(mn).

    Args:
        shape: (m, n).
        eps: of the coarser of the two dtypes.
        size: ‖W‖_F.
    """
    m, n = shape
    return ROUNDING_MARGIN * eps / 2 * (math.sqrt(m) + math.sqrt(n)) * size / math.sqrt(m * n)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _equal_entries(new: Tensor, old: Tensor) -> Tensor:
    """Which entries have equal bits."""
    width = max(new.element_size(), 1)
    return (_bytes(new).reshape(-1, width) == _bytes(old).reshape(-1, width)).all(1)


def _equal_values(new: Tensor, old: Tensor) -> Tensor:
    return (new == old) | (new.isnan() & old.isnan())


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _cast(new: Tensor, old: Tensor) -> str:
    """Which cast takes one of two tensors to the other; empty where none does, or the dtypes are the same."""
    if new.dtype == old.dtype or new.is_complex() != old.is_complex():
        return ""
    first, second = dtype_name(new), dtype_name(old)
    to_old, to_new = _casts_to(new, old), _casts_to(old, new)
    if to_old and to_new:
        return f"{first} → {second}: the values are the same"
    if not (new.is_floating_point() and old.is_floating_point()):
        return ""
    if to_old:
        return f"{first} → {second}: OTHER is MODEL rounded"
    return f"{second} → {first}: MODEL is OTHER rounded" if to_new else ""


def _casts_to(source: Tensor, target: Tensor) -> bool:
    for a, b in zip(source.reshape(-1).split(SLICE), target.reshape(-1).split(SLICE), strict=True):
        cast = a.to(b.dtype)
        # a NaN's payload does not survive a cast
        if not bool((_equal_entries(cast, b) | (_wide(cast).isnan() & _wide(b).isnan())).all()):
            return False
    return True
