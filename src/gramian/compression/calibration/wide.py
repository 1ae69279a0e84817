"""Wide: eigenvectors of second moments with thousands of sides, in float32 with the largest apart.

In float32 all eigenvalues are off by a rounding of the largest one, which in a language model may be a thousand times
the mean. So those that are far above the others are found first, in float64, and taken out.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["WIDE", "eigen", "working"]

WIDE = 2048
"""Sides from which on float32 is taken: at 4,096 it takes half of the time, and products take half of theirs."""
SHARE = 32
"""One of so many directions is looked for in float64."""
PASSES = 3
CONVERGED = 1e-3
"""Residual of a direction that is taken out, over the least eigenvalue that was found."""
ROUNDING = 8
"""Eigenvalues below so many units of rounding of the largest that is left are zero."""


def working(*dims: int) -> torch.dtype:
    """The dtype in which a matrix with these sides is weighted and decomposed.

    Args:
        dims: its sides.
    """
    return torch.float32 if min(dims) >= WIDE else torch.float64


def eigen(m: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues, ascending, and eigenvectors of positive semi-definite matrices.

    Args:
        m: (..., d, d) in float64, symmetric.

    Returns:
        The eigenvalues in float64; the eigenvectors in float64, or from WIDE on in float32.

    Cost: an eigendecomposition; from WIDE on one in float32, and a tenth of it. Accuracy: that of the dtype, beside the
    largest eigenvalue that is not far above the others.
    Source: subspace iteration with Ritz vectors (Halko, Martinsson & Tropp 0909.4061, alg. 4.4), and deflation.

    >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    >>> eigen(x)[0]
    tensor([1., 2.], dtype=torch.float64)
    """
    if m.ndim > 2 or len(m) < WIDE:
        return torch.linalg.eigh(m)
    top, q, image, rest_top = _largest(m)
    num = len(top)
    # Where the taken directions have a negative value, they are the first ones and the rest is orthogonal to them.
    below = torch.maximum(rest_top, CONVERGED * top.amax()) if num else rest_top
    half = image - q * (0.5 * (top - below))
    rest = torch.addmm(m, half, q.mT, alpha=-1).addmm_(q, half.mT, alpha=-1).float()
    values, vectors = torch.linalg.eigh(rest)
    values = values[num:].double()
    limit = ROUNDING * torch.finfo(torch.float32).eps * values[-1]
    values = torch.cat([torch.where(values > limit, values, 0.0), top])
    order = values.argsort(stable=True)
    return values[order], torch.cat([vectors[:, num:], q.float()], 1)[:, order]


def _largest(m: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The directions of the largest eigenvalues that a few passes find: (k,), (d, k), `m` times these, and the largest
    of the others, about.
    """
    d = len(m)
    drawn = torch.randn(d, d // SHARE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = drawn.to(m)
    for _ in range(PASSES):
        q = torch.linalg.qr(m @ q).Q
    image = m @ q
    values, turn = torch.linalg.eigh(q.mT @ image)
    values, turn = values.flip(0).clamp_min(0), turn.flip(1)
    q, image = q @ turn, image @ turn
    found = (image - q * values).norm(dim=0) < CONVERGED * values[-1]
    num = min(int(found.long().cumprod(0).sum()), len(values) - 1)
    return values[:num], q[:, :num], image[:, :num], values[num]
