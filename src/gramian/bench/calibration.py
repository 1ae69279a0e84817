"""Measures the constants of `gramian.linalg.engine.cost` on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gramian.linalg.engine.cost import SIZES, Constants, keep
from gramian.linalg.engine.probes import WIDTH
from gramian.linalg.polar_factor.direction import ASSUMED_BATCH

SECONDS = 0.25
"""Time spent on each operation of each size; at least five runs are made whatever they take."""


def calibrate(device: str = "cpu", tell: Callable[[str], None] = lambda what: None) -> Constants:
    """Measures the constants of one kind of device, which takes about half a minute.

    Args:
        device: `"cpu"` or `"cuda"`.
        tell: called with the name of each part before it is measured.
    """
    columns = []
    for n in SIZES:
        tell(f"calibrate {device} {n}")
        operations = _operations(n, device)
        columns.append({name: _least(operation, device) for name, operation in operations.items()})
    units = [column["float32"] for column in columns]
    factors = {
        name: tuple(column[name] / unit for column, unit in zip(columns, units, strict=True)) for name in columns[0]
    }
    # Only directions use bfloat16, and they come in batches, where a small product costs less than a single one.
    factors["bfloat16"] = tuple(column["batch16"] / column["batch32"] for column in columns)
    del factors["batch16"], factors["batch32"]
    one = torch.ones(1, 1, device=device)
    return Constants(2.0 * SIZES[-1] ** 3 / units[-1], _least(lambda: one @ one, device), factors, "calibrated")


def keep_calibration(tell: Callable[[str], None] = lambda what: None) -> Path:
    """Calibrates the processor, and the GPU if there is one, and writes the file that `linalg` reads.

    `tell` is called with the name of each part before it is measured. Returns the path of the file.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return keep({device: calibrate(device, tell) for device in devices})


def _operations(n: int, device: str) -> dict[str, Callable[[], Any]]:
    """The operations that are timed, on matrices of size n, by the names that `linalg.cost` uses."""
    generator = torch.Generator().manual_seed(n)
    a = torch.randn(n, n, generator=generator).to(device)
    spd = a @ a.mT / n + torch.eye(n, device=device)
    wide, spd_wide = a.double(), spd.double()
    thin = wide[:, : min(n, WIDTH)].contiguous()
    batch, half = a.expand(ASSUMED_BATCH, n, n), a.bfloat16().expand(ASSUMED_BATCH, n, n)
    lower = torch.linalg.cholesky(spd)

    def triangular() -> Tensor:
        return torch.linalg.solve_triangular(lower.mT, a, upper=True, left=False)

    return {
        "float32": lambda: a @ a,
        "float64": lambda: wide @ wide,
        "batch32": lambda: torch.bmm(batch, batch),
        "batch16": lambda: torch.bmm(half, half),
        "thin64": lambda: wide @ thin,
        "eigh32": lambda: torch.linalg.eigh(spd),
        "eigh64": lambda: torch.linalg.eigh(spd_wide),
        "eigvalsh64": lambda: torch.linalg.eigvalsh(spd_wide),
        "svd32": lambda: torch.linalg.svd(a),
        "svd64": lambda: torch.linalg.svd(wide),
        "cholesky32": lambda: torch.linalg.cholesky_ex(spd),
        "cholesky64": lambda: torch.linalg.cholesky_ex(spd_wide),
        "potri32": lambda: torch.cholesky_inverse(lower),
        "inverse32": lambda: torch.linalg.inv_ex(a),
        "inverse64": lambda: torch.linalg.inv_ex(wide),
        "triangular32": triangular,
    }


def _least(operation: Callable[[], Any], device: str) -> float:
    """The least time of a call in seconds: other work on the machine can only add to it."""
    seconds: list[float] = []
    began = time.perf_counter()
    for run in range(1000):
        start = _now(device)
        operation()
        taken = _now(device) - start
        if run:  # the first one warms up
            seconds.append(taken)
        if len(seconds) >= 5 and time.perf_counter() - began > SECONDS:
            break
    return min(seconds)


def _now(device: str) -> float:
    """Seconds on the clock, after the device has finished what was launched."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()
