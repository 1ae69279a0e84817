"""The cheapest way to a polar factor of a few per cent, for the direction of an optimizer's step, with no certificate.

`rtol` is the root mean square of σ − 1 over the singular values of the answer. It holds for singular values of A above
`least_ratio` times the largest; smaller ones end between 0 and 1, as in every such method. In the spectra of n×n normal
entries or σᵢ = 1/i, a few per cent are below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from gramian.linalg.engine.cost import Operations, defaults, predict
from gramian.linalg.polar_factor.few_passes import few_passes, products
from gramian.linalg.polar_factor.newton_schulz import composed
from gramian.linalg.polar_factor.zolotarev import LEAST, fractions, zolotarev

MOST = 12
"""Steps or terms beyond which nothing is gained."""

HALF = 0.05
"""Least rtol for which products are taken in bfloat16: its rounding leaves 0.02 to 0.03."""

NARROW = 64
"""Least smaller side for which they are: below it they take as long as in float32."""

GRAM = 5e-3
"""Least rtol for which the Gram matrix in float32 is good enough."""

ASSUMED_BATCH = 8
"""The batch size for which the cost is predicted, whatever the batch: a direction must not depend on its batch, which
differs between one process and several."""

WIDE = 100
"""The least σ₁/σ_n that is allowed for at rtol 0.1: even a few rows may differ much."""


class Approach(NamedTuple):
    """A method, its steps or terms, the dtype of its products, and the least σ/σ₁ that its coefficients allow for."""

    method: str
    steps: int
    dtype: torch.dtype
    low: float


def least_ratio(short: int, rtol: float) -> float:
    """The least σ/σ₁ that is allowed for in matrices of that shorter side."""
    return max(LEAST, min(1.0, 10 * rtol) / max(short, WIDE))


@lru_cache(maxsize=1024)
def cheapest(short: int, long: int, batch: int, rtol: float, device: str) -> Approach:
    """The cheapest approach by the default constants of `cost`: a run takes the same steps on any machine.

    Kept, since an optimizer asks in every step.
    """
    costs = defaults("cpu" if device == "cpu" else "cuda")
    low, ratio = least_ratio(short, rtol), long / max(short, 1)
    best, least = Approach("newton_schulz", MOST, torch.float32, low), math.inf
    for candidate, operations in _candidates(low, ratio, rtol, half=rtol >= HALF and short >= NARROW):
        seconds = predict(operations, short, batch, costs)
        if seconds < least:
            best, least = candidate, seconds
    return best


def _candidates(low: float, ratio: float, rtol: float, *, half: bool) -> Iterator[tuple[Approach, Operations]]:
    """The approaches that reach `rtol`. Their errors equioscillate: the root mean square is 1/√2 of the largest."""
    dtypes = [torch.float32] + [torch.bfloat16] * half
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        for steps in range(1, MOST + 1):
            if composed(low, steps).error < rtol * math.sqrt(2):
                yield Approach("newton_schulz", steps, dtype, low), {name: products(ratio, steps, 5, dtype)}
                break
        for terms in range(1, MOST + 1):
            if rtol >= GRAM and fractions(low, terms).error < rtol * math.sqrt(2):
                # The Gram matrix is halved; what is left out is worth a third of a product with A.
                operations: dict[str, float] = {"float32": 1.0 * ratio + 0.5, "cholesky32": terms, "potri32": terms}
                operations[name] = operations.get(name, 0.0) + ratio
                yield Approach("zolotarev", terms, dtype, low), operations
                break


def direction(a: Tensor, rtol: float) -> tuple[Tensor, Approach]:
    """The polar factor of each matrix to `rtol`, and how it was found; it does not synchronize a GPU."""
    short, long = sorted(a.shape[-2:])
    p = cheapest(short, long, ASSUMED_BATCH, rtol, a.device.type)
    if p.method == "zolotarev":
        return zolotarev(a, low=p.low, terms=p.steps, dtype=p.dtype), p
    return few_passes(a, low=p.low, steps=p.steps, dtype=p.dtype, close=True), p
