"""Tasks of `gramian bench linalg` about dense matrix functions: polar factors, inverse roots, singular values.

The peers are torch.linalg, torch.optim.Muon and the coupled Newton iteration of the Shampoo literature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz as muon_function

from gramian import linalg, random
from gramian.bench.machine import features
from gramian.bench.table import Goal, Measurement, Row
from gramian.bench.timing import Timing, computing

MUON = ((3.4445, -4.775, 2.0315), 5, 1e-7)
"""Default coefficients, steps and eps of torch.optim.Muon."""


def _matrix(m: int, n: int, kappa: float, *, symmetric: bool = False) -> Tensor:
    """A float32 matrix with logarithmically spaced singular values from 1 to 1/κ."""
    spectrum = torch.logspace(0, -math.log10(kappa), min(m, n), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    a = random.with_spectrum(m, n, spectrum=spectrum, symmetric=symmetric, generator=generator, dtype=torch.float64)
    return ((a + a.mT) / 2).float() if symmetric else a.float()


def _relative(value: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.norm(value.double() - exact) / torch.linalg.norm(exact))


def _svd_polar(a: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(a, full_matrices=False)
    return u @ vh


def _measured(times: dict[str, Timing], errors: dict[str, float], remarks: dict[str, str]) -> tuple[Measurement, ...]:
    return tuple(Measurement(k, t.median, errors.get(k), remarks.get(k, "")) for k, t in times.items())


def _remark(certificate: linalg.Certificate, rtol: float) -> str:
    """The method that was used, the `rtol` that was asked for, and the error bound of the certificate."""
    bound = float(certificate.error_bound.max())
    kind = certificate.kind_names[0]
    return f"{certificate.method_names[0]}; asked {rtol:g}, certified {bound:.1e} ({kind})"


def _polar(
    a: Tensor, repeats: int, ask: float, rivals: dict[str, Callable[[], Tensor]]
) -> tuple[dict[str, Timing], dict[str, float], dict[str, str]]:
    exact = _svd_polar(a.double())
    times = computing({"gramian": lambda: linalg.polar_ex(a, rtol=ask), **rivals}, repeats=repeats)
    value, certificate = times["gramian"].result
    found = {name: t.result for name, t in times.items()} | {"gramian": value}
    errors = {name: _relative(x, exact) for name, x in found.items()}
    return times, errors, {"gramian": _remark(certificate, ask)}


def polar_wide_direction(repeats: int) -> Row:
    """Polar factor of 1024 × 4096, κ 100, to 3e-4, by its error and by its bound, against five steps in bfloat16."""
    a = _matrix(1024, 4096, 100)
    rival = "torch.optim.Muon's function"
    closer = "gramian, certified to 3e-4"
    rivals = {rival: lambda: muon_function(a, *MUON), closer: lambda: linalg.polar(a, rtol=3e-4)}
    times, errors, remarks = _polar(a, repeats, 3e-3, rivals)
    goal = 1.3 if features()["bf16_matrix_unit"] else 1.0
    return Row(
        "polar 1024×4096, κ 100, to 3e-4",
        "‖Q − UVᵀ‖ / ‖UVᵀ‖",
        _measured(times, errors, remarks),
        (
            (Goal("time ÷ torch.optim.Muon's", "<=", goal), times["gramian"].median / times[rival].median),
            (Goal("error", "<=", 3e-4), errors["gramian"]),
            (Goal("certified to 3e-4: time ÷ Muon's", "<=", goal), times[closer].median / times[rival].median),
        ),
    )


def _against_svd(task: str, a: Tensor, rtol: float, repeats: int, goal: float, error: float) -> Row:
    """A polar factor against that by the SVD, with the wanted ratio of times and the wanted error."""
    rival = "torch.linalg.svd"
    times, errors, remarks = _polar(a, repeats, rtol, {rival: lambda: _svd_polar(a)})
    return Row(
        task,
        "‖Q − UVᵀ‖ / ‖UVᵀ‖",
        _measured(times, errors, remarks),
        (
            (Goal("time ÷ torch.linalg.svd's", "<=", goal), times["gramian"].median / times[rival].median),
            (Goal("error", "<=", error), errors["gramian"]),
        ),
    )


def polar_wide(repeats: int) -> Row:
    """Polar factor of 1024 × 4096, κ 100, to an error of 1e-5, against the SVD."""
    return _against_svd("polar 1024×4096, κ 100, to 1e-5", _matrix(1024, 4096, 100), 1e-5, repeats, 0.25, 1e-5)


def polar_square(repeats: int) -> Row:
    """Polar factor of 1024 × 1024, κ 1e3, to an error of 1e-4, against the SVD."""
    return _against_svd("polar 1024×1024, κ 1e3, to 1e-4", _matrix(1024, 1024, 1e3), 1e-4, repeats, 0.5, 1e-4)


def coupled_newton(m: Tensor, p: int, tolerance: float = 1e-6, max_steps: int = 100) -> Tensor:
    """M^(-1/p) in float32 by the coupled Newton iteration, as implementations of Shampoo compute it.

    X ← XT and Y ← TᵖY with T = ((p + 1)I − Y)/p, from Y = zM, X = z^(1/p)I, z = (1 + p)/(2‖M‖_F), until max|Y − I| is
    at most `tolerance` or no longer decreases.

    Source: Iannazzo (2006); Anil et al. (arXiv:2002.09018).
    """
    eye = torch.eye(len(m), dtype=m.dtype)
    z = (1 + p) / (2 * torch.linalg.norm(m))
    x, y = eye * z ** (1 / p), m * z
    error = float((y - eye).abs().max())
    for _ in range(max_steps):
        if error <= tolerance:
            break
        t = ((p + 1) * eye - y) / p
        power = torch.linalg.matrix_power(t, p)
        new_x, y = x @ t, power @ y
        new_error = float((y - eye).abs().max())
        if new_error > 1.2 * error:
            break
        x, error = new_x, new_error
    return x


def inv_root(repeats: int) -> Row:
    """Inverse fourth root of a 1024 × 1024 matrix, κ 1e6, to 1e-3, against an eigendecomposition in float64 alone."""
    return _inv_root(repeats, 1e6, 1e-3, 1.1)


def inv_root_rough(repeats: int) -> Row:
    """The same to 1e-2 for κ 1e4."""
    return _inv_root(repeats, 1e4, 1e-2, 0.6)


def _inv_root(repeats: int, kappa: float, rtol: float, goal: float) -> Row:
    m = _matrix(1024, 1024, kappa, symmetric=True)
    w, v = torch.linalg.eigh(m.double())
    exact = (v * w**-0.25) @ v.mT
    peer, slow = "torch.linalg.eigh, float64, alone", "coupled Newton, float32"
    times = computing(
        {
            "gramian": lambda: linalg.inv_root_ex(m, 4, rtol=rtol),
            peer: lambda: torch.linalg.eigh(m.double()),
            slow: lambda: coupled_newton(m, 4),
        },
        repeats=repeats,
    )
    value, certificate = times["gramian"].result
    errors = {"gramian": _relative(value, exact), slow: _relative(times[slow].result, exact)}
    return Row(
        f"inv_root p=4, n 1024, κ {kappa:.0e}, to {rtol:.0e}".replace("e+0", "e").replace("e-0", "e-"),
        "‖X − M^(-1/4)‖ / ‖M^(-1/4)‖",
        _measured(times, errors, {"gramian": _remark(certificate, rtol)}),
        (
            (Goal("time ÷ eigh's in float64", "<=", goal), times["gramian"].median / times[peer].median),
            (Goal("error", "<=", rtol), errors["gramian"]),
        ),
    )


def svdvals(repeats: int) -> Row:
    """Singular values of 4096 × 1024, κ 1e6, against torch.linalg.svdvals."""
    a = _matrix(4096, 1024, 1e6)
    exact = torch.linalg.svdvals(a.double())
    times = computing(
        {
            # In float64, since a float32 answer would show no more than its own rounding; the time includes the cast.
            "gramian": lambda: linalg.svdvals_ex(a.double(), rtol=1e-4),
            "torch.linalg.svdvals": lambda: torch.linalg.svdvals(a),
        },
        repeats=repeats,
    )
    value, certificate = times["gramian"].result
    errors = {
        "gramian": float((value.double() - exact).abs().max() / exact[0]),
        "torch.linalg.svdvals": float((times["torch.linalg.svdvals"].result.double() - exact).abs().max() / exact[0]),
    }
    rival = "torch.linalg.svdvals"
    return Row(
        "svdvals 4096×1024, κ 1e6",
        "max |σ̂ − σ| / σ₁",
        _measured(times, errors, {"gramian": _remark(certificate, 1e-4)}),
        (
            (Goal("time ÷ torch.linalg.svdvals'", "<=", 0.55), times["gramian"].median / times[rival].median),
            (Goal("torch.linalg.svdvals' error ÷ error", ">=", 1000.0), errors[rival] / max(errors["gramian"], 1e-18)),
        ),
    )


def _off_one(values: Sequence[Tensor]) -> float:
    """Root mean square of σ − 1 over the singular values of all matrices: how far from orthogonal they are."""
    sigma = torch.cat([torch.linalg.svdvals(x.double()).flatten() for x in values])
    return float((sigma - 1).square().mean().sqrt())


def orthogonalize_many(repeats: int) -> Row:
    """Directions of 64 matrices of 128 × 128, against torch.optim.Muon's function in a loop and LAPACK on the batch."""
    g = random.normal(64, 128, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    rival = "torch.optim.Muon's function, a loop"
    times = computing(
        {
            "gramian": lambda: linalg.polar_ex(g, rtol=0.1, certify=False)[0],
            rival: lambda: torch.stack([muon_function(x, *MUON) for x in g]),
            "torch.linalg.svd, batched": lambda: _svd_polar(g),
        },
        repeats=max(repeats, 9),
    )
    errors = {name: _off_one([t.result]) for name, t in times.items()}
    ratio = times["gramian"].median / times[rival].median
    return Row(
        "orthogonalize 64 of 128², normal entries",
        "root mean square of σ − 1",
        _measured(times, errors, {"gramian": "asked 0.1"}),
        (
            (Goal("time ÷ Muon's loop", "<=", 0.17), ratio),
            (Goal("error ÷ Muon's", "<=", 1.0), errors["gramian"] / errors[rival]),
        ),
    )


def _gradient_like(m: int, n: int, generator: torch.Generator) -> Tensor:
    """A stack of four matrices: noise, σᵢ = i^-½, σᵢ = 1/i, and noise with ten strong directions."""
    i = torch.arange(1, min(m, n) + 1, dtype=torch.float64)
    strong = random.orthogonal(m, 10, generator=generator) @ random.orthogonal(10, n, generator=generator)
    return torch.stack(
        [
            random.normal(m, n, generator=generator, dtype=torch.float32),
            random.with_spectrum(m, n, spectrum=i**-0.5, generator=generator, dtype=torch.float32),
            random.with_spectrum(m, n, spectrum=1 / i, generator=generator, dtype=torch.float32),
            random.normal(m, n, generator=generator, dtype=torch.float32)
            + 10 * (math.sqrt(m) + math.sqrt(n)) * strong.float(),
        ]
    )


def directions(repeats: int) -> Row:
    """Directions for the sixteen matrices of a transformer of four layers, width 384, against torch.optim.Muon."""
    generator = torch.Generator().manual_seed(0)
    stacks = [_gradient_like(m, n, generator) for m, n in ((1152, 384), (384, 384), (1536, 384), (384, 1536))]
    rival = "torch.optim.Muon's function, a loop"

    def ours(rtol: float) -> list[Tensor]:
        return [linalg.polar_ex(x, rtol=rtol, certify=False)[0] for x in stacks]

    times = computing(
        {
            "gramian, rtol 0.1": lambda: ours(0.1),
            "gramian, rtol 0.03": lambda: ours(0.03),
            rival: lambda: [torch.stack([muon_function(x, *MUON) for x in stack]) for stack in stacks],
        },
        repeats=repeats,
    )
    errors = {name: _off_one(t.result) for name, t in times.items()}
    goals = []
    for name, time, error in (("gramian, rtol 0.1", 0.45, 0.11), ("gramian, rtol 0.03", 1.0, 0.03)):
        goals.append((Goal(f"{name}: time ÷ Muon's", "<=", time), times[name].median / times[rival].median))
        goals.append((Goal(f"{name}: error", "<=", error), errors[name]))
    return Row(
        "directions, 4 each of 1152×384, 384², 1536×384, 384×1536",
        "root mean square of σ − 1",
        _measured(times, errors, {}),
        tuple(goals),
    )


TASKS: dict[str, Callable[[int], Row]] = {
    "polar_wide_direction": polar_wide_direction,
    "polar_wide": polar_wide,
    "polar_square": polar_square,
    "inv_root": inv_root,
    "inv_root_rough": inv_root_rough,
    "svdvals": svdvals,
    "orthogonalize_many": orthogonalize_many,
    "directions": directions,
}
"""Name of a task, and the function that measures it: number of repeats → row."""
