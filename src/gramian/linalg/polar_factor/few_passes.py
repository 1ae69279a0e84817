"""Composed quintics for stacks of small or long matrices: few passes over memory, and pairs of steps on a Gram matrix.

Where the longer side is large, products with X cost the most. Two steps are then one polynomial of the Gram matrix,
P₂(G₁) P₁(G₀) with G₁ = P₁² G₀: two products with X in place of four, and five small ones in place of two. More than two
steps on one Gram matrix would magnify its rounding, which makes small eigenvalues negative. In bfloat16 only the last
two are a pair: what a pair rounds throws large singular values out of the interval that the next step is made for,
which then grow without bound (seen in 5 % of matrices whose singular values fall by three decades).

A step is cG² + bG + a = c((G + hI)² + eI): a square, and two sums with a diagonal in place of sums with whole matrices.
Its factor c is left out, which changes the unit of X: that of the first argument is chosen so that the last is 1. The
first may be of degree 9: two such factors, of which the second takes a sum with a matrix in place of another square.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.linalg.engine.precision import full_products
from gramian.linalg.engine.scaling import unit_peak
from gramian.linalg.engine.workspace import scratch
from gramian.linalg.polar_factor.newton_schulz import ROUNDED_SAFETY, SAFETY, composed, in_parts

PAIRED_FROM = 2.0
"""Least ratio of the sides from which steps go in pairs: 4r + 2 small products against 2r + 5."""

NORMAL = 2.0**-50, 2.0**50
"""Norms of a Gram matrix between which neither the squares of its entries nor its matrix need care in float32."""


class Squares(NamedTuple):
    """The unit in which the first argument stands, with room for the bound of its norm, and the factors of each step.

    A step has h and e of (G + hI)² + eI. One of degree 9 also has d and k of its second factor, the first one plus
    d(G + hI) + kI.
    """

    unit: float
    steps: tuple[tuple[float, ...], ...]


def few_passes(
    a: Float[Tensor, "*b m n"],
    *,
    low: float,
    steps: int,
    first: int = 5,
    dtype: torch.dtype | None = None,
    out: Float[Tensor, "*b m n"] | None = None,
    close: bool = False,
) -> Float[Tensor, "*b m n"]:
    """Approximate polar factor of each matrix by `composed(low, steps, first)`, in products of `dtype` (float32).

    ‖XXᵀ‖_F^½ bounds ‖X‖₂ here, or, if `close`, ‖(XXᵀ)²‖_F^¼, for four more passes over a small matrix: 2 and 1.3 times
    ‖X‖₂ where entries are normal. Singular values below `low` of that end below 1. A zero matrix gives zero, NaN stays
    in its own matrix, and each matrix is scaled by itself. It is written to `out`, contiguous and perhaps `a`, if that
    is given.
    """
    wide = dtype is None or dtype == torch.float32
    with full_products() if wide else contextlib.nullcontext():
        s = squares(low, steps, first, SAFETY if wide else ROUNDED_SAFETY[first])
        return in_parts(a, partial(_polar, s, dtype or torch.float32, close), out)


def products(ratio: float, steps: int, first: int, dtype: torch.dtype) -> float:
    """How many products of n×n matrices the steps take where the sides are n and `ratio` n."""
    most = 1 if dtype == torch.bfloat16 else steps
    pairs = min(steps // 2, most) if ratio >= PAIRED_FROM else 0
    return pairs * (2 * ratio + 5) + (steps - 2 * pairs) * (2 * ratio + 1) + (first > 5)


@lru_cache(maxsize=64)
def squares(low: float, steps: int, first: int = 5, safety: float = SAFETY) -> Squares:
    """The steps of `composed(low, steps, first)`, with `safety` in all but the last, without their factors.

    Where Y = sX, a step is x q(x²) with q = c Π (x⁴ + b x² + a), and q(XXᵀ) = c/s⁴ᵏ Π (H² + s²bH + s⁴aI) of H = YYᵀ for
    k factors. The next Y is that product without c/s⁴ᵏ, times Y, so that its unit is s⁴ᵏ⁺¹/c.
    """
    unit, found = 1.0, []
    for i, coefficients in reversed(list(enumerate(composed(low, steps, first).coefficients))):
        margin = 1.0 if i == steps - 1 else safety
        c = [value / margin ** (2 * k + 1) for k, value in enumerate(coefficients)]
        unit = (unit * c[-1]) ** (1 / (2 * len(c) - 1))
        (b, a), *second = [(b * unit**2, a * unit**4) for b, a in _quadratics(c)]
        h = b / 2
        step = (h, a - h * h)
        for other_b, other_a in second:
            step += (other_b - b, other_a - a - (other_b - b) * h)
        found.append(step)
    return Squares(unit / safety, tuple(reversed(found)))


def _quadratics(c: Sequence[float]) -> list[tuple[float, float]]:
    """The b and a of t² + bt + a, whose product is c₀ + c₁t + …, of degree 2 or 4, over its last coefficient."""
    if len(c) == 3:
        return [(c[1] / c[2], c[0] / c[2])]
    companion = torch.diag(torch.ones(len(c) - 2, dtype=torch.float64, device="cpu"), -1)
    companion[:, -1] = torch.tensor([-value / c[-1] for value in c[:-1]], dtype=torch.float64, device="cpu")
    # In order of the real part, a pair of conjugates or of real roots each.
    roots = sorted(torch.linalg.eigvals(companion).tolist(), key=lambda root: (round(root.real, 9), root.imag))
    return [(-(p + q).real, (p * q).real) for p, q in zip(roots[::2], roots[1::2], strict=True)]


def _polar(s: Squares, dtype: torch.dtype, close: bool, x: Tensor) -> Tensor:
    """The steps on x (B, m, n); a scratch tensor, or a transposed one."""
    tall = x.shape[-2] > x.shape[-1]
    paired = max(x.shape[-2:]) >= PAIRED_FROM * min(x.shape[-2:])
    y = scratch("few passes: x", tuple(x.shape), dtype, x).copy_(x)
    turned = tall and not paired  # a product XᵀX takes longer than XXᵀ, but pairs take too few of them
    if turned:  # in two passes, since one that casts and transposes takes longer
        y = scratch("few passes: turned", tuple(x.mT.shape), dtype, x).copy_(y.mT)
    side = min(x.shape[-2:])
    gram = scratch("few passes: gram", (len(x), side, side), dtype, x)
    norm = _gram(y, gram)
    if x.device.type != "cpu" or not all(NORMAL[0] < value < NORMAL[1] for value in norm.flatten().tolist()):
        y.copy_(unit_peak(x.mT if turned else x, torch.float32))
        norm = _gram(y, gram)
    square = None
    if close:
        square = torch.bmm(gram, gram, out=scratch("few passes: square", tuple(gram.shape), dtype, x))
        norm = _norm(square).sqrt()
    scale = torch.where(norm > 0, s.unit**2 / norm, 0.0)
    if square is not None:
        gram.mul_(scale)  # not rounded to bfloat16: terms of G and of G² cancel
        square.mul_(scale.square())
    else:
        # A factor in the dtype of what it multiplies: products of mixed dtypes have no fast kernel on a CPU.
        gram.mul_(scale.to(dtype))
    y = _iterate(s, y, gram, square, scale.sqrt().to(dtype), paired)
    return scratch("few passes: x", tuple(x.shape), dtype, x).copy_(y.mT) if turned else y


def _gram(y: Tensor, out: Tensor) -> Tensor:
    """The Gram matrix on the shorter side, in `out`; and its norm."""
    torch.bmm(y.mT, y, out=out) if y.shape[-2] > y.shape[-1] else torch.bmm(y, y.mT, out=out)
    return _norm(out)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).float()


def _iterate(s: Squares, y: Tensor, gram: Tensor, square: Tensor | None, scale: Tensor, paired: bool) -> Tensor:
    """The steps on scale · y, its Gram matrix on the shorter side, and perhaps its square. It overwrites them all."""
    spare = scratch("few passes: y", tuple(y.shape), y.dtype, y)
    small = [scratch(f"few passes: {k}", tuple(gram.shape), y.dtype, y) for k in range(4)]
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    tall = y.shape[-2] > y.shape[-1]
    rest, first = list(s.steps), True
    while rest:
        step, *rest = rest
        free = list(small)
        pair = paired and rest and (len(rest) == 1 or y.dtype != torch.bfloat16)
        before = diagonal.clone() if pair else None
        factor = _polynomial(gram, diagonal, step, free, square)
        square = None
        if before is not None:
            diagonal.copy_(before)
            # From both sides: the rounded factor does not commute with the Gram matrix.
            torch.bmm(torch.bmm(factor, gram, out=free[-1]), factor, out=gram)
            step, *rest = rest
            factor = torch.bmm(_polynomial(gram, diagonal, step, free), factor, out=free[-1])
        if first:
            factor.mul_(scale)
            first = False
        y, spare = torch.bmm(y, factor, out=spare) if tall else torch.bmm(factor, y, out=spare), y
        if rest:
            torch.bmm(y.mT, y, out=gram) if tall else torch.bmm(y, y.mT, out=gram)
    return y


def _polynomial(
    gram: Tensor, diagonal: Tensor, step: Sequence[float], free: list[Tensor], square: Tensor | None = None
) -> Tensor:
    """The polynomial of a step, in G², if given, or else in one of the free matrices, which are then free no more.

    G becomes G + hI.
    """
    h, e, *second = step
    if square is None:
        diagonal.add_(h)
        square = torch.bmm(gram, gram, out=free.pop())
    else:
        square.add_(gram, alpha=2 * h)
        square.diagonal(dim1=-2, dim2=-1).add_(h * h)
        diagonal.add_(h)
    square.diagonal(dim1=-2, dim2=-1).add_(e)
    if not second:
        return square
    other = torch.add(square, gram, alpha=second[0], out=free.pop())
    other.diagonal(dim1=-2, dim2=-1).add_(second[1])
    product = torch.bmm(square, other, out=free.pop())
    free += [square, other]
    return product
