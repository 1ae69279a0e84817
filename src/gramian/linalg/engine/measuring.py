"""Times the operations of `cost` on this machine, each in milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from gramian.linalg.engine import lapack
from gramian.linalg.engine.cost import DEFAULTS, SIZES
from gramian.linalg.engine.probes import SEED, WIDTH

SHORT = 0.004
"""Seconds after which an operation that ran twice is not run again."""


def measure(
    names: Sequence[str], *, sizes: Sequence[int] = SIZES[:-1], seconds: float = SHORT, device: str = "cpu"
) -> dict[str, tuple[float, ...]]:
    """The seconds of each operation at each of `SIZES`.

    What is not among the `sizes` that are timed, as 1024, grows from the size before as in the defaults: an
    eigendecomposition of 1024 alone takes more than a first call may.
    """
    found: dict[str, list[float]] = {name: [] for name in names}
    with _disable_current_modes(), torch.no_grad(), torch.autocast(device, enabled=False):
        for n in sizes:
            operations = _operations(n, device)
            for name in names:
                found[name].append(_least(operations[name], seconds, device))
    default = DEFAULTS[device].factors
    for name, times in found.items():
        for i in range(len(times), len(SIZES)):
            larger = (SIZES[i] / SIZES[i - 1]) ** 3 * default[name][i] / default[name][i - 1]
            times.append(times[-1] * larger)
    return {name: tuple(times) for name, times in found.items()}


@lru_cache(maxsize=8)
def turned(threads: int) -> bool:
    """Whether a few columns times a matrix stored by rows are faster as (Zᵀ Aᵀ)ᵀ than as A Z, with so many threads."""
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        a, z = (torch.ones(n, 512, dtype=torch.float64, device="cpu") for n in (512, WIDTH))
        plain, other = (_least(product, SHORT / 2, "cpu") for product in (lambda: a @ z.mT, lambda: z @ a.mT))
    return other < plain


def _operations(n: int, device: str) -> dict[str, Callable[[], Any]]:
    """The operations on matrices of size n, by the names that `cost` uses."""
    generator = torch.Generator().manual_seed(SEED + n)
    a = torch.randn(n, n, generator=generator, dtype=torch.float32, device="cpu").to(device)
    eye = torch.eye(n, dtype=torch.float32, device=device)
    spd = a @ a.mT / n + eye
    wide, spd_wide = a.double(), spd.double()
    thin = wide[:, : min(n, WIDTH)].contiguous()
    lower = torch.linalg.cholesky(spd)
    return {
        "float32": lambda: a @ a,
        "float64": lambda: wide @ wide,
        "thin64": lambda: thin.mT @ wide.mT,
        "eigh32": lambda: torch.linalg.eigh(spd),
        "eigh64": lambda: torch.linalg.eigh(spd_wide),
        "eigvalsh64": lambda: torch.linalg.eigvalsh(spd_wide),
        "eig64": lambda: torch.linalg.eig(wide),
        "svd64": lambda: torch.linalg.svd(wide),
        "cholesky32": lambda: lapack.cholesky(spd[None]),
        "cholesky64": lambda: lapack.cholesky(spd_wide[None]),
        "potri32": lambda: torch.cholesky_inverse(lower),
        "inverse32": lambda: torch.linalg.inv_ex(a),
        "inverse64": lambda: torch.linalg.inv_ex(wide),
        "triangular32": lambda: torch.linalg.solve_triangular(lower.mT, a, upper=True, left=False),
    }


def _least(operation: Callable[[], Any], seconds: float, device: str) -> float:
    """The least time of a call in seconds, after one that warms up: other work on the machine can only add to it."""
    operation()
    found: list[float] = []
    began = _now(device)
    while len(found) < 2 or (_now(device) - began < seconds and len(found) < 1000):
        start = _now(device)
        operation()
        found.append(_now(device) - start)
    return min(found)


def _now(device: str) -> float:
    """Seconds of this thread, which other work on the machine adds little to; on a GPU, those until it has finished.

    Where there are several threads this one waits for the others in a loop, and so counts their time too.
    """
    if device == "cpu":
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()
