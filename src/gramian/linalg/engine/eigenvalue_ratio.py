"""A cheap look at λ_min / λ_max, by which a method sees that it cannot reach the rtol asked for."""

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


def below(g: Tensor, ratio: float) -> Tensor:
    """Whether λ_min / λ_max of each symmetric matrix (B, n, n) is below `ratio`, about.

    λ_max is found by a few power iterations, and G − ratio·λ_max I has a Cholesky factor or none. So it costs one, a
    third of a product at best, or its first strips. Float32 does not resolve ratios below 1e-6.
    """
    if not g[0:1].numel():
        return torch.zeros(g.shape[0], dtype=torch.bool, device=g.device)
    start = torch.randn(WIDTH, g.shape[-1], generator=torch.Generator().manual_seed(SEED), device="cpu").to(g)
    high = start.expand(g.shape[0], -1, -1)
    for _ in range(SWEEPS):  # a product with a few rows takes a quarter of one with a few columns
        high = (high / high.norm(dim=-1, keepdim=True)) @ g
    top = high.norm(dim=-1).amax(-1)
    shifted = scratch("shifted", tuple(g.shape), g.dtype, g).copy_(g)
    shifted.diagonal(dim1=-2, dim2=-1).sub_(ratio * top[:, None])
    _, info = lapack.cholesky(shifted, scratch("factor", tuple(g.shape), g.dtype, g))
    return info != 0


def hopeless(g: Tensor, rtol: float, error: float, *, power: float = 1.0) -> bool:
    """Whether `error` · κ^power is above rtol for all g (B, n, n), by a look at κ; False for an rtol of inf.

    `error` is what a method loses per κ^power: where this is true the method should decline.
    """
    if not (math.isfinite(rtol) and g.numel()):
        return False
    return rtol <= error or bool(below(g, (error / rtol) ** (1 / power)).all())
