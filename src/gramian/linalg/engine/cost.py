"""Predicts the seconds that a method takes, from its operations and a few constants of the machine.

One float32 product of two n×n matrices takes 2n³ / rate; every other operation is a multiple of it that depends on n;
and every call has a latency. Where methods compete on a CPU, those of their operations that were never timed on this
processor, with this number of threads and this torch, are timed at once, which takes milliseconds each, and kept in the
user's cache folder. Within `fixed` the defaults decide, so that a run repeats bit by bit on any machine.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

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
            "eig64": (140.0, 110.0, 52.0),
            "svd64": (100.0, 80.0, 32.0),
            "cholesky32": (2.9, 0.8, 0.4),
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
            "eig64": (1e6, 2e5, 3e4),
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
unit), torch 2.13 with MKL, two threads; Cholesky factors later, on one."""

FORMAT = 2
"""Of the cache file. One of another format is measured again."""

EACH = 1e-7
"""Seconds that one small matrix of a batch adds to a product: 5e-8 at n = 4 and 1e-7 at n = 8 by `bmm`, and the passes
around it. Float64 with double-double residuals seemed as cheap as without in a batch of 10,000 of n = 4, where it takes
four times as long."""

WORTH = 1e-3
"""Seconds of predicted work from which it is worth measuring: below it a wrong choice costs less."""

SWITCH = "GRAMIAN_COSTS"
"""The environment variable that turns measuring off for a whole process, if it is "default"."""

_FIXED: ContextVar[bool] = ContextVar("fixed", default=os.environ.get(SWITCH) == "default")

EMULATED = (4.0, 4.0, 4.0)
"""The cost of bfloat16 products on a processor without instructions for them, which casts to float32: an estimate."""

TILES = (0.19, 0.12, 0.11)
"""The same with a matrix unit for them (AMX): medians on a core of an Intel Xeon of family 6, model 207; torch 2.13."""


def predict(operations: Operations, n: int, batch: int, c: Constants) -> float:
    """Seconds for a batch of matrices of smaller side n, each of which takes these operations."""
    unit = 2.0 * n**3 / c.rate
    # The products of a batch are one call, as fast as one larger product; LAPACK is called for each matrix.
    together = n * batch ** (1 / 3)
    work = sum(
        count * _interpolated(c.factors[name], together if name in (*UNITS, "thin64") else n)
        for name, count in operations.items()
    )
    products = sum(count for name, count in operations.items() if name in (*UNITS, "thin64"))
    calls = sum(count * batch for name, count in operations.items() if name not in (*UNITS, "thin64"))
    return batch * (unit * work + products * EACH) + (products + calls) * c.latency


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


@contextmanager
def fixed() -> Iterator[None]:
    """Within it methods are chosen by the default constants, whatever was measured: the same ones on any machine."""
    token = _FIXED.set(True)
    try:
        yield
    finally:
        _FIXED.reset(token)


def is_fixed() -> bool:
    """Whether nothing is to be measured here."""
    return _FIXED.get()


def constants(device: str = "cpu", rows: tuple[Operations, ...] = (), n: int = 0, batch: int = 1) -> Constants:
    """The constants by which to compare rows of operations on matrices of smaller side n.

    Measured ones on a CPU where the work is worth it, the defaults otherwise.
    """
    kind = "cpu" if device == "cpu" else "cuda"
    default = defaults(kind)
    if is_fixed():
        return default
    key = machine(kind)
    known = _known(key)
    names = {"float32", *(name for row in rows for name in row)}
    missing = sorted(name for name in names if name not in known)
    if missing and kind == "cpu" and max((predict(row, n, batch, default) for row in rows), default=0.0) > WORTH:
        from gramian.linalg.engine.measuring import measure  # which needs this file's sizes

        known.update(measure(missing))
        keep(key, known)
    return _constants(default, known)


def defaults(device: str) -> Constants:
    """The default constants of a kind of device; on a CPU, products in bfloat16 cost what its instructions allow."""
    found = DEFAULTS[device]
    words = getattr(torch.cpu, "get_capabilities", dict)() if device == "cpu" else {}
    if words and not any(words.get(word) for word in ("avx512_bf16", "amx_bf16", "bf16")):
        return replace(found, factors={**found.factors, "bfloat16": EMULATED})
    if words.get("amx_bf16"):
        return replace(found, factors={**found.factors, "bfloat16": TILES})
    return found


def _constants(default: Constants, known: Mapping[str, tuple[float, ...]]) -> Constants:
    """The defaults, with the seconds that are known for each of `SIZES` in place of theirs."""
    if "float32" not in known:
        return default
    units = known["float32"]
    found = {name: tuple(t / u for t, u in zip(times, units, strict=True)) for name, times in known.items()}
    return Constants(2.0 * SIZES[-1] ** 3 / units[-1], default.latency, {**default.factors, **found}, "measured")


def machine(kind: str = "cpu") -> str:
    """What a measurement holds for: the processor, the number of threads, and torch."""
    name = kind
    if kind == "cpu":
        name = _processor()
    elif torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return f"{name} | {torch.get_num_threads()} threads | torch {torch.__version__}"


@lru_cache(maxsize=1)
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    family = [found.get(key, "") for key in ("model name", "cpu family", "model", "stepping", "cache size")]
    return " ".join(x for x in family if x) or platform.processor() or platform.machine()


def cache_file() -> Path:
    """The file of what was measured, in $XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root else Path.home() / ".cache") / "gramian" / "linalg.json"


@lru_cache(maxsize=16)
def _known(key: str) -> dict[str, tuple[float, ...]]:
    """The seconds of each operation at each of `SIZES`, as far as the cache file knows them for this machine.

    What is not known yet is added to this dictionary.
    """
    found: dict[str, tuple[float, ...]] = {}
    for name, times in _read().get(key, {}).items():
        if name in DEFAULTS["cpu"].factors and len(times) == len(SIZES) and min(times) > 0:
            found[name] = tuple(float(t) for t in times)
    return found


def _read() -> dict[str, Any]:
    """The machines of the cache file; none where it cannot be read, is damaged, or is of another format."""
    try:
        body = json.loads(cache_file().read_text())
        machines = body["machines"] if body["format"] == FORMAT else {}
        if body["checksum"] != _checksum(machines):
            return {}
        return {key: {n: [*map(float, t)] for n, t in found.items()} for key, found in machines.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _checksum(machines: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(machines).encode())


def keep(key: str, known: Mapping[str, tuple[float, ...]]) -> Path:
    """Write what is known of a machine to `cache_file()`, whole or not at all, beside what it holds of others.

    Where the folder cannot be written, this process alone knows it.
    """
    path = cache_file()
    machines = {**_read(), key: known}
    body = json.dumps({"format": FORMAT, "checksum": _checksum(machines), "machines": machines}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    except OSError:
        return path
    try:
        with os.fdopen(handle, "w") as file:
            file.write(body + "\n")
        os.replace(temporary, path)
    except BaseException as e:
        Path(temporary).unlink(missing_ok=True)
        if not isinstance(e, OSError):
            raise
    return path


def forget() -> None:
    """Read the cache file anew at the next choice."""
    _known.cache_clear()
