"""Composed quintics for stacks of small or long matrices: few passes over memory, and pairs of steps on a Gram matrix.

Where the longer side is large, products with X cost the most. Two steps are then one polynomial of the Gram matrix,
P₂(G₁) P₁(G₀) with G₁ = P₁² G₀: two products with X in place of four, and five small ones in place of two. More than two
steps on one Gram matrix would magnify its rounding, which makes small eigenvalues negative.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.linalg.engine.scaling import unit_peak
from gramian.linalg.polar_factor.newton_schulz import SAFETY, composed, in_parts

PAIRED_FROM = 2.0
"""Least ratio of the sides from which steps go in pairs: 4r + 2 small products against 2r + 5."""

NORMAL = 2.0**-40, 2.0**40
"""Norms between which neither a matrix nor its Gram matrix needs care in float32."""

Coefficients = Sequence[tuple[float, float, float]]


def few_passes(
    a: Float[Tensor, "*b m n"],
    *,
    low: float,
    steps: int,
    dtype: torch.dtype | None = None,
    out: Float[Tensor, "*b m n"] | None = None,
) -> Float[Tensor, "*b m n"]:
    """Approximate polar factor of each matrix by `composed(low, steps)`, in products of `dtype`, float32 if None.

    ‖XXᵀ‖_F^½ bounds ‖X‖₂ here; singular values below `low` of that end below 1. A zero matrix gives zero, NaN stays in
    its own matrix, and each matrix is scaled by itself. It is written to `out`, contiguous and perhaps `a`, if given.
    """
    tall = a.shape[-2] > a.shape[-1]
    coefficients = [
        (p, q, r) if i == steps - 1 else (p / SAFETY, q / SAFETY**3, r / SAFETY**5)
        for i, (p, q, r) in enumerate(composed(low, steps).coefficients)
    ]

    def run(part: Tensor) -> Tensor:
        value = _iterate(_scaled(part, tall=tall, dtype=dtype or torch.float32), coefficients)
        return value.mT if tall else value

    return in_parts(a, run, out)


def _scaled(x: Tensor, *, tall: bool, dtype: torch.dtype) -> Tensor:
    """x (B, m, n), m ≤ n once transposed, in `dtype`, each matrix of Frobenius norm about one, or zero."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide)
    if x.device.type != "cpu" or not bool(((norm > NORMAL[0]) & (norm < NORMAL[1])).all()):
        x = unit_peak(x, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    factor = torch.where(norm > 0, 1 / norm, 0.0)
    # Factors in the dtype of what they multiply: products of mixed dtypes have no fast kernel on a CPU.
    small = (x.mT if tall else x).to(dtype, memory_format=torch.contiguous_format, copy=True)
    return small.mul_(factor.to(dtype))


def _iterate(x: Tensor, coefficients: Coefficients) -> Tensor:
    """The steps on (B, m, n), m ≤ n, of norm one. It overwrites x."""
    gram = torch.bmm(x, x.mT)
    norm = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    square = torch.where(norm > 0, 1 / (norm * SAFETY**2), 0.0)
    x.mul_(square.sqrt().to(x.dtype))
    gram.mul_(square.to(x.dtype))
    spare, poly = torch.empty_like(x), torch.empty_like(gram)
    paired = x.shape[-1] >= PAIRED_FROM * x.shape[-2]
    rest = list(coefficients)
    while rest:
        (a, b, c), *rest = rest
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=poly)
        if paired and rest:
            poly.diagonal(dim1=-2, dim2=-1).add_(a)
            gram = torch.bmm(poly, torch.bmm(poly, gram))
            (a, b, c), *rest = rest
            second = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            second.diagonal(dim1=-2, dim2=-1).add_(a)
            torch.bmm(torch.bmm(second, poly, out=gram), x, out=spare)
        else:
            torch.baddbmm(x, poly, x, beta=a, out=spare)
        x, spare = spare, x
        if rest:
            torch.bmm(x, x.mT, out=gram)
    return x
