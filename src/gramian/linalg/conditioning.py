"""A cheap guess of how ill-conditioned a symmetric positive definite matrix is, to choose a route by: no proof."""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 8
SWEEPS = 3


def eigenvalue_ratio(g: Tensor) -> Tensor:
    """About λ_min / λ_max of each SPD matrix (B, n, n), by a few power and inverse iterations; 0 where Cholesky fails.

    A Cholesky factor (a third of a product at best) and products with `WIDTH` vectors. In float32 ratios below 1e-6
    cannot be seen.
    """
    if not g[0:1].numel():
        return g.new_ones(g.shape[0], dtype=torch.float64)
    factor, info = torch.linalg.cholesky_ex(g)
    bad = info != 0
    if bool(bad.any()):
        factor = torch.where(bad[:, None, None], torch.eye(g.shape[-1], dtype=g.dtype, device=g.device), factor)
    start = torch.randn(g.shape[-1], WIDTH, generator=torch.Generator().manual_seed(0)).to(g)
    high = low = start.expand(g.shape[0], -1, -1)
    for _ in range(SWEEPS):
        high = g @ (high / high.norm(dim=-2, keepdim=True))
        low = torch.cholesky_solve(low / low.norm(dim=-2, keepdim=True), factor)
    largest = high.norm(dim=-2).amax(-1)
    smallest = 1 / low.norm(dim=-2).amax(-1)
    return torch.where(bad, 0.0, smallest / largest).to(torch.float64).nan_to_num(nan=0.0)
