"""The eigendecomposition of symmetric matrices, and what it says about where a function of them exists."""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.linalg import certificate as cert
from gramian.linalg.engine import lapack
from gramian.linalg.engine.double_double import Pair
from gramian.linalg.engine.loading import NEGLIGIBLE
from gramian.linalg.engine.rounding import U


def decompose(m: Pair, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eigenvalues (B, n), eigenvectors, a floor (B, 1), and a reason: INDEFINITE where some are negative.

    Below the floor float64 cannot tell an eigenvalue from zero; negative ones up to rounding of the caller's `dtype`
    count as zero.
    """
    w, v, ok = lapack.eigh(m.hi)
    n = w.shape[-1]
    top = w.abs().amax(-1, keepdim=True) if n else w.new_zeros(w.shape[0], 1)
    indefinite = (w < -NEGLIGIBLE * n * torch.finfo(dtype).eps * top).any(-1)
    reason = torch.where(indefinite, cert.INDEFINITE, cert.NONE)
    return w, v, NEGLIGIBLE * n * 2 * U * top, torch.where(ok, reason, cert.LAPACK)
