"""LAPACK's own bounds on the errors of its decompositions: nothing is measured, and κ enters what follows from them.

The computed factors are within p(n)ε of orthonormal ones, and these decompose a matrix within p(n)ε‖A‖₂ of A, with
p(n) = 10n for a modestly growing function of n (Anderson et al., LAPACK Users' Guide, §4.7).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gramian.linalg.engine.rounding import unit_roundoff

ROUNDINGS = 4
"""Roundings of the answer up to which an error needs no finer bound."""


def backward_error(n: int, dtype: torch.dtype = torch.float64) -> float:
    """p(n)ε, the larger side being n."""
    return 20 * n * unit_roundoff(dtype)


Rows = Tensor | slice
"""Indices of matrices, or all."""


def tightened(
    rough: Callable[[], tuple[Tensor, Tensor]],
    finer: Callable[[Rows], tuple[Tensor, Tensor]],
    size: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Bounds (B,) on the errors of answers of norms `size`, and their residuals: by `rough`, or by `finer` where it may
    give less.

    It may in float64, in which LAPACK's bound is tens of times the error, and where the bound by `rough` is above
    `ROUNDINGS` of the caller's `dtype`.
    """
    if dtype == torch.float64:
        return finer(slice(None))
    error, residual = rough()
    rows = (~(error <= ROUNDINGS * unit_roundoff(dtype) * size)).nonzero().flatten()
    if rows.numel():
        better, found = finer(rows)
        error, residual = error.clone(), residual.clone()
        error[rows], residual[rows] = torch.fmin(error[rows], better), found
    return error, residual
