"""Double-double arithmetic: products and sums of float64 matrices to about 24 more bits, from float64 products.

A pair is an unevaluated sum hi + lo with |lo| far below |hi|. A product splits each factor into a leading part of few
bits, whose product float64 holds exactly whatever the order of summation, and a remainder:
AB = A₁B₁ + A₁(B − B₁) + (A − A₁)B. Ozaki, Ogita, Oishi, Rump, Numer. Algorithms 59 (2012), §3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gramian.linalg.engine.rounding import U, gamma, norm
from gramian.linalg.engine.scaling import peak, pow2
from gramian.linalg.engine.thin import times

Product = Callable[["Pair", "Pair"], "Pair"]
"""`product` or `rough`: how an algorithm multiplies pairs."""

Factor = TypeVar("Factor")

PART = 1 << 16
"""Entries of a wide factor that are split at once, beside a thin one."""


class Pair(NamedTuple):
    """hi + lo, with a bound on the Frobenius distance from what it stands for."""

    hi: Tensor
    lo: Tensor
    error: Tensor


def pair(x: Tensor, lo: Tensor | None = None) -> Pair:
    """x as a pair that is exact."""
    return Pair(x, _unstored_zero(x) if lo is None else lo, x.new_zeros(x.shape[0]))


def _unstored_zero(x: Tensor) -> Tensor:
    """Zeros of the shape of x, one of which is stored: that spares memory and, in `norm`, its reading."""
    return x.new_zeros(()).expand_as(x)


def damped(x: Tensor, shift: Tensor) -> Pair:
    """x + shift·I for float64 x (B, n, n) and shift (B,), without rounding."""
    if x.device.type == "cpu" and not bool(shift.any()):
        return pair(x)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return Pair(*two_sum(x, shift[:, None, None] * eye), x.new_zeros(x.shape[0]))


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The sum and its rounding error, exactly. Knuth, TAOCP vol. 2, §4.2.2, theorem B."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def leading(x: Tensor, dim: int, bits: int) -> Tensor:
    """x rounded to `bits` bits below the largest entry along `dim`; the remainder x − leading(x) is exact."""
    _, exponent = torch.frexp(x.abs().amax(dim, keepdim=True))
    anchor = 1.5 * pow2(exponent.long() + 52 - bits)
    return (x + anchor) - anchor


def _split(a: Pair, b: Pair) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leading parts whose product float64 holds exactly, and remainders, of both factors."""
    bits = (53 - math.ceil(math.log2(a.hi.shape[-1]))) // 2
    a1, b1 = leading(a.hi, -1, bits), leading(b.hi, -2, bits)
    return a1, (a.hi - a1) + a.lo, b1, (b.hi - b1) + b.lo


def product(a: Pair, b: Pair) -> Pair:
    """a·b as a pair, with a rigorous bound on its Frobenius error."""
    k = a.hi.shape[-1]
    if not a.hi.numel() or not b.hi.numel():
        return pair(a.hi @ b.hi)
    a1, a2, b1, b2 = _split(a, b)
    head, tail = a1 @ b1, a1 @ b2 + a2 @ (b1 + b2)
    hi, lo = two_sum(head, tail)
    # a2 and b2 are each one rounding off, b1 + b2 one more, the two products k each, their sum one.
    local = gamma(k + 5) * (norm(a1) * norm(b2) + norm(a2) * norm(b.hi)) * (1 + 2.0**-20)
    passed = a.error * (norm(b.hi) + norm(b.lo) + b.error) + (norm(a.hi) + norm(a.lo)) * b.error
    return Pair(hi, lo, local + passed)


def thin_product(a: Pair, size: Tensor, z: Tensor) -> Pair:
    """As `product`, for an exact a with ‖a‖_F ≤ size and z (B, k, r) of few columns; it does not measure a's parts."""
    k = z.shape[-2]
    bits = (53 - math.ceil(math.log2(k))) // 2
    z1 = leading(z, -2, bits)
    z2 = z - z1
    left = torch.cat([z1, z2], -1).mT
    tops, heads, tails = [], [], []
    rows = max(64, PART // max(1, a.hi.shape[0] * k))  # parts that fit the cache, and reuse its memory pages
    for high, low in zip(a.hi.split(rows, -2), a.lo.split(rows, -2), strict=True):
        top = peak(high, (-1,))
        anchor = 1.5 * pow2(torch.frexp(top).exponent.long() + 52 - bits)
        a1 = (high + anchor).sub_(anchor)
        a2 = (high - a1).add_(low)
        # The thin factor on the left, by rows, is several times as fast.
        head, tail = (left @ a1.mT).split(z.shape[-1], -2)
        tops.append(top)
        heads.append(head)
        tails.append(tail + z.mT @ a2.mT)
    top, head, tail = torch.cat(tops, -2), torch.cat(heads, -1).mT, torch.cat(tails, -1).mT
    hi, lo = two_sum(head, tail)
    # |a2| is at most half a unit of the last bit kept, below 2^-bits of the row's peak, and a.lo far less.
    rest = 2.0**-bits * math.sqrt(k) * norm(top) * (1 + 2.0**-20)
    local = gamma(k + 5) * ((size + rest) * norm(z2) + rest * norm(z)) * (1 + 2.0**-20)
    return Pair(hi, lo, local)


def fine_product(a: Pair, b: Pair) -> Pair:
    """a·b of exact pairs as a pair, with a rounding 2⁻²⁴ times that of `product`: seven float64 products."""
    if not a.hi.numel() or not b.hi.numel():
        return pair(a.hi @ b.hi)
    (a1, a2, a3), (b1, b2, b3) = _slices(a, b)
    first, lost = two_sum(a1 @ b1, a1 @ b2)
    second, more = two_sum(first, a2 @ b1)
    rest = a1 @ b3 + a2 @ (b2 + b3) + a3 @ (b1 + (b2 + b3))
    hi, lo = two_sum(second, rest + (lost + more))
    bound = sum((row.norm(dim=-1) * column.norm(dim=-1) for row, column in rounding(a, b, fine_product)), 0 * a.error)
    return Pair(hi, lo, bound * (1 + 2.0**-20))


def _slices(a: Pair, b: Pair) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Both factors as sums of three; float64 holds the products of the first two of each exactly."""
    bits = (53 - math.ceil(math.log2(a.hi.shape[-1]))) // 2
    found = []
    for x, dim in ((a, -1), (b, -2)):
        first = leading(x.hi, dim, bits)
        left, tail = two_sum(x.hi - first, x.lo)
        second = leading(left, dim, bits)
        found.append((first, second, (left - second) + tail))
    return found


def rough(a: Pair, b: Pair) -> Pair:
    """a·b in plain float64 (the low parts dropped), with a rigorous bound on its Frobenius error."""
    high, low = norm(a.hi), norm(b.hi)
    local = gamma(a.hi.shape[-1]) * high * low
    passed = (a.error + norm(a.lo)) * (low + b.error + norm(b.lo)) + high * (b.error + norm(b.lo))
    value = a.hi @ b.hi
    return Pair(value, _unstored_zero(value), local + passed)


def thin_rough(a: Pair, size: Tensor, z: Tensor) -> Pair:
    """As `thin_product` in plain float64 (the low part dropped)."""
    value = times(a.hi, z)
    error = (gamma(z.shape[-2]) * size + norm(a.lo)) * norm(z)
    return Pair(value, _unstored_zero(value), error)


def unbounded(a: Pair, b: Pair) -> Pair:
    """As `rough`, without a bound."""
    value = a.hi @ b.hi
    return Pair(value, _unstored_zero(value), a.error)


def rounding(a: Pair, b: Pair, times: Product) -> list[tuple[Tensor, Tensor]]:
    """Rows r (B, m) and columns c (B, n) with |error of times(a, b)| ≤ Σ r cᵀ entrywise, for exact a and b.

    Where rows differ in size by many powers of ten, this is far tighter than one norm.
    """
    k = a.hi.shape[-1]
    if times is rough or not a.hi.numel() or not b.hi.numel():
        terms = [(a.hi, b.hi, gamma(k)), (a.lo, b.hi, 1.0), (a.hi, b.lo, 1.0), (a.lo, b.lo, 1.0)]
    elif times is fine_product:
        (a1, a2, a3), (_, b2, b3) = _slices(a, b)
        # The sums of the exact products lose a rounding of a rounding.
        once = gamma(k + 8)
        terms = [(a2, b2 + b3, once), (a1, b3, once), (a3, b.hi, once), (a.hi, b.hi, 16 * U * U)]
    else:
        a1, a2, _, b2 = _split(a, b)
        terms = [(a1, b2, gamma(k + 6)), (a2, b.hi, gamma(k + 6))]
    return [(factor * x.norm(dim=-1), y.norm(dim=-2)) for x, y, factor in terms]


def minus(a: Pair, b: Pair) -> tuple[Tensor, Tensor]:
    """a − b rounded to float64, and a bound on its Frobenius error."""
    high, low = two_sum(a.hi, -b.hi)
    rest = low + (a.lo - b.lo)
    value = high + rest
    return value, a.error + b.error + U * (norm(value) + 3 * (norm(low) + norm(a.lo) + norm(b.lo))) * 2


def plus(a: Pair, d: Tensor) -> Pair:
    """a + d, renormalized, as an exact pair: the caller bounds how far it is from what it approximates."""
    hi, lo = two_sum(a.hi, a.lo + d)
    return Pair(hi, lo, torch.zeros_like(a.error))


def power(x: Factor, p: int, times: Callable[[Factor, Factor], Factor]) -> Factor:
    """x^p of a pair, or a tensor, by repeated squaring."""
    if p == 1:
        return x
    half = power(x, p // 2, times)
    square = times(half, half)
    return times(square, x) if p % 2 else square


def transpose(a: Pair) -> Pair:
    """aᵀ."""
    return Pair(a.hi.mT, a.lo.mT, a.error)


def symmetric(a: Pair) -> Pair:
    """(a + aᵀ)/2, exactly symmetric, and exact by definition."""
    hi, low = two_sum(a.hi / 2, a.hi.mT / 2)
    return Pair(hi, low + (a.lo + a.lo.mT) / 2, torch.zeros_like(a.error))


def eye_like(x: Tensor) -> Pair:
    """The identity of the size of the columns of x (B, m, n), as a pair (B, n, n)."""
    n = x.shape[-1]
    return pair(torch.eye(n, dtype=x.dtype, device=x.device).expand(x.shape[0], n, n))
