"""What rounding costs: unit roundoffs, γ_k, and the norms that error bounds are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

U = 2.0**-53
"""Unit roundoff of float64."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def gamma(k: int) -> float:
    """γ_k = ku / (1 − ku), the bound on k roundings. Higham, Accuracy and Stability (2002), lemma 3.1."""
    return k * U / (1 - k * U)


ROWS = 1 << 16
"""Entries of a float32 matrix from which its norm is that of its rows' norms in float32."""

LOOSE = 2.0**-10
"""Relative error of such a norm, for rows of up to 8,000 entries and far more than were ever seen to need it."""


def norm(x: Tensor) -> Tensor:
    """The Frobenius norm of each matrix, in float64; of large ones in float32 on a CPU to within `LOOSE`.

    One entry that is expanded to matrices is read once.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and x.ndim == 3 and x[0:1].numel() >= ROWS:
        rows = torch.linalg.vector_norm(x, dim=-1 if x.stride(-1) == 1 else -2)
        # No square overflowed, or underflowed where it counts.
        if bool(((rows > 2.0**-50) & (rows < 2.0**50)).all()):
            return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
    if x.ndim == 3 and x.numel() and not any(x.stride()):
        return torch.linalg.vector_norm(x[:, 0, :1], dim=-1, dtype=torch.float64) * math.sqrt(x[0].numel())
    wide = torch.complex128 if x.is_complex() else torch.float64
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), dtype=wide)


def chain_rounding(n: int, *sizes: Tensor | float) -> Tensor | float:
    """γ_n times the product of norms: the rounding of one product in a chain, carried through the others."""
    product: Tensor | float = gamma(n)
    for size in sizes:
        product = product * size
    return product
