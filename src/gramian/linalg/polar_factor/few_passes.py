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

NORMAL = 2.0**-50, 2.0**50
"""Norms of a Gram matrix between which neither the squares of its entries nor its matrix need care in float32."""

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
        value = _iterate(*_started(part.mT if tall else part, dtype or torch.float32), coefficients)
        return value.mT if tall else value

    return in_parts(a, run, out)


def _started(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (B, m, n), m ≤ n, in `dtype`, and its Gram matrix, neither too large nor too small for float32."""
    small = x.to(dtype, memory_format=torch.contiguous_format, copy=True)
    gram = torch.bmm(small, small.mT)
    if x.device.type == "cpu":
        norm = torch.linalg.vector_norm(gram, dim=(-2, -1), dtype=torch.float32)
        if bool(((norm > NORMAL[0]) & (norm < NORMAL[1])).all()):
            return small, gram
    small = unit_peak(x, torch.float32).to(dtype, memory_format=torch.contiguous_format, copy=True)
    return small, torch.bmm(small, small.mT)


def _iterate(x: Tensor, gram: Tensor, coefficients: Coefficients) -> Tensor:
    """The steps on (B, m, n), m ≤ n, and its Gram matrix. It overwrites both."""
    norm = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    square = torch.where(norm > 0, 1 / (norm * SAFETY**2), 0.0)
    # Factors in the dtype of what they multiply: products of mixed dtypes have no fast kernel on a CPU.
    x.mul_(square.sqrt().to(x.dtype))
    gram.mul_(square.to(x.dtype))
    spare, shifted, poly = torch.empty_like(x), torch.empty_like(gram), torch.empty_like(gram)
    paired = x.shape[-1] >= PAIRED_FROM * x.shape[-2]
    rest = list(coefficients)
    while rest:
        (a, b, c), *rest = rest
        factor = _monic(gram, a / c, b / c, shifted, poly)
        if paired and rest:
            _scaled_product(poly, torch.bmm(poly, gram, out=shifted), c * c, out=gram)
            (a, b, second), *rest = rest
            other = _monic(gram, a / second, b / second, shifted, torch.empty_like(gram))
            factor, c = torch.bmm(other, poly, out=gram), c * second
        _scaled_product(factor, x, c, out=spare)
        x, spare = spare, x
        if rest:
            torch.bmm(x, x.mT, out=gram)
    return x


def _monic(gram: Tensor, a: float, b: float, shifted: Tensor, out: Tensor) -> Tensor:
    """G(G + bI) + aI, in `out`. A sum with a whole matrix inside a product costs a third more than the product."""
    shifted.copy_(gram).diagonal(dim1=-2, dim2=-1).add_(b)
    torch.bmm(gram, shifted, out=out).diagonal(dim1=-2, dim2=-1).add_(a)
    return out


def _scaled_product(a: Tensor, b: Tensor, factor: float, out: Tensor) -> Tensor:
    return torch.baddbmm(out, a, b, beta=0, alpha=factor, out=out)
