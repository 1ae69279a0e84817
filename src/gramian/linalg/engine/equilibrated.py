"""Inverses of equilibrated matrices in double-double arithmetic, until the condition number nears 1e20.

Rows and columns are scaled by powers of two until the largest entry of each is near one, which takes away what is bad
scaling and not near singularity. Where float64's inverse Y is still no inverse, it is a preconditioner: MY has a
condition number of about uκ, and Y(MY)⁻¹ is an inverse of M. Rump, Acta Numerica 19 (2010), §10.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gramian.linalg.engine import lapack
from gramian.linalg.engine.double_double import (
    Pair,
    Product,
    eye_like,
    fine_product,
    minus,
    pair,
    product,
    two_sum,
)
from gramian.linalg.engine.probes import SEED
from gramian.linalg.engine.rounding import norm
from gramian.linalg.engine.scaling import exponent_above, peak, scale

SWEEPS = 4
"""Halved scalings of rows and columns before the whole ones: each halves the logarithms of what is left."""

CLOSE = 2.0**-30
"""The residual of the last step but one above which the rounding of a double-double product may be what remains."""

FLOOR = 2.0**-500
"""What may be lost where a square underflows, as a norm; all norms here are of entries near one."""


class Scaling(NamedTuple):
    """2^-whole diag(2^-rows) M diag(2^-columns) is equilibrated; the least of the rows (B, m) and columns (B, n) is 0.

    So M⁻¹ = 2^-whole diag(2^-columns) X diag(2^-rows), where X is the inverse of that.
    """

    rows: Tensor
    columns: Tensor
    whole: Tensor


class Inverted(NamedTuple):
    """The equilibrated matrix, its inverse, how it was scaled, and the steps taken."""

    m: Pair
    y: Pair
    scaling: Scaling
    steps: int


def of_rows(x: Tensor, exponent: Tensor) -> Tensor:
    """diag(2^-exponent) x."""
    return scale(x, -exponent)


def of_columns(x: Tensor, exponent: Tensor) -> Tensor:
    """x diag(2^-exponent)."""
    return scale(x.mT, -exponent).mT


def equilibration(x: Tensor) -> Scaling:
    """How to scale x (B, m, n) in float64."""
    b, m, n = x.shape
    rows, columns = (torch.zeros(b, k, dtype=torch.long, device=x.device) for k in (m, n))
    if x.numel():
        for share in (*([2] * SWEEPS), 1):
            rows = rows + _exponents(of_columns(of_rows(x, rows), columns), -1) // share
            columns = columns + _exponents(of_columns(of_rows(x, rows), columns), -2) // share
        first, second = rows.amin(-1, keepdim=True), columns.amin(-1, keepdim=True)
        return Scaling(rows - first, columns - second, (first + second)[:, 0])
    return Scaling(rows, columns, rows.new_zeros(b))


def _exponents(x: Tensor, dim: int) -> Tensor:
    """The least e with every |entry| below 2^e, of rows (dim −1) or columns (dim −2); 0 for zeros."""
    return exponent_above(peak(x, (dim,)).squeeze(dim))


def equilibrate(m: Pair, s: Scaling) -> Pair:
    """The equilibrated matrix."""
    hi, lo = (of_columns(scale(of_rows(x, s.rows), -s.whole), s.columns) for x in (m.hi, m.lo))
    return Pair(hi, lo, m.error)


def restored(x: Tensor, s: Scaling) -> Tensor:
    """The inverse of M from that of the equilibrated one."""
    return scale(of_columns(of_rows(x, s.columns), s.rows), -s.whole)


def inverted(m: Pair) -> Inverted:
    """The inverse of each matrix of an exact pair (B, n, n); whether it is one, its residual says."""
    s = equilibration(m.hi)
    m = equilibrate(m, s)
    y = _finite_inverse(m.hi)
    close, r = _refined(m, pair(y), product, 3)
    poor = (~(norm(r) < CLOSE)).nonzero().flatten()
    if not poor.numel() or not y.numel():
        return Inverted(m, close, s, 3)
    # A preconditioner that was rounded by a rule, as that of a matrix of integers, may be singular: move it at random.
    moved = pair(y * (1 + 2.0**-51 * _noise(y)))
    part, first, near = (Pair(*(x[poor] for x in z)) for z in (m, moved, close))
    second = fine_product(first, pair(_finite_inverse(fine_product(part, first).hi)))
    far = ~(norm(r[poor]) < 1)[:, None, None]
    start = Pair(torch.where(far, second.hi, near.hi), torch.where(far, second.lo, near.lo), near.error)
    better, _ = _refined(part, start, fine_product, 3)
    hi, lo = close.hi.clone(), close.lo.clone()
    hi[poor], lo[poor] = better.hi, better.lo
    return Inverted(m, Pair(hi, lo, close.error), s, 6)


def _finite_inverse(x: Tensor) -> Tensor:
    """The inverse by LU, of the matrix moved in its last bits where a pivot is zero; finite in any case."""
    y, info = lapack.inverse(x)
    bad = ((info != 0) | ~y.isfinite().flatten(1).all(1)).nonzero().flatten()
    if bad.numel():
        y[bad] = lapack.inverse(x[bad] + 2.0**-52 * _noise(x))[0]
    return y.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _noise(x: Tensor) -> Tensor:
    """A matrix (n, n) of normal numbers, always the same."""
    return torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(SEED), dtype=x.dtype, device="cpu").to(
        x.device
    )


def _refined(m: Pair, close: Pair, times: Product, steps: int) -> tuple[Pair, Tensor]:
    """Steps Y ← Y + Y(I − MY), and the residual before the last of them."""
    close = Pair(close.hi, close.lo, torch.zeros_like(close.error))
    r = close.hi
    for _ in range(steps):
        r, _ = minus(eye_like(m.hi), times(m, close))
        # Not a contraction: a step would make it worse, and the bound will say so.
        part = torch.where((norm(r) < 1)[:, None, None], r, 0.0)
        # Where uκ > 1, YR needs more than float64, or its rounding would be as large a residual again.
        d = pair(close.hi @ part) if times is product else product(close, pair(part))
        hi, low = two_sum(close.hi, d.hi)
        close = Pair(hi, low + (close.lo + d.lo), close.error)
    return close, r
