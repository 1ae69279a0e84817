"""The polar factor of a step: how it is computed, as the cost model predicts or as this machine was measured."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gramian import placement
from gramian.linalg.engine.cost import TILES, Constants, Operations, defaults, predict
from gramian.linalg.polar_factor.few_operations import few_operations, is_small
from gramian.linalg.polar_factor.few_passes import few_passes, products
from gramian.linalg.polar_factor.newton_schulz import composed
from gramian.linalg.polar_factor.zolotarev import LEAST, fractions, zolotarev

__all__ = ["Approach", "approaches", "chosen", "dtype_of_products", "pads", "polar"]

RATIO = 1 / 512
"""Largest `low` that an approach may have at rtol 0.125: torch's five steps lift singular values from about there."""

FIRST = {"quintics": 5, "nonic": 9}
"""Composed odd polynomials: degree of the first, the others being quintics."""

COARSE = 0.125
MOST = 12  # steps or terms
HALF = 0.05  # least rtol for products in bfloat16, whose rounding leaves 0.02 to 0.03
NARROW = 96  # least smaller side for them and for LAPACK's inverses: below it neither is faster
GRAM = 5e-3  # least rtol for which the Gram matrix in float32 is good enough
ASSUMED_BATCH = 8  # a direction must not depend on its batch, which differs between one process and several
FEW = 1 << 21  # multiplications of a group's Gram matrices of one shape up to which products in bfloat16 gain nothing

BISECTED = 1.05  # ratio of the bounds of a `low` that is good enough

SECONDS = 0.8  # for all measurements of an optimizer
ROUNDS = 5


class Approach(NamedTuple):
    """A method, its steps or terms, the dtype of its products, and the least σ/σ₁ that its coefficients allow for."""

    method: str
    steps: int
    dtype: str
    low: float

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The polar factor of each matrix, roughly; in `out`, which may be x, if that is given."""
        if self.method in FIRST and self.dtype == "float32" and x.device.type == "cpu" and is_small(*x.shape[-2:]):
            return few_operations(x, low=self.low, steps=self.steps, first=FIRST[self.method], out=out)
        dtype = getattr(torch, self.dtype)
        if self.method in FIRST:
            return few_passes(x, low=self.low, steps=self.steps, first=FIRST[self.method], dtype=dtype, out=out)
        return zolotarev(x, low=self.low, terms=self.steps, dtype=dtype, out=out)

    def __str__(self) -> str:
        return f"{self.method} {self.steps} {self.dtype}"


def polar(
    x: Tensor, options: Mapping[str, Any], out: Tensor | None = None, shape: tuple[int, int] | None = None
) -> Tensor:
    """The polar factor of each matrix (K, m, n) to `rtol`, by what `approaches` has for its shape, or as predicted.

    In `out`, which may be x, if that is given: a new tensor of that size costs more than its numbers. Matrices that are
    padded to one shape are computed as those of `shape` are.
    """
    return _of(shape or x.shape[-2:], x.device.type, options)(x, out)


def pads(
    shapes: Sequence[tuple[int, int]], room: tuple[int, int], device: torch.device, options: Mapping[str, Any]
) -> int | None:
    """Multiplications in the Gram matrix of each, if matrices of these shapes may be padded to `room` with zeros.

    That is where they are small and computed in one way: it changes no more than rounding then. `None` elsewhere.
    """
    if device.type != "cpu" or not all(is_small(*shape) for shape in shapes):
        return None
    found = {_of(shape, device.type, options) for shape in shapes}
    way = found.pop()
    return min(room) * math.prod(room) if not found and way.method in FIRST and way.dtype == "float32" else None


def dtype_of_products(x: Tensor, options: Mapping[str, Any], shape: tuple[int, int] | None = None) -> torch.dtype:
    """The dtype in which other products with these matrices are as exact as their polar factor, and fast."""
    dtype = getattr(torch, _of(shape or x.shape[-2:], x.device.type, options).dtype)
    return dtype if dtype == torch.bfloat16 else x.dtype


def _of(shape: Sequence[int], device: str, options: Mapping[str, Any]) -> Approach:
    """The approach for matrices of that shape, on that kind of device."""
    m, n = shape
    return _of_sides(min(m, n), max(m, n), device, options["rtol"], options.get("approaches", ""))


@lru_cache(maxsize=1024)
def _of_sides(short: int, long: int, device: str, rtol: float, text: str) -> Approach:
    """The approach that `approaches` wrote for that shape, or the predicted one."""
    return _approach(short, long, rtol, device, _read(text, device).get(f"{short}x{long}"))


def approaches(shapes: Iterable[tuple[int, int]], device: torch.device, options: Mapping[str, Any]) -> str:
    """How the matrices of each shape are computed: `"predicted on cpu: 100x200 quintics 5 float32, …"`.

    A text, since torch.distributed.checkpoint would take a dict apart.

    What the options hold already, as from a state, is kept if it was found in the same way and reaches their `rtol`.
    Measured in less than a second in all; what would take longer is as predicted. The first rank's choice is that of
    all then: collective.
    """
    if device.type == "meta":
        return ""
    text, rtol, kind = options.get("approaches", ""), options["rtol"], device.type
    head = f"{options['approach']} on {kind}"
    known = _read(text, kind) if text.startswith(head) else {}
    pairs = Counter((min(shape), max(shape)) for shape in shapes)
    if known and all(known.get(f"{m}x{n}") in _names(m, n, rtol) for m, n in pairs):
        return text
    measured, end = options["approach"] == "measured", time.perf_counter() + SECONDS
    found = []
    for (short, long), count in sorted(pairs.items()):
        if measured:
            approach = chosen(short, long, count, rtol, kind, end - time.perf_counter())
        else:
            approach = _approach(short, long, rtol, kind, known.get(f"{short}x{long}"), min(count, ASSUMED_BATCH))
        found.append(f"{short}x{long} {approach}")
    text = f"{head}: {', '.join(found)}"
    return placement.exchange(text)[0] if measured and placement.is_distributed() else text


@lru_cache(maxsize=256)
def _read(text: str, device: str) -> dict[str, str]:
    """What `approaches` wrote for that device, by shape."""
    head, found, entries = text.rpartition(": ")
    if found and not head.endswith(f" on {device}"):
        return {}
    return dict(entry.split(" ", 1) for entry in entries.split(", ") if entry)  # type: ignore[misc]


_KNOWN: dict[tuple[Any, ...], Approach] = {}  # what was measured in this process


def chosen(short: int, long: int, count: int, rtol: float, device: str, seconds: float) -> Approach:
    """The fastest approach that reaches `rtol`: measured, if that takes no longer than `seconds`; else predicted."""
    count = min(count, ASSUMED_BATCH)
    key = (short, long, count, rtol, device, torch.get_num_threads())
    if key in _KNOWN:
        return _KNOWN[key]
    found = dict(_candidates(short, long / max(short, 1), rtol))
    once = sum(predict(operations, short, count, _costs(device)) for operations in found.values())
    if once * (ROUNDS + 1) > seconds:
        return _approach(short, long, rtol, device, None)
    x = torch.randn(count, short, long, generator=torch.Generator().manual_seed(0)).to(device)
    times: dict[Approach, list[float]] = {a: [] for a in found}
    end = time.perf_counter() + seconds
    for round_ in range(ROUNDS + 1):
        if round_ > 1 and time.perf_counter() > end:
            break
        for a in found:
            start = _now(device)
            a(x)
            times[a].append(_now(device) - start)
    _KNOWN[key] = min(found, key=lambda a: min(times[a][1:]))  # other work on the machine can only add
    return _KNOWN[key]


def _costs(device: str) -> Constants:
    """The default constants and not those measured here, so that a run that is started again takes the same steps."""
    return defaults("cpu" if device == "cpu" else "cuda")


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@lru_cache(maxsize=1024)
def _approach(
    short: int, long: int, rtol: float, device: str, name: str | None, count: int = ASSUMED_BATCH
) -> Approach:
    """The approach of that name; without one, the cheapest by the default constants of the cost model.

    Those know nothing of what a call in bfloat16 or of LAPACK's costs beside its work, which for a few small matrices
    on a CPU is more than they save; a matrix unit saves more.
    """
    costs = _costs(device)
    few = device == "cpu" and count * short * short * long <= FEW and costs.factors["bfloat16"] != TILES
    best, least = Approach("quintics", MOST, "float32", LEAST), math.inf
    for candidate, operations in _candidates(short, long / max(short, 1), rtol):
        if str(candidate) == name:
            return candidate
        if few and operations.keys() != {"float32"}:
            continue
        seconds = predict(operations, short, ASSUMED_BATCH, costs)
        if seconds < least:
            best, least = candidate, seconds
    return best


def _candidates(short: int, ratio: float, rtol: float) -> Iterator[tuple[Approach, Operations]]:
    """The approaches that reach `rtol`."""
    for dtype in ("float32", *(["bfloat16"] if rtol >= HALF and short >= NARROW else [])):
        for method, degree in FIRST.items():
            steps, low = _fewest(method, rtol)
            yield Approach(method, steps, dtype, low), {dtype: products(ratio, steps, degree, getattr(torch, dtype))}
        if rtol >= GRAM and short >= NARROW:
            terms, low = _fewest("fractions", rtol)
            # The Gram matrix is halved; what is left out is worth a third of a product with A.
            operations: dict[str, float] = {"float32": ratio + 0.5, "cholesky32": terms, "potri32": terms}
            operations[dtype] = operations.get(dtype, 0.0) + ratio
            yield Approach("fractions", terms, dtype, low), operations


def _names(short: int, long: int, rtol: float) -> list[str]:
    return [str(approach) for approach, _ in _candidates(short, long / max(short, 1), rtol)]


@lru_cache(maxsize=64)
def _fewest(method: str, rtol: float) -> tuple[int, float]:
    """The fewest steps that reach `rtol`, and the least σ/σ₁ down to which they do.

    The errors equioscillate, so that the root mean square is 1/√2 of the largest.
    """
    of = partial(composed, first=FIRST[method]) if method in FIRST else fractions
    most = rtol * math.sqrt(2)
    high = max(LEAST, RATIO * min(1.0, rtol / COARSE))
    steps = next((k for k in range(1, MOST) if of(high, k).error <= most), MOST)
    low = LEAST
    while high / low > BISECTED:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if of(middle, steps).error <= most else (middle, high)
    return steps, high
