"""Kronecker: one product of two second moments in place of a sum of products, as a matrix that is used twice has it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gramian.compression.calibration.shrinkage import Roots

__all__ = ["joined", "nearest_kronecker"]

ITERATIONS = 100
"""Of the power iteration for the nearest Kronecker product, which converges like the square of a ratio."""


def joined(rows: Sequence[Roots], columns: Sequence[Roots]) -> tuple[Roots, Roots]:
    """The roots of the nearest Kronecker product to a sum of such products, by the roots of each.

    Args:
        rows, columns: of each product the roots of its two sides; the inverse ones are not asked for.

    Returns:
        The roots for rows, and those for columns.

    Cost: as `nearest_kronecker`, and an eigendecomposition of each side.
    Source: `nearest_kronecker`.

    >>> one = Roots(torch.ones(2), torch.ones(2))
    >>> of_rows, of_columns = joined([one, one], [one, one])
    >>> (of_rows.root * of_columns.root).square().round(decimals=4)  # 1 · 1 + 1 · 1
    tensor([2., 2.], dtype=torch.float64)
    """
    of_rows, of_columns = nearest_kronecker([_square(one) for one in rows], [_square(one) for one in columns])
    return _roots_of(of_rows), _roots_of(of_columns)


def _square(one: Roots) -> Tensor:
    root = one.root.double()
    return root.square() if root.ndim == 1 else root @ root


def _roots_of(moment: Tensor) -> Roots:
    if moment.ndim == 1:
        return Roots(moment.sqrt(), moment.rsqrt())
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(1e-12 * float(values.max()))  # each has a floor of its own, far above rounding
    return Roots(vectors * values.sqrt() @ vectors.mT, vectors * values.rsqrt() @ vectors.mT)


def nearest_kronecker(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The Kronecker product that is nearest to a sum of Kronecker products, `R ⊗ C ≈ Σ Rᵢ ⊗ Cᵢ`.

    Args:
        rows, columns: positive semi-definite matrices, or their diagonals, as vectors.

    Returns:
        R and C: sums of the Rᵢ, and of the Cᵢ, with weights that are not negative.

    Cost: an inner product of each two on a side.
    Source: Van Loan & Pitsianis (1993), in the space of the given matrices, by a power iteration.

    >>> one, two = torch.eye(2), torch.ones(3)
    >>> r, c = nearest_kronecker([one, 2 * one], [two, 3 * two])
    >>> (r[0, 0] * c[0]).round(decimals=4)  # 1 · 1 + 2 · 3
    tensor(7.)
    """
    of_rows, of_columns = _alike(rows), _alike(columns)
    p, q = (torch.stack([torch.stack([(a * b).sum() for b in side]) for a in side]) for side in (of_rows, of_columns))
    d = torch.ones_like(p[0])
    s = d
    for _ in range(ITERATIONS):
        d = d / (d @ p @ d).sqrt()
        s = p @ d
        d = q @ s / (s @ q @ s)
    return _sum(d, of_rows), _sum(s, of_columns)


def _sum(weights: Tensor, terms: Sequence[Tensor]) -> Tensor:
    return torch.stack([w * term for w, term in zip(weights, terms, strict=True)]).sum(0)


def _alike(side: Sequence[Tensor]) -> list[Tensor]:
    """All as vectors, where all are, or as matrices."""
    if all(one.ndim == 1 for one in side):
        return list(side)
    return [one.diag() if one.ndim == 1 else one for one in side]
