"""Composed odd polynomials for small matrices, on which a call of torch's costs as much as its arithmetic.

A step is a Gram matrix G, its polynomial, and a product with X. `torch.baddbmm` takes a product and adds it, so that a
quintic is three calls, and a step of degree 9 is six. `few_passes` has what is faster for larger ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.linalg.engine.precision import full_products, without_autocast
from gramian.linalg.engine.scaling import peak
from gramian.linalg.engine.workspace import arranged
from gramian.linalg.polar_factor.few_passes import NORMAL, PAIRED_FROM
from gramian.linalg.polar_factor.newton_schulz import SAFETY, composed
from gramian.linalg.polar_factor.zolotarev import CHUNK

__all__ = ["few_operations", "is_small"]

LARGEST = 1 << 16
"""Entries of a matrix up to which this is faster on a CPU."""

MOST_WORK = 1 << 20
"""Multiplications of a long matrix's Gram matrix above which `few_passes`, two steps at a time, is faster."""


def is_small(m: int, n: int) -> bool:
    """Whether this is the faster way for matrices of that shape, on a CPU and in float32."""
    short, long = (m, n) if m < n else (n, m)
    return m * n <= LARGEST if long < PAIRED_FROM * short else short * short * long <= MOST_WORK


def few_operations(
    x: Float[Tensor, "b m n"], *, low: float, steps: int, first: int = 5, out: Float[Tensor, "b m n"] | None = None
) -> Float[Tensor, "b m n"]:
    """Approximate polar factor of each matrix by `composed(low, steps, first)`, in products of float32.

    As `few_passes` has it, up to rounding: with the same bound of the norm, for the same singular values. Written to
    `out`, if it is given, which may be `x` itself.
    """
    if not x.numel():
        return x.clone()
    found = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    kind = x.device.type
    most = max(1, CHUNK // x[0].numel()) if kind == "cpu" and x.numel() > CHUNK else len(x)
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext(), without_autocast(kind), full_products():
        coefficients = _coefficients(low, steps, first)
        if len(x) <= most:
            _polar(coefficients, x.detach(), found)
        else:
            for part, place in zip(x.detach().split(most), found.split(most), strict=True):
                _polar(coefficients, part, place)
    return found


@lru_cache(maxsize=64)
def _coefficients(low: float, steps: int, first: int) -> list[tuple[float, ...]]:
    """Those of `composed(low, steps, first)`, with `SAFETY` before and after all but the last.

    That before the first is for the bound of the norm.
    """
    bounded = [SAFETY] + [1.0] * (steps - 1)
    factors = [SAFETY] * (steps - 1) + [1.0]
    return [
        tuple(c / (factor * safe) ** (2 * k + 1) for k, c in enumerate(step))
        for step, factor, safe in zip(composed(low, steps, first).coefficients, factors, bounded, strict=True)
    ]


class _Room(NamedTuple):
    """The memory of a call: Gram matrices, two of the size of x with their transposes, and norms (K, 1, 1) and (K,)."""

    gram: Tensor
    spare: list[Tensor]
    ys: list[tuple[Tensor, Tensor]]
    norm: Tensor
    norms: Tensor


def _room(x: Tensor) -> _Room:
    num, m, n = shape = tuple(x.shape)
    side = min(m, n)
    square, whole = num * side * side, num * m * n

    def make(memory: Tensor) -> _Room:
        *grams, first, second, norms = memory.split([square] * 4 + [whole] * 2 + [num])
        gram, *spare = (part.view(num, side, side) for part in grams)
        ys = [(part.view(shape), part.view(shape).mT) for part in (first, second)]
        return _Room(gram, spare, ys, norms.view(num, 1, 1), norms)

    return arranged("few operations", shape, 4 * square + 2 * whole + num, torch.float32, x, make)


def _polar(coefficients: Sequence[Sequence[float]], x: Tensor, out: Tensor) -> None:
    tall = x.shape[-2] > x.shape[-1]
    gram, spare, ys, norm, norms = _room(x)
    y = x if x.dtype == torch.float32 else ys[1][0].copy_(x)
    torch.linalg.vector_norm(_gram(y, y.mT, gram, tall), dim=(-2, -1), keepdim=True, out=norm)
    if x.device.type != "cpu" or not all(NORMAL[0] < value < NORMAL[1] for value in norms.tolist()):
        is_normal = (norm > NORMAL[0]) & (norm < NORMAL[1])  # a matrix stays as it is, whatever its neighbors are
        size = peak(x, (-2, -1)).clamp_min(torch.finfo(x.dtype).tiny)
        y = torch.where(is_normal, x, x / size).float()
        torch.linalg.vector_norm(_gram(y, y.mT, gram, tall), dim=(-2, -1), keepdim=True, out=norm)
        norm.masked_fill_(norm == 0, torch.inf)
    gram.div_(norm)
    y = torch.mul(y, norm.rsqrt_(), out=ys[0][0])
    for i, c in enumerate(coefficients):
        p = _polynomial(_gram(*ys[i % 2], gram, tall) if i else gram, c, spare)
        into = ys[(i + 1) % 2][0] if i < len(coefficients) - 1 or out.dtype != torch.float32 else out
        y = torch.baddbmm(y, *((y, p) if tall else (p, y)), beta=c[0], out=into)
    if y is not out:
        out.copy_(y)


def _gram(y: Tensor, turned: Tensor, out: Tensor, tall: bool) -> Tensor:
    """The Gram matrix of y, `turned` its transpose, on the shorter side, in `out`."""
    return torch.bmm(turned, y, out=out) if tall else torch.bmm(y, turned, out=out)


def _polynomial(gram: Tensor, c: Sequence[float], spare: Sequence[Tensor]) -> Tensor:
    """c₁G + c₂G² + …, without the constant, in one of the spare matrices. It overwrites the others, and perhaps G."""
    if len(c) == 3:
        return torch.baddbmm(gram, gram, gram, beta=c[1], alpha=c[2], out=spare[0])
    # c₁G + c₂S + c₃GS + c₄S² = c₁(G + c₂/c₁ S) + c₃ S (G + c₄/c₃ S), with S = G².
    square = torch.bmm(gram, gram, out=spare[0])
    second = torch.add(gram, square, alpha=c[4] / c[3], out=spare[1])
    first = gram.add_(square, alpha=c[2] / c[1])
    return torch.baddbmm(first, square, second, beta=c[1], alpha=c[3], out=spare[2])
