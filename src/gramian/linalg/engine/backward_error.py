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


def refined(
    error: Tensor, size: Tensor, residual: Tensor, dtype: torch.dtype, finer: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """The errors (B,) of answers of norms `size` and their residuals, by `finer` where they may be made less by it.

    That is where they are above `ROUNDINGS` of the caller's `dtype`, and everywhere in float64, in which LAPACK's bound
    is tens of times the error. `finer` takes the indices of the matrices.
    """
    if dtype == torch.float64:
        rows = torch.arange(len(error), device=error.device)
    else:
        rows = (~(error <= ROUNDINGS * unit_roundoff(dtype) * size)).nonzero().flatten()
    if rows.numel():
        better, found = finer(rows)
        error, residual = error.clone(), residual.clone()
        error[rows], residual[rows] = torch.fmin(error[rows], better), found
    return error, residual
