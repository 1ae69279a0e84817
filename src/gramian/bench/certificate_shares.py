"""Tasks of `gramian bench linalg` about what a certificate costs, a derivative, and the first call on a machine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gramian import linalg, random
from gramian.bench.table import Goal, Measurement, Row
from gramian.bench.timing import computing

N = 512
SHARE, BACKWARD, FIRST = 1.1, 0.6, 0.3
"""The goals: times the same route without a certificate, times torch's backward pass, seconds."""


def matrices(n: int, kappa: float) -> tuple[Tensor, Tensor]:
    """A symmetric and a general float32 matrix with logarithmically spaced spectra."""
    spectrum = torch.logspace(0, -torch.tensor(kappa).log10().item(), n, dtype=torch.float64)
    spd, general = (
        random.with_spectrum(
            n, n, spectrum=spectrum, symmetric=s, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        for s in (True, False)
    )
    return ((spd + spd.mT) / 2).float(), general.float()


def shares(repeats: int, n: int = N) -> Row:
    """Every certified function with and without its certificate, by the method that "auto" takes."""
    m, a = matrices(n, 100.0)
    i = torch.arange(1, n + 1, dtype=torch.float64)
    decaying = random.with_spectrum(n, n, spectrum=i**-0.5, generator=torch.Generator().manual_seed(0))
    calls: dict[str, Callable[..., Any]] = {
        "inv": lambda **o: linalg.inv_ex(a, **o),
        "solve": lambda **o: linalg.solve_ex(a, a[:, :1], **o),
        "inv_root": lambda **o: linalg.inv_root_ex(m, 4, **o),
        "sqrtm": lambda **o: linalg.sqrtm_ex(m, **o),
        "polar": lambda **o: linalg.polar_ex(a, **o),
        "svdvals": lambda **o: linalg.svdvals_ex(a, **o),
        "expm": lambda **o: linalg.expm_ex(a, **o),
        "pinv": lambda **o: linalg.pinv_ex(a, **o),
        "spectral_norm": lambda **o: linalg.spectral_norm_ex(a, **o),
        "cond": lambda **o: linalg.cond_ex(a, **o),
        "svd_lowrank": lambda **o: linalg.svd_lowrank_ex(decaying, n // 32, **o),
    }
    measured, goals = [], []
    for name, call in calls.items():
        times = computing({"certified": call, "bare": lambda call=call: call(certify=False)}, repeats=max(repeats, 5))
        method = times["certified"].result[1].method_names[0]
        measured.append(Measurement(name, times["certified"].median, None, method))
        measured.append(Measurement(f"{name}, certify=False", times["bare"].median))
        goals.append((Goal(f"{name}: certified ÷ not", "<=", SHARE), times["certified"].median / times["bare"].median))
    return Row(f"the certificate's share, {n}×{n} float32, κ 100", "", tuple(measured), tuple(goals))


Function = Callable[[Tensor], Tensor]


def pullback(function: Function, at: Tensor, weights: Tensor) -> Callable[[], Any]:
    """The backward pass of a function that has been evaluated."""
    x = at.clone().requires_grad_()
    value = function(x)
    return lambda: torch.autograd.grad(value, x, weights, retain_graph=True)


def pairs() -> dict[str, tuple[Tensor, Function, Function]]:
    """Functions with a backward pass: a matrix of side `N`, ours, and the same through torch's eigh or svd."""
    m, a = matrices(N, 100.0)

    def root(x: Tensor, power: float) -> Tensor:
        w, v = torch.linalg.eigh(x)
        return (v * w**power) @ v.mT

    def polar(x: Tensor) -> Tensor:
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        return u @ vh

    return {
        "inv_root": (m, lambda x: linalg.inv_root(x, 2), lambda x: root(x, -0.5)),
        "sqrtm": (m, linalg.sqrtm, lambda x: root(x, 0.5)),
        "polar": (a, linalg.polar, polar),
    }


def backward(repeats: int) -> Row:
    """The backward pass of roots and polar factors against torch's through eigh and svd."""
    weights = random.normal(N, N, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    measured, goals = [], []
    for name, (matrix, ours, torchs) in pairs().items():
        passes = {"gramian": pullback(ours, matrix, weights), "torch": pullback(torchs, matrix, weights)}
        times = computing(passes, repeats=max(repeats, 5))
        measured += [Measurement(f"{name}, {who}", t.median) for who, t in times.items()]
        goals.append(
            (Goal(f"{name}: backward ÷ torch's", "<=", BACKWARD), times["gramian"].median / times["torch"].median)
        )
    return Row(f"backward, {N}×{N} float32, κ 100", "", tuple(measured), tuple(goals))


_FIRST = """
import time, torch, gramian.linalg as gl
clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
m = torch.eye(256) + torch.rand(256, 256, generator=torch.Generator().manual_seed(0)) / 512
m = m + m.T
torch.linalg.eigh(m); torch.linalg.svd(m); torch.linalg.inv(m)
for call in (lambda: gl.inv_root_ex(m, 4), lambda: gl.polar_ex(m), lambda: gl.svdvals_ex(m), lambda: gl.inv_ex(m)):
    start = clock(); call()
    middle = clock(); call()
    print(2 * middle - start - clock())
"""


def first_call(repeats: int) -> Row:
    """How much longer the first call takes than the second in a new process with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_CACHE_HOME": folder, "GRAMIAN_COSTS": ""}
        out = subprocess.run(
            [sys.executable, "-c", _FIRST], env=environment, capture_output=True, text=True, check=True
        )
    seconds = [float(x) for x in out.stdout.split()]
    names = ("inv_root", "polar", "svdvals", "inv")
    measured = tuple(Measurement(name, s) for name, s in zip(names, seconds, strict=True))
    return Row(
        "first call less second, 256×256", "", measured, ((Goal("seconds, the longest", "<=", FIRST), max(seconds)),)
    )


TASKS: dict[str, Callable[[int], Row]] = {
    "certificates": shares,
    "certificates_256": lambda repeats: shares(repeats, 256),
    "backward": backward,
    "first_call": first_call,
}
"""Name of a task, and the function that measures it: number of repeats → row."""
