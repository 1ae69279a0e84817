"""A cheap guess of λ_min / λ_max, by which a method sees that it cannot reach the rtol asked for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gramian.linalg.engine import lapack
from gramian.linalg.engine.probes import SEED
from gramian.linalg.engine.workspace import scratch

WIDTH = 8
"""Vectors of the power iteration."""
SWEEPS = 3
"""Its steps."""


def eigenvalue_ratio(g: Tensor) -> Tensor:
    """About λ_min / λ_max of each SPD matrix (B, n, n), by a few power and inverse iterations; 0 where Cholesky fails.

    Cost: a Cholesky factor (a third of a product at best) and products with `WIDTH` vectors. In float32 it does not
    resolve ratios below 1e-6.
    """
    if not g[0:1].numel():
        return g.new_ones(g.shape[0], dtype=torch.float64)
    factor, info = lapack.cholesky(g, scratch("factor", tuple(g.shape), g.dtype, g))
    bad = info != 0
    if bool(bad.any()):
        factor = torch.where(bad[:, None, None], torch.eye(g.shape[-1], dtype=g.dtype, device=g.device), factor)
    start = torch.randn(g.shape[-1], WIDTH, generator=torch.Generator().manual_seed(SEED)).to(g)
    high = low = start.expand(g.shape[0], -1, -1)
    for _ in range(SWEEPS):
        high = g @ (high / high.norm(dim=-2, keepdim=True))
        low = low / low.norm(dim=-2, keepdim=True)
        # Two triangular solves: torch.cholesky_solve copies the factor first.
        low = torch.linalg.solve_triangular(factor, low, upper=False)
        low = torch.linalg.solve_triangular(factor.mT, low, upper=True)
    largest = high.norm(dim=-2).amax(-1)
    smallest = 1 / low.norm(dim=-2).amax(-1)
    return torch.where(bad, 0.0, smallest / largest).to(torch.float64).nan_to_num(nan=0.0)


def hopeless(g: Tensor, rtol: float, error: float, *, power: float = 1.0) -> bool:
    """Whether `error` · κ^power is above rtol for all g (B, n, n), by a guess of κ; False for an rtol of inf.

    `error` is what a method loses per κ^power: where this is true the method should decline.
    """
    if not (math.isfinite(rtol) and g.numel()):
        return False
    return bool((rtol * eigenvalue_ratio(g) ** power < error).all())
