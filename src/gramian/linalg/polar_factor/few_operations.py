"""Composed odd polynomials for small matrices, on which a call of torch's costs as much as its arithmetic.

A step is a Gram matrix G, its polynomial, and a product with X. `torch.baddbmm` takes a product and adds it, so that a
quintic is three calls, and a step of degree 9 is six. `few_passes` has what is faster for larger ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.linalg.engine.precision import full_products, without_autocast
from gramian.linalg.engine.scaling import peak
from gramian.linalg.engine.workspace import scratch
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
    most = max(1, CHUNK // x[0].numel()) if kind == "cpu" else len(x)
    with torch.no_grad(), without_autocast(kind), full_products():
        coefficients = _coefficients(low, steps, first)
        if len(x) <= most:
            _polar(coefficients, x.detach(), found)
        else:
            for part, place in zip(x.detach().split(most), found.split(most), strict=True):
                _polar(coefficients, part, place)
    return found


@lru_cache(maxsize=64)
def _coefficients(low: float, steps: int, first: int) -> list[tuple[float, ...]]:
    """Those of `composed(low, steps, first)`, with `SAFETY` in all but the last."""
    factors = [SAFETY] * (steps - 1) + [1.0]
    return [
        tuple(c / factor ** (2 * k + 1) for k, c in enumerate(step))
        for step, factor in zip(composed(low, steps, first).coefficients, factors, strict=True)
    ]


def _polar(coefficients: Sequence[Sequence[float]], x: Tensor, out: Tensor) -> None:
    shape, side, tall = tuple(x.shape), min(x.shape[-2:]), x.shape[-2] > x.shape[-1]
    gram, *spare = (scratch(f"few operations: {k}", (shape[0], side, side), torch.float32, x) for k in range(4))
    ys = [scratch(f"few operations: {name}", shape, torch.float32, x) for name in ("x", "y")]
    y = x if x.dtype == torch.float32 else ys[1].copy_(x)
    norm = torch.linalg.vector_norm(_gram(y, gram, tall), dim=(-2, -1), keepdim=True)
    if x.device.type != "cpu" or not all(NORMAL[0] < value < NORMAL[1] for value in norm.flatten().tolist()):
        is_normal = (norm > NORMAL[0]) & (norm < NORMAL[1])  # a matrix stays as it is, whatever its neighbors are
        size = peak(x, (-2, -1)).clamp_min(torch.finfo(x.dtype).tiny)
        y = torch.where(is_normal, x, x / size).float()
        norm = torch.linalg.vector_norm(_gram(y, gram, tall), dim=(-2, -1), keepdim=True)
        norm.masked_fill_(norm == 0, torch.inf)
    scale = norm.reciprocal_().mul_(SAFETY**-2)
    gram.mul_(scale)
    y = torch.mul(y, scale.sqrt_(), out=ys[0])
    for i, c in enumerate(coefficients):
        p = _polynomial(_gram(y, gram, tall) if i else gram, c, spare)
        into = ys[(i + 1) % 2] if i < len(coefficients) - 1 or out.dtype != torch.float32 else out
        y = torch.baddbmm(y, *((y, p) if tall else (p, y)), beta=c[0], out=into)
    if y is not out:
        out.copy_(y)


def _gram(y: Tensor, out: Tensor, tall: bool) -> Tensor:
    """The Gram matrix on the shorter side, in `out`."""
    return torch.bmm(y.mT, y, out=out) if tall else torch.bmm(y, y.mT, out=out)


def _polynomial(gram: Tensor, c: Sequence[float], spare: Sequence[Tensor]) -> Tensor:
    """c₁G + c₂G² + …, without the constant, in one of the spare matrices. It overwrites the others, and perhaps G."""
    if len(c) == 3:
        return torch.baddbmm(gram, gram, gram, beta=c[1], alpha=c[2], out=spare[0])
    # c₁G + c₂S + c₃GS + c₄S² = c₁(G + c₂/c₁ S) + c₃ S (G + c₄/c₃ S), with S = G².
    square = torch.bmm(gram, gram, out=spare[0])
    second = torch.add(gram, square, alpha=c[4] / c[3], out=spare[1])
    first = gram.add_(square, alpha=c[2] / c[1])
    return torch.baddbmm(first, square, second, beta=c[1], alpha=c[3], out=spare[2])
