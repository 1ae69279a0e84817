"""Predicts the seconds that a method takes, from its operations and a few constants of the machine.

One float32 product of two n×n matrices takes 2n³ / rate; every other operation is a multiple of it that depends on n;
and every call has a latency. The defaults were measured on one machine with two cores. `gramian bench linalg
--calibrate` measures the present machine and keeps its constants in the user's cache folder.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

Operations = Mapping[str, float | int]
"""How many of each operation of `Constants.factors`; a product of n×n matrices is one. A product with a few vectors
includes the casts and norms around it. Products in bfloat16 are those of a batch: below n = 100 a single one is
slower."""

SIZES = (64, 256, 1024)
"""The n at which the cost of an operation is known; between them its logarithm is interpolated."""

UNITS = ("float32", "float64", "bfloat16")


@dataclass(frozen=True)
class Constants:
    """The rate of float32 products in flop/s, the latency of a call in s, and costs in float32 products at `SIZES`."""

    rate: float
    latency: float
    factors: Mapping[str, tuple[float, ...]]
    source: str = "default"


DEFAULTS = {
    "cpu": Constants(
        rate=1.8e11,
        latency=1.3e-6,
        factors={
            "float32": (1.0, 1.0, 1.0),
            "float64": (2.3, 2.4, 2.2),
            "bfloat16": (0.5, 0.45, 0.4),
            "thin64": (1.7, 0.5, 0.15),
            "eigh32": (22.0, 17.0, 6.5),
            "eigh64": (32.0, 30.0, 13.0),
            "eigvalsh64": (13.0, 17.0, 7.0),
            "svd32": (44.0, 44.0, 20.0),
            "svd64": (100.0, 80.0, 32.0),
            "cholesky32": (2.9, 1.5, 0.6),
            "cholesky64": (3.2, 2.5, 1.0),
            "potri32": (4.0, 1.5, 0.8),
            "inverse32": (12.0, 7.0, 3.6),
            "inverse64": (13.0, 8.0, 4.3),
            "triangular32": (2.9, 2.0, 0.8),
        },
    ),
    # Estimates from published peaks, not measured: on a GPU an eigendecomposition runs at a few per cent of the peak.
    "cuda": Constants(
        rate=4e13,
        latency=1e-5,
        factors={
            "float32": (1.0, 1.0, 1.0),
            "float64": (2.0, 2.0, 2.0),
            "bfloat16": (0.3, 0.12, 0.08),
            "thin64": (0.5, 0.3, 0.2),
            "eigh32": (3e4, 6e3, 1e3),
            "eigh64": (5e4, 1e4, 2e3),
            "eigvalsh64": (3e4, 6e3, 1e3),
            "svd32": (1e5, 2e4, 4e3),
            "svd64": (2e5, 4e4, 8e3),
            "cholesky32": (500.0, 50.0, 5.0),
            "cholesky64": (600.0, 60.0, 8.0),
            "potri32": (600.0, 60.0, 8.0),
            "inverse32": (900.0, 90.0, 12.0),
            "inverse64": (1e3, 1e2, 20.0),
            "triangular32": (300.0, 20.0, 3.0),
        },
    ),
}
"""CPU: `gramian bench linalg --calibrate`, rounded, on two cores of an AMD EPYC (Zen 4, avx512_bf16, no bfloat16 matrix
unit), torch 2.13 with MKL, two threads."""

EMULATED = (4.0, 4.0, 4.0)
"""The cost of bfloat16 products on a processor without instructions for them, which casts to float32: an estimate."""


def predict(operations: Operations, n: int, batch: int, device: str = "cpu") -> float:
    """Seconds for a batch of matrices of smaller side n, each of which takes these operations."""
    c = constants(device)
    unit = 2.0 * n**3 / c.rate
    # The products of a batch are one call, as fast as one larger product; LAPACK is called for each matrix.
    together = n * batch ** (1 / 3)
    work = sum(
        count * _interpolated(c.factors[name], together if name in (*UNITS, "thin64") else n)
        for name, count in operations.items()
    )
    calls = sum(count if name in (*UNITS, "thin64") else count * batch for name, count in operations.items())
    return batch * unit * work + calls * c.latency


def _interpolated(values: tuple[float, ...], n: float | int) -> float:
    """The value at n, linear between logarithms, constant outside the `SIZES`."""
    place = math.log(max(n, 1))
    points = [math.log(s) for s in SIZES]
    if place <= points[0]:
        return values[0]
    for i in range(1, len(points)):
        if place <= points[i]:
            share = (place - points[i - 1]) / (points[i] - points[i - 1])
            return math.exp((1 - share) * math.log(values[i - 1]) + share * math.log(values[i]))
    return values[-1]


def cache_file() -> Path:
    """The file of the calibration, in $XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root else Path.home() / ".cache") / "gramian" / "linalg.json"


@lru_cache(maxsize=8)
def constants(device: str = "cpu") -> Constants:
    """The constants of the kind of device: the calibrated ones if the file can be read, else the defaults."""
    kind = "cpu" if device == "cpu" else "cuda"
    try:
        body = json.loads(cache_file().read_text())[kind]
        factors = {name: tuple(map(float, values)) for name, values in body["factors"].items()}
        found = Constants(float(body["rate"]), float(body["latency"]), factors, "calibrated")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return _default(kind)
    whole = all(len(v) == len(SIZES) and min(v) > 0 for v in factors.values())
    same = set(factors) == set(DEFAULTS[kind].factors)
    return found if whole and same and found.rate > 0 and found.latency >= 0 else _default(kind)


def _default(kind: str) -> Constants:
    found = DEFAULTS[kind]
    words = getattr(torch.cpu, "get_capabilities", dict)()
    if kind == "cpu" and words and not any(words.get(word) for word in ("avx512_bf16", "amx_bf16", "bf16")):
        return replace(found, factors={**found.factors, "bfloat16": EMULATED})
    return found


def keep(found: Mapping[str, Constants]) -> Path:
    """Write the constants of each kind of device to `cache_file()`, whole or not at all, and use them from now on."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    body = json.dumps({kind: asdict(c) for kind, c in found.items()}, indent=1)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(body + "\n")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    constants.cache_clear()
    return path
