"""Eigenvectors that a method computed on the way to its value, kept for the derivative, which needs the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from gramian.linalg.engine.transforms import transforming


class Spectrum(NamedTuple):
    """Eigenvalues (..., n) in float64, NaN where they are not known, and eigenvectors (..., n, n)."""

    values: Tensor
    vectors: Tensor


_KEPT: ContextVar[list[Spectrum] | None] = ContextVar("kept", default=None)


@contextmanager
def keeping() -> Iterator[list[Spectrum]]:
    """Within it, a function of matrices leaves the spectrum of its value in the list, if its method has one."""
    found: list[Spectrum] = []
    token = _KEPT.set(found)
    try:
        yield found
    finally:
        _KEPT.reset(token)


def kept() -> list[Spectrum] | None:
    """The list of the innermost `keeping`; None outside."""
    return _KEPT.get()


def unknown(batch: Sequence[int], n: int, dtype: torch.dtype, device: torch.device) -> Spectrum:
    """A spectrum of which nothing is known."""
    wide = torch.promote_types(dtype, torch.float32)
    nothing = torch.full((*batch, n), torch.nan, dtype=torch.float64, device=device)
    return Spectrum(nothing, torch.zeros(*batch, n, n, dtype=wide, device=device))


def usable(spectrum: Spectrum | None, count: int, n: int, dtype: torch.dtype, device: torch.device) -> Spectrum:
    """The spectrum with vectors in `dtype`, at least float32; unknown where there is none, or in a narrower type."""
    wide = torch.promote_types(dtype, torch.float32)
    if spectrum is None or (wide == torch.float64 and spectrum.vectors.dtype != wide):
        return unknown((count,), n, dtype, device)
    return Spectrum(spectrum.values.double(), spectrum.vectors.to(wide).contiguous())


def known(spectrum: Spectrum | None) -> TypeGuard[Spectrum]:
    """Whether it is known for all matrices, and no graph or transform follows what is made of it."""
    if spectrum is None or transforming() or torch.is_grad_enabled():
        return False
    return not bool(spectrum.values.isnan().any())
