"""Tasks of `gramian bench linalg` about norms, condition numbers, low rank, spectral densities and products."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gramian import linalg, random
from gramian.bench.table import Goal, Measurement, Row
from gramian.bench.timing import Timing, computing
from gramian.linalg.products import MATMUL

__all__ = ["TASKS"]


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _measured(times: dict[str, Timing], errors: dict[str, float]) -> tuple[Measurement, ...]:
    return tuple(Measurement(name, t.median, errors.get(name)) for name, t in times.items())


def _number(
    task: str,
    exact: float,
    ours: Callable[[], Tensor],
    peer: Callable[[], Tensor],
    peer_name: str,
    repeats: int,
    goal: float,
) -> Row:
    """A row for a task whose answer is one number, against one peer; `goal` is the wanted ratio of times."""
    times = computing({"gramian": ours, peer_name: peer}, repeats=repeats)
    errors = {name: abs(float(t.result) / exact - 1) for name, t in times.items()}
    ratio = times["gramian"].median / times[peer_name].median
    goals = ((Goal(f"time ÷ {peer_name}'s", "<=", goal), ratio),)
    return Row(task, "relative error of the number", _measured(times, errors), goals)


def condition(repeats: int) -> Row:
    """Condition number of a 2048 × 2048 matrix to two digits."""
    a = random.with_spectrum(2048, 2048, spectrum=torch.logspace(0, -4, 2048), generator=_seeded())
    exact = float(torch.linalg.cond(a.double()))
    return _number(
        "cond, n 2048, log-spaced spectrum, κ 1e4, two digits",
        exact,
        lambda: linalg.cond(a, rtol=1e-2),
        lambda: torch.linalg.cond(a),
        "torch.linalg.cond",
        repeats,
        0.17,
    )


def norm(repeats: int) -> Row:
    """Spectral norm of a 2048 × 2048 matrix to four digits."""
    return _norm(repeats, 1e-4, "four")


def norm_rough(repeats: int) -> Row:
    """The same to two digits."""
    return _norm(repeats, 1e-2, "two")


def _norm(repeats: int, rtol: float, digits: str) -> Row:
    a = random.normal(2048, 2048, generator=_seeded())
    exact = float(torch.linalg.matrix_norm(a.double(), 2))
    return _number(
        f"spectral_norm, n 2048, normal entries, {digits} digits",
        exact,
        lambda: linalg.spectral_norm(a, rtol=rtol),
        lambda: torch.linalg.matrix_norm(a, 2),
        "torch.linalg.matrix_norm",
        repeats,
        0.08,
    )


def lowrank(repeats: int) -> Row:
    """Best approximation of rank 32 of a 4096 × 1024 matrix with σᵢ = i^-½."""
    spectrum = torch.arange(1, 1025, dtype=torch.float64) ** -0.5
    a = random.with_spectrum(4096, 1024, spectrum=spectrum, generator=_seeded())
    optimum = float(spectrum[32:].norm())

    def excess(value: tuple[Tensor, Tensor, Tensor]) -> float:
        u, s, v = (x[..., :32].double() for x in value)
        return float((a.double() - (u * s) @ v.mT).norm()) / optimum - 1

    def full() -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        return u, s, vh.mT

    competitors: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]] = {
        "gramian": lambda: linalg.svd_lowrank(a, 32),
        "torch.svd_lowrank": lambda: torch.svd_lowrank(a, q=40, niter=4),
        "torch.linalg.svd": full,
    }
    if importlib.util.find_spec("scipy"):
        from scipy.sparse.linalg import svds

        array = a.double().numpy()

        def propack() -> tuple[Tensor, Tensor, Tensor]:
            found: Any = svds(array, k=32, solver="propack", tol=1e-7, rng=0)  # pyright: ignore[reportArgumentType]
            u, s, vh = (torch.tensor(x.copy()) for x in found)  # some strides are negative
            return u, s, vh.mT

        competitors["scipy PROPACK"] = propack
    times = computing(competitors, repeats=repeats)
    errors = {name: excess(t.result) for name, t in times.items()}
    own = times["gramian"].median
    goals = [
        (Goal("time ÷ torch.svd_lowrank's", "<=", 0.8), own / times["torch.svd_lowrank"].median),
        (Goal("excess", "<=", 4e-5), errors["gramian"]),
    ]
    if "scipy PROPACK" in times:
        goals.append((Goal("time ÷ PROPACK's", "<=", 0.5), own / times["scipy PROPACK"].median))
    return Row(
        "rank 32 of 4096×1024, σᵢ = i^-½", "Frobenius error above the optimum", _measured(times, errors), tuple(goals)
    )


def syrk(repeats: int) -> Row:
    """xᵀx of a 4096 × 4096 matrix in float32."""
    x = random.normal(4096, 4096, generator=_seeded())
    times = computing({"gramian": lambda: linalg.syrk(x), "x.T @ x": lambda: x.T @ x}, repeats=repeats)
    exact = x[:, :64].double().mT @ x.double()
    errors = {name: float((t.result[:64] - exact).norm() / exact.norm()) for name, t in times.items()}
    goals = ((Goal("gramian ÷ x.T @ x, time", "<=", 0.67), times["gramian"].median / times["x.T @ x"].median),)
    return Row("syrk, 4096×4096 float32", "relative error of 64 rows", _measured(times, errors), goals)


def products(repeats: int) -> Row:
    """Every method of `linalg.matmul` on 2048 × 2048 float32 matrices; `auto` is torch's product."""
    a, b = (random.normal(2048, 2048, generator=_seeded()) for _ in range(2))
    exact = a.double() @ b.double()
    times = computing({name: (lambda name=name: linalg.matmul(a, b, method=name)) for name in MATMUL}, repeats=repeats)
    errors = {name: float((t.result - exact).norm() / exact.norm()) for name, t in times.items()}
    return Row("matmul, 2048×2048 float32", "relative error", _measured(times, errors))


def density(repeats: int) -> Row:
    """Spectral density of a 2048 × 2048 Wishart matrix by Lanczos quadrature, against all eigenvalues."""
    m = random.wishart(2048, 2048, samples=4096, generator=_seeded())
    times = computing(
        {
            "gramian, lanczos_quadrature": lambda: linalg.spectral_density_ex(m, method="lanczos_quadrature"),
            "torch.linalg.eigvalsh": lambda: torch.linalg.eigvalsh(m),
        },
        repeats=repeats,
    )
    exact = torch.linalg.eigvalsh(m.double())
    (nodes, weights), certificate = times["gramian, lanczos_quadrature"].result
    grid = torch.linspace(0, float(exact[-1]) * 1.01, 20_001, dtype=torch.float64)
    ours = torch.cat([torch.zeros(1), weights.cumsum(0)])[torch.searchsorted(nodes, grid)]
    apart = (ours - torch.searchsorted(exact, grid) / 2048).abs().mean() * grid[-1] / (exact[-1] - exact[0])
    errors = {"gramian, lanczos_quadrature": float(apart), "torch.linalg.eigvalsh": 0.0}
    measured = _measured(times, errors)
    bound = float(certificate.error_bound)
    return Row(
        f"spectral_density, n 2048, Wishart; bound {bound:.2g}", "Wasserstein-1 distance over the range", measured
    )


TASKS: dict[str, Callable[[int], Row]] = {
    "cond": condition,
    "spectral_norm": norm,
    "spectral_norm_rough": norm_rough,
    "lowrank": lowrank,
    "syrk": syrk,
    "matmul": products,
    "density": density,
}
"""Name of a task, and the function that measures it: number of repeats → row."""
