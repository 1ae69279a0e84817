"""The polar factor by Newton–Schulz steps with Polar Express coefficients: products only, batched, no waiting."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749753, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.875, -1.25, 0.375),
)
"""Minimax odd quintics a·x + b·x³ + c·x⁵ composed on [1e-3, 1], then the plain quintic Newton–Schulz step for good.
Amsel, Persson, Musco, Gower, arXiv:2505.16932, algorithm 1 with cushion 0.02407327424182761 (§4.4)."""

SAFETY = 1.01
"""Divides the argument of every step but the last, so that rounding cannot push a singular value out of the interval.
arXiv:2505.16932, §4.4."""


def newton_schulz(
    a: Float[Tensor, "*b m n"], *, steps: int = 7, dtype: torch.dtype | None = None
) -> Float[Tensor, "*b m n"]:
    """Approximate polar factor of each matrix: X ← aX + (bXXᵀ + c(XXᵀ)²)X on the smaller side.

    Arguments: `a` (..., m, n); `steps`, three products each; `dtype` of the products, float32 (float64 for float64) if
    None. A zero matrix gives zero; NaN stays in its own matrix; 1e±30 is scaled away, one scale per matrix.
    """
    compute = dtype or (torch.float64 if a.dtype == torch.float64 else torch.float32)
    tall = a.shape[-2] > a.shape[-1]
    m, n = min(a.shape[-2:]), max(a.shape[-2:])
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        x = (a.mT if tall else a).reshape(math.prod(a.shape[:-2]), m, n)
        x = x.to(torch.promote_types(compute, torch.float32))
        if x.numel():
            tiny = torch.finfo(x.dtype).tiny
            # Two divisions: the norm of entries near 1e30 overflows before the peak is taken out.
            x = x / x.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
            x = x / (x.norm(dim=(-2, -1), keepdim=True) * SAFETY).clamp_min(tiny)
            # A bfloat16 product into a transposed buffer has no fast kernel on a CPU: a thousand times slower.
            x = _iterate(x.to(compute, memory_format=torch.contiguous_format), steps)
        x = x.reshape(*a.shape[:-2], m, n)
        return (x.mT if tall else x).to(a.dtype)


def _iterate(x: Tensor, steps: int) -> Tensor:
    """The steps themselves, on (B, m, n) with m ≤ n, in four buffers whatever the number of steps."""
    gram = x.new_empty(x.shape[0], x.shape[1], x.shape[1])
    poly, spare = torch.empty_like(gram), torch.empty_like(x)
    for step in range(steps):
        a, b, c = COEFFICIENTS[min(step, len(COEFFICIENTS) - 1)]
        if step < min(steps, len(COEFFICIENTS)) - 1:
            a, b, c = a / SAFETY, b / SAFETY**3, c / SAFETY**5
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=poly)
        torch.baddbmm(x, poly, x, beta=a, out=spare)
        x, spare = spare, x
    return x


def defect(x: Float[Tensor, "*b m n"]) -> Float[Tensor, "*b"]:
    """‖XᵀX − I‖_F on the smaller side."""
    small = x if x.shape[-2] <= x.shape[-1] else x.mT
    small = small.to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        gram = small @ small.mT
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return gram.flatten(-2).norm(dim=-1)
