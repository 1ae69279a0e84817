"""The polar factor by Newton–Schulz steps with Polar Express coefficients: batched products, no synchronization."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.linalg.engine.precision import without_autocast
from gramian.linalg.polar_factor.zolotarev import CHUNK

COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749753, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.875, -1.25, 0.375),
)
"""Minimax odd quintics a·x + b·x³ + c·x⁵ composed on [1e-3, 1], and then the plain quintic Newton–Schulz step.
Amsel, Persson, Musco, Gower, arXiv:2505.16932, algorithm 1 with cushion 0.02407327424182761 (§4.4)."""

CUSHION = 0.02407327424182761
"""Least ratio of the ends of the interval that a step before the last is made for. arXiv:2505.16932, §4.4."""

SAFETY = 1.01
"""Divides the argument of every step but the last, so that rounding cannot push a singular value out of the interval.
arXiv:2505.16932, §4.4."""

ROUNDED_SAFETY = {5: 1.03, 9: 1.05}
"""The same for composed polynomials in bfloat16, by the degree of the first, which exceeds its interval by 0.9 and
3.4 % (seen on matrices of low rank). The next steps magnify an excess ten times and more each: with 1 % the largest
singular values of a few matrices in a thousand ended between 3 and 1e9."""


class Steps(NamedTuple):
    """The coefficients of each step, of x, x³ and so on, and how far from 1 the last leaves what was in [low, 1]."""

    coefficients: tuple[tuple[float, ...], ...]
    error: float


@lru_cache(maxsize=64)
def composed(low: float, steps: int, first: int = 5) -> Steps:
    """Minimax odd quintics composed on [low, 1], each for the interval that the one before leaves, centered about 1.

    arXiv:2505.16932, algorithm 1; `COEFFICIENTS` begins with those for 1e-3, but for the last, which has no cushion.
    The first may be of degree 9, which lifts small values nearly twice as far, for one more small product.

    >>> round(composed(1 / 128, 3).error, 3), round(composed(1e-3, 9).error, 3)
    (0.354, 0.0)
    >>> round(composed(1 / 128, 3, first=9).error, 3)
    0.182
    """
    found, high = [], 1.0
    for step in range(steps):
        degree = 5 if step else first
        coefficients = _minimax(low if step == steps - 1 else max(low, CUSHION * high), high, degree)
        ends = [_value(coefficients, x) for x in (low, high)]
        found.append(tuple(2 * c / sum(ends) for c in coefficients))
        low = 2 * ends[0] / sum(ends)
        high = 2 - low
    return Steps(tuple(found), 1 - low)


def _value(coefficients: Sequence[float], x: float) -> float:
    value = 0.0
    for c in reversed(coefficients):
        value = value * x * x + c
    return value * x


def _minimax(low: float, high: float, degree: int) -> tuple[float, ...]:
    """The odd polynomial of that degree closest to 1 on [low, high], by Remez exchange of the extrema inside."""
    if degree == 5 and low > 0.9 * high:
        return COEFFICIENTS[-1]  # the nodes below would all but coincide
    count = (degree + 1) // 2
    half = (high - low) / 2
    inner = [(low + high) / 2 - half * math.cos(math.pi * i / count) for i in range(1, count)]
    found: list[float] = []
    for _ in range(100):
        nodes = [low, *inner, high]
        rows = [[*(x ** (2 * k + 1) for k in range(count)), (-1.0) ** i] for i, x in enumerate(nodes)]
        right = torch.ones(count + 1, dtype=torch.float64, device="cpu")
        matrix = torch.tensor(rows, dtype=torch.float64, device="cpu")
        found = torch.linalg.solve(matrix, right).tolist()[:count]
        # The derivative is a polynomial of x², whose roots are the eigenvalues of its companion.
        slope = [(2 * k + 1) * c for k, c in enumerate(found)]
        companion = torch.diag(torch.ones(count - 2, dtype=torch.float64, device="cpu"), -1)
        companion[:, -1] = torch.tensor([-c / slope[-1] for c in slope[:-1]], dtype=torch.float64, device="cpu")
        new = [math.sqrt(max(root.real, 0.0)) for root in torch.linalg.eigvals(companion).tolist()]
        change = max(abs(x - y) for x, y in zip(inner, sorted(new), strict=True))
        inner = sorted(new)
        if change < 1e-12 * high:
            break
    return tuple(found)


def in_parts(a: Tensor, run: Callable[[Tensor], Tensor], out: Tensor | None = None) -> Tensor:
    """`run` of the matrices (B, m, n) of a, as many at once as fit the cache of a CPU, without a graph or autocast.

    Written to `out`, if it is given, which may be `a` itself.
    """
    with torch.no_grad(), without_autocast(a.device.type):
        x = a.detach() if a.ndim == 3 else a.detach().reshape(math.prod(a.shape[:-2]), *a.shape[-2:])
        if not x.numel():
            return a.clone()
        few = max(1, CHUNK // x[0].numel()) if x.device.type == "cpu" else len(x)
        found = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out.view(x.shape)
        for part, place in zip(x.split(few), found.split(few), strict=True):
            place.copy_(run(part))
        return found.reshape(a.shape) if out is None else out


def newton_schulz(
    a: Float[Tensor, "*b m n"], *, steps: int = 7, dtype: torch.dtype | None = None
) -> Float[Tensor, "*b m n"]:
    """Approximate polar factor of each matrix: X ← aX + (bXXᵀ + c(XXᵀ)²)X on the smaller side.

    `steps` take three products each, in `dtype`; in float32 (float64 for float64) if None. A zero matrix gives zero,
    NaN stays in its own matrix, and each matrix is scaled by itself.
    """
    compute = dtype or (torch.float64 if a.dtype == torch.float64 else torch.float32)
    tall = a.shape[-2] > a.shape[-1]
    m, n = min(a.shape[-2:]), max(a.shape[-2:])
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        x = (a.mT if tall else a).reshape(math.prod(a.shape[:-2]), m, n)
        x = x.to(torch.promote_types(compute, torch.float32))
        if x.numel():
            tiny = torch.finfo(x.dtype).tiny
            # Two divisions: the norm of entries near 1e30 overflows before they are divided by the largest.
            x = x / x.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
            x = x / (x.norm(dim=(-2, -1), keepdim=True) * SAFETY).clamp_min(tiny)
            # A bfloat16 product into a transposed buffer has no fast kernel on a CPU: a thousand times slower.
            x = x.to(compute, memory_format=torch.contiguous_format)
            plain = [COEFFICIENTS[-1]] * (steps - len(COEFFICIENTS))
            x = _iterate(x, [*COEFFICIENTS[:steps], *plain], min(steps, len(COEFFICIENTS)) - 1)
        x = x.reshape(*a.shape[:-2], m, n)
        return (x.mT if tall else x).to(a.dtype)


def _iterate(x: Tensor, coefficients: Sequence[Sequence[float]], num_safe: int) -> Tensor:
    """A step for each of the coefficients, on (B, m, n) with m ≤ n, the first `num_safe` with `SAFETY`.

    In four buffers whatever the number of steps; x itself is one of them.
    """
    gram = x.new_empty(x.shape[0], x.shape[1], x.shape[1])
    poly, spare = torch.empty_like(gram), torch.empty_like(x)
    for i, (a, b, c) in enumerate(coefficients):
        if i < num_safe:
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
