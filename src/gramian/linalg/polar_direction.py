"""Which way to a polar factor is cheapest where an optimizer wants a direction: to a few per cent, with no certificate.

What is asked, `rtol`, is the root mean square of σ − 1 over the singular values of the answer. It is kept for singular
values above `reach` of the largest; smaller ones end between 0 and 1, as they do in every such method. In the spectra
of n×n normal entries or σᵢ = 1/i, a few per cent of them are below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gramian.linalg.cost import Parts, predict
from gramian.linalg.polar_express import composed, quintics
from gramian.linalg.polar_zolotarev import LEAST, fractions, zolotarev

MOST = 12
"""Steps or terms beyond which nothing is gained."""

HALF = 0.05
"""Least rtol for which products are taken in bfloat16: its rounding leaves 0.02 to 0.03."""

NARROW = 64
"""Least smaller side for which they are: below it they take as long as in float32."""

GRAM = 5e-3
"""Least rtol for which the Gram matrix in float32 is good enough."""


COMPANY = 8
"""Matrices in the batch that a plan is made for, whatever it holds: a direction must not depend on its company, which
differs between one process and several."""


WIDE = 100
"""Least ratio of the largest to the least singular value that is allowed for at rtol 0.1: few rows may differ much."""


class Plan(NamedTuple):
    """The function, its steps or terms, the dtype of its products, and the least singular value it is made for."""

    method: str
    steps: int
    dtype: torch.dtype
    low: float


def reach(short: int, rtol: float) -> float:
    """The least ratio of singular values that a plan for matrices of that shorter side is made for."""
    return max(LEAST, min(1.0, 10 * rtol) / max(short, WIDE))


def plan(short: int, long: int, batch: int, rtol: float, device: str) -> Plan:
    """The cheapest way by the constants of `cost`."""
    low, ratio = reach(short, rtol), long / max(short, 1)
    best, least = Plan("newton_schulz", MOST, torch.float32, low), math.inf
    for candidate, parts in _candidates(low, ratio, rtol, half=rtol >= HALF and short >= NARROW):
        seconds = predict(parts, short, batch, device)
        if seconds < least:
            best, least = candidate, seconds
    return best


def _candidates(low: float, ratio: float, rtol: float, *, half: bool) -> Iterator[tuple[Plan, Parts]]:
    """What reaches `rtol`. The errors equioscillate, so that their root mean square is 1/√2 of the largest."""
    dtypes = [torch.float32] + [torch.bfloat16] * half
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        for steps in range(1, MOST + 1):
            if composed(low, steps).error < rtol * math.sqrt(2):
                yield Plan("newton_schulz", steps, dtype, low), {name: steps * (1 + 2 * ratio) + 1}
                break
        for terms in range(1, MOST + 1):
            if rtol >= GRAM and fractions(low, terms).error < rtol * math.sqrt(2):
                # The Gram matrix is halved; what is left out is worth a third of a product with A.
                parts: dict[str, float] = {"float32": 1.0 * ratio + 0.5, "cholesky32": terms, "potri32": terms}
                parts[name] = parts.get(name, 0.0) + ratio
                yield Plan("zolotarev", terms, dtype, low), parts
                break


def direction(a: Tensor, rtol: float) -> tuple[Tensor, Plan]:
    """The polar factor of each matrix to `rtol`, and how it was found: nothing here waits for a GPU."""
    short, long = sorted(a.shape[-2:])
    p = plan(short, long, COMPANY, rtol, a.device.type)
    if p.method == "zolotarev":
        return zolotarev(a, low=p.low, terms=p.steps, dtype=p.dtype), p
    return quintics(a, low=p.low, steps=p.steps, dtype=p.dtype), p
