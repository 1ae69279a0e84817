"""The exponential of matrices by scaling and squaring, with a bound on everything that it rounds and truncates.

e^A = (e^(A/2ˢ))^(2ˢ): a Taylor polynomial at the scaled matrix, by Paterson and Stockmeyer's scheme, whose degree and s
are the cheapest for which the remainder is negligible. The remainder is bounded by α = max(‖Aᵖ‖^(1/p),
‖Aᵖ⁺¹‖^(1/(p+1))) in place of ‖A‖, which is much less for non-normal matrices (Al-Mohy and Higham, SIAM J. Matrix Anal.
Appl. 31 (2009), theorem 4.2). The rounding of each product is bounded, and carried through the squarings:
‖(X + E)² − X²‖_F ≤ (2‖X‖₂ + ‖E‖_F) ‖E‖_F.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gramian.linalg.engine.double_double import Pair, Product, eye_like, pair, product, two_sum, unbounded
from gramian.linalg.engine.rounding import U, gamma, norm
from gramian.linalg.engine.scaling import exponent_of, scale, scaled_alike

SCHEMES = ((4, 2), (9, 3), (16, 4), (25, 5), (36, 6))
"""Degree and block of Paterson and Stockmeyer's scheme: j − 1 products for the powers, degree/j − 1 for the rest."""

REMAINDER, FINE_REMAINDER = 2.0**-57, 2.0**-84
"""The remainder of the Taylor series for plain and for double-double products; it is bounded after the fact."""

SQUARINGS = 64
"""Beyond so many, rounding alone leaves no digit."""

SMALL = 64
"""Up to this side a few more products for a tight bound on ‖X‖₂ cost little."""

SPLITTER = 2.0**27 + 1


class Exponential(NamedTuple):
    """e^A = 2^exponent · value, with an absolute error on the scale of the value; inf where nothing is known."""

    value: Pair
    exponent: Tensor
    squarings: int
    remainder: Tensor


def two_norm(x: Tensor) -> Tensor:
    """An upper bound on ‖X‖₂ of each matrix (B, n, n) with entries of at most about 1."""
    if not x[0:1].numel():
        return x.new_zeros(x.shape[0])
    size = x.abs()
    bound = norm(x).minimum((size.sum(-1).amax(-1) * size.sum(-2).amax(-1)).sqrt())
    if x.shape[-1] <= SMALL:
        # ‖G‖_F^(1/8) for G = (XᵀX)⁴ is at most n^(1/16) too large; a tiny entry that underflows is nothing beside u.
        g = x.mT @ x
        g = g @ g
        bound = bound.minimum(norm(g @ g) ** 0.125)
    return bound * (1 + 64 * (x.shape[-1] + 8) * U)


def exponential(
    a: Pair, times: Product, schemes: Sequence[tuple[int, int]] = SCHEMES, *, bounded: bool = True
) -> Exponential:
    """e^A of each matrix, in double-double arithmetic if `times` is `product`.

    With one scheme, what a matrix gets does not depend on the others in the batch. If not `bounded`, the error is of no
    use.
    """
    n = a.hi.shape[-1]
    if not a.hi[0:1].numel():
        zero = torch.zeros(a.hi.shape[0], dtype=torch.long, device=a.hi.device)
        return Exponential(pair(a.hi), zero, 0, zero.double())
    fine = times is product
    start = _exponent_above(norm(a.hi))
    b = _scaled(a, -start)
    powers = [b, times(b, b)]
    powers.append(times(b, powers[1]))
    sizes = [_size(x, k + 1) for k, x in enumerate(powers)]
    squarings, (degree, block) = _plan(sizes, start, fine, schemes)
    while len(powers) < block:
        powers.append(times(b, powers[-1]))
        sizes.append(_size(powers[-1], len(powers)))
    hopeless = squarings > SQUARINGS
    squarings = torch.where(hopeless, 0, squarings)
    alpha = scale(_alpha(sizes, degree), start - squarings)
    powers = [_scaled(x, (k + 1) * (start - squarings)) for k, x in enumerate(powers[:block])]
    x = _taylor(powers, degree, times)
    small = alpha < degree / 2 + 1
    tail = math.sqrt(n) * alpha ** (degree + 1) / float(math.factorial(degree + 1)) / (1 - alpha / (degree + 2))
    error = torch.where(small & ~hopeless, x.error + tail * (1 + 2.0**-40), math.inf)
    error = torch.where((norm(a.hi) == 0) & (norm(a.lo) == 0) & (a.error == 0), 0.0, error)  # the identity, exactly
    remainder = tail / norm(x.hi)
    exponent = torch.zeros_like(squarings)
    most = int(squarings.max()) if len(squarings) else 0
    hi, lo = x.hi, x.lo.contiguous()
    for k in range(most):
        rows = (squarings > k).nonzero().flatten()
        part, tiny, blur = hi[rows], lo[rows], error[rows]
        square = times(Pair(part, tiny, torch.zeros_like(blur)), Pair(part, tiny, torch.zeros_like(blur)))
        # A pair's low part is at most a few roundings of its high part.
        if bounded:
            blur = (2 * (two_norm(part) + norm(tiny)) + blur) * blur + square.error
        down = exponent_of(square.hi)
        # The bit by which entries may still grow does no harm, and what scales is exact.
        hi[rows], lo[rows], error[rows] = _scaled(square._replace(error=blur), -down)
        exponent[rows] = 2 * exponent[rows] + down
    error = error.nan_to_num(nan=math.inf)
    return Exponential(Pair(hi, lo, error), exponent, most, remainder)


def _exponent_above(size: Tensor) -> Tensor:
    """The least e ≥ −1000 with size < 2^e; 0 for zero and what is not finite."""
    e = torch.frexp(size).exponent.long()
    return torch.where((size > 0) & size.isfinite(), e, 0)


def _size(x: Pair, k: int) -> Tensor:
    """‖Aᵏ‖₂^(1/k), with what is known of the error of Aᵏ."""
    return (two_norm(x.hi) + norm(x.lo) + x.error) ** (1 / k)


def _alpha(sizes: list[Tensor], degree: int) -> Tensor:
    """α with ‖Aᵏ‖ ≤ αᵏ for all k > degree, from ‖Aᵏ‖^(1/k), k = 1, 2, 3 and more."""
    alpha = sizes[0].minimum(sizes[1].maximum(sizes[2]))  # p = 1, and p = 2: p(p − 1) = 2
    if len(sizes) > 3 and degree + 1 >= 6:
        alpha = alpha.minimum(sizes[2].maximum(sizes[3]))  # p = 3, p(p − 1) = 6
    return alpha


def _plan(
    sizes: list[Tensor], start: Tensor, fine: bool, schemes: Sequence[tuple[int, int]]
) -> tuple[Tensor, tuple[int, int]]:
    """The scheme with the fewest products for the batch, and the squarings (B,) of each matrix."""
    alpha = _alpha(sizes, 0)
    need = torch.where(alpha > 0, alpha.log2() + start, -math.inf).nan_to_num(nan=1e9, posinf=1e9)
    most = float(need.max()) if len(need) else 0.0
    target = FINE_REMAINDER if fine else REMAINDER

    def room(degree: int) -> float:
        """log₂ θ."""
        return math.log2(target * float(math.factorial(degree + 1))) / (degree + 1)

    def cost(scheme: tuple[int, int]) -> float:
        degree, block = scheme
        return block - 1 + degree // block - 1 + min(max(math.ceil(most - room(degree)), 0), SQUARINGS)

    best = min(schemes, key=cost)
    return (need - room(best[0])).ceil().clamp(0, 1e9).long(), best


def _scaled(x: Pair, exponent: Tensor) -> Pair:
    return Pair(*scaled_alike(x, exponent))


def _taylor(powers: list[Pair], degree: int, times: Product) -> Pair:
    """Σₖ Aᵏ/k! for k ≤ degree, from A … Aʲ."""
    block = len(powers)
    rows = degree // block
    part, add = (_fine_part(powers), _sum) if times is product else (_plain_part(powers, times), _plain_sum)
    total = part((rows - 1) * block, block + 1)
    for i in range(rows - 2, -1, -1):
        total = add(times(total, powers[-1]), part(i * block, block))
    return total


Part = Callable[[int, int], Pair]
"""Σ Aᵏ/(first + k)! for k < count, from `first` and `count`."""


def _fine_part(powers: list[Pair]) -> Part:
    def part(first: int, count: int) -> Pair:
        total = times_number(eye_like(powers[0].hi), first)
        for k in range(1, count):
            total = _sum(total, times_number(powers[k - 1], first + k))
        return total

    return part


def _plain_part(powers: list[Pair], times: Product) -> Part:
    """In plain float64, with its rounding unless `times` has none either; what is low in the powers is dropped."""
    stack = torch.stack([x.hi for x in powers])
    lost = sizes = torch.zeros_like(stack[:, :, 0, 0])
    if times is not unbounded:
        lost = torch.stack([x.error + norm(x.lo) for x in powers])
        sizes = torch.linalg.vector_norm(stack, dim=(-2, -1))

    def part(first: int, count: int) -> Pair:
        start, *rest = (1 / math.factorial(first + k) for k in range(count))
        weights = stack.new_tensor(rest)
        total = torch.tensordot(weights, stack[: count - 1], 1)
        total.diagonal(dim1=-2, dim2=-1).add_(start)
        error = weights @ lost[: count - 1]
        if times is not unbounded:
            whole = weights @ sizes[: count - 1] + start * math.sqrt(total.shape[-1])
            error = (error + gamma(count + 3) * whole) * (1 + 2.0**-40)
        return pair(total)._replace(error=error)

    return part


def _plain_sum(a: Pair, b: Pair) -> Pair:
    value = a.hi + b.hi
    return Pair(value, a.lo, a.error + b.error + 2 * U * norm(value))


def times_number(x: Pair, k: int) -> Pair:
    """x/k!, as a pair."""
    exact = math.factorial(k)
    c = 1 / exact
    # 1/k! = c + low, from integers, so that nothing is lost.
    numerator, denominator = c.as_integer_ratio()
    low = (denominator - numerator * exact) / (denominator * exact)
    p, e = two_product(x.hi, c)
    rest = e + (x.hi * low + x.lo * c)
    local = 4 * U * (U * c * norm(x.hi) + c * norm(x.lo)) + 2 * U * U * c * norm(x.hi)
    return Pair(p, rest, c * x.error * (1 + 4 * U) + local)


def two_product(x: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """The product and its rounding error, exactly. Dekker; Higham, Accuracy and Stability (2002), problem 2.9."""
    p = x * c
    big = SPLITTER * x
    high = big - (big - x)
    low = x - high
    c_high = SPLITTER * c - (SPLITTER * c - c)
    c_low = c - c_high
    return p, low * c_low - (((p - high * c_high) - low * c_high) - high * c_low)


def _sum(a: Pair, b: Pair) -> Pair:
    hi, low = two_sum(a.hi, b.hi)
    rest = low + (a.lo + b.lo)
    return Pair(hi, rest, a.error + b.error + 2 * U * (norm(low) + norm(a.lo) + norm(b.lo)) * (1 + gamma(3)))
