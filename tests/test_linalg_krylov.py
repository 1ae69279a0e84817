"""What the Krylov routes prove holds on spectra made to mislead them."""

from __future__ import annotations

import math

import pytest
import torch

import gramian.linalg as gl
from cases import WIDE, seeded
from gramian import random
from gramian.linalg import krylov, lowrank

N = 140
I = torch.arange(1, N + 1, dtype=torch.float64)
SPECTRA = {
    "zero": 0 * I,
    "rank 1": (I == 1).double(),
    "equal": 0 * I + 3,
    "the top repeated, more often than a block is wide": torch.where(I <= 30, 1.0, 0.5 * I**-0.5),
    "a cluster at the top": torch.where(I <= 30, 1 - 1e-6 * I, 0.5),
    "a pair at the top": torch.where(I <= 2, 1 - 1e-7 * I, 0.9),
    "one just above the rest": torch.where(I == 1, 1 + 1e-3, 1.0),
    "slow": I**-0.5,
    "fast": 2.0 ** -(I / 2),
    "linear": 1 - I / (N + 1),
    "two steps": torch.where(I <= 12, 1.0, torch.where(I <= 40, 1e-3, 1e-6)),
    "a cluster at the bottom": torch.where(I > N - 30, 1e-3 * (1 + 1e-6 * I), 1.0),
}

SPECTRA = {name: s.double() for name, s in SPECTRA.items()}


def matrices(dtype, *, rows=170, scale=1.0):
    g = seeded(31)
    parts = [random.with_spectrum(rows, N, spectrum=s, generator=g, dtype=torch.float64) for s in SPECTRA.values()]
    return (torch.stack(parts) * scale).to(dtype)


def unlike(value, exact):
    """Relative error; 0 of two zeros, inf where only one is."""
    return torch.where((exact == 0) & (value == 0), 0.0, ((value - exact).abs() / exact.abs()).nan_to_num(nan=math.inf))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_norms_of_misleading_spectra_are_within_their_bounds(dtype, scale):
    a = matrices(dtype, scale=scale)
    exact = torch.linalg.svdvals(a.double())[:, 0]
    for rtol in (1e-2, 1e-4, 1e-6):
        value, certificate = gl.spectral_norm_ex(a, method="lanczos", rtol=rtol)
        assert (unlike(value.double(), exact) <= certificate.error_bound + 1e-13).all()
        assert certificate.converged.all(), [n for n, c in zip(SPECTRA, certificate.converged, strict=True) if not c]


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("rows", [N, 170])
def test_conditions_of_misleading_spectra_are_within_their_bounds(dtype, rows):
    a = matrices(dtype, rows=rows)
    s = torch.linalg.svdvals(a.double())
    regular = s[:, -1] > 1e-10 * s[:, 0]
    value, certificate = gl.cond_ex(a, method="lanczos", rtol=1e-2)
    exact = s[:, 0] / s[:, -1]
    assert (unlike(value.double(), exact) <= certificate.error_bound + 1e-6)[regular].all()
    assert certificate.converged[s[:, -1] > 1e-8 * s[:, 0]].all()
    assert not certificate.converged[s[:, -1] <= 1e-15 * s[:, 0]].any()


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("rank", [1, 12, 30])
def test_excesses_on_misleading_spectra_are_within_their_bounds(dtype, scale, rank):
    a = matrices(dtype, scale=scale)
    wide, s = a.double(), torch.linalg.svdvals(a.double())
    size, optimum = s.norm(dim=-1).clamp_min(2.0**-1000), s[:, rank:].norm(dim=-1)
    for method in ("block_krylov", "auto"):
        (u, d, v), certificate = gl.svd_lowrank_ex(a, rank, method=method, rtol=1e-4)
        missed = (wide - (u.double() * d.double()[:, None]) @ v.double().mT).flatten(1).norm(dim=1)
        assert ((missed - optimum) / size <= certificate.error_bound + 1e-13).all()
    assert certificate.converged.all()


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 15, 16, 17, 18, 33])
def test_krylov_routes_of_tiny_matrices(n, dtype):
    a = random.normal(6, n + 2, n, generator=seeded(32), dtype=torch.float64).to(dtype)
    a[1], a[2, :, 0], a[3] = 0, 0, a[3, :, :1] @ a[3, :1]
    s = torch.linalg.svdvals(a.double())
    for seed in range(3):
        g = seeded(seed)
        value, certificate = gl.spectral_norm_ex(a, method="lanczos", generator=g)
        assert (unlike(value.double(), s[:, 0]) <= certificate.error_bound + 1e-13).all()
        for rank in {1, n // 2, n}:
            (u, d, v), certificate = gl.svd_lowrank_ex(a, rank, method="block_krylov", generator=g)
            missed = (a.double() - (u.double() * d.double()[:, None]) @ v.double().mT).flatten(1).norm(dim=1)
            excess = (missed - s[:, rank:].norm(dim=-1)) / s.norm(dim=-1).clamp_min(2.0**-1000)
            assert (excess <= certificate.error_bound + 1e-13).all()


@pytest.mark.parametrize("name", SPECTRA)
def test_a_run_that_stops_too_early_still_bounds_the_top(name):
    m = torch.diag(SPECTRA[name])[None]
    for seed in range(8):
        for r, steps in ((1, 3), (2, 2), (8, 1), (16, 3), (16, 8)):
            start = random.normal(1, r, N, generator=seeded(seed), dtype=torch.float64)
            found = krylov.lanczos(lambda y: y @ m, start, steps)
            theta = krylov.ritz(found)
            for near in (1.0, 1 + 1e-9, 1.01, 3.0):
                high = krylov.top_bound(found, theta, theta * near, noise=torch.zeros_like(theta))
                assert high >= SPECTRA[name].max()


def test_the_bound_does_not_trust_the_test_to_fall():
    """With blocks of two ‖F E_qᵀ(λ − T)⁻¹E₁‖ can rise fivefold as λ grows: what is small at one λ excludes none above."""
    t = [[0.3, 0.0, -1.0, -0.7], [0.0, -2.2, -0.2, -0.2], [-1.0, -0.2, -0.7, -1.1], [-0.7, -0.2, -1.1, 1.1]]
    rows = torch.eye(40, dtype=torch.float64)[None]
    residual = torch.tensor([[-0.7, -2.3], [-0.1, -0.4]], dtype=torch.float64) @ rows[:, 4:6]
    found = krylov.Krylov(rows[:, :4], torch.tensor([t], dtype=torch.float64), residual, 2)
    theta, none = krylov.ritz(found), torch.zeros(1, 2, dtype=torch.float64)
    low, high = krylov.reach(found, theta[:, None] + torch.tensor([[0.1, 0.3]]), none)[0].tolist()
    assert high > 5 * low
    # Were the threshold between the two, an eigenvalue at θ + 0.3 could not be excluded.
    found = found._replace(residual=residual / math.sqrt(low * high))
    assert krylov.reach(found, theta[:, None] + 0.1, none[:, :1]) < 1
    assert krylov.top_bound(found, theta, theta + 0.1, noise=none[:, 0]) > theta + 0.3


@pytest.mark.parametrize("r", [1, 3, 16])
def test_resolvents_are_those_of_the_whole_matrix(r):
    m = random.wishart(90, 90, samples=200, generator=seeded(33), dtype=torch.float64)
    found = krylov.lanczos(lambda y: y @ m, random.normal(2, r, 90, generator=seeded(34), dtype=torch.float64), 4)
    top = krylov.ritz(found)
    at = top[:, None] * torch.tensor([0.9, 1.001, 1.5])
    solved, above = krylov.resolvent(found, at)
    eye = torch.eye(4 * r, dtype=torch.float64)
    exact = torch.linalg.inv(at[..., None, None] * eye - found.t[:, None])[..., :r]
    assert above.tolist() == [[False, True, True]] * 2
    assert (solved - exact)[above].norm() <= 1e-10 * exact[above].norm()


@pytest.mark.parametrize("outside", [0.0, 0.3, 0.9, 1.1])
def test_sums_of_the_largest_eigenvalues_are_bounded(outside):
    """Of [[T, Rᵀ], [R, C]], for every C of that norm; and tightly, to second order in R."""
    p, k = 30, 8
    for seed in range(20):
        g = seeded(seed)
        t = torch.diag(torch.linspace(1.5, 0.5, p, dtype=torch.float64))
        r = 0.03 * random.normal(p, p, generator=g, dtype=torch.float64)
        c = random.with_spectrum(
            p, p, spectrum=outside * torch.rand(p, generator=g).double(), symmetric=True, generator=g, dtype=t.dtype
        )
        norm = float(torch.linalg.matrix_norm(c, 2))
        exact = torch.linalg.eigvalsh(torch.cat([torch.cat([t, r.mT], 1), torch.cat([r, c], 1)]))[-k:].sum()
        most = lowrank._most(t[None], (r.mT @ r)[None], torch.tensor([norm], dtype=t.dtype), k)[0]
        assert exact <= most + 1e-12
        if outside <= 0.3:
            second = sum(float(r[:, j].norm() ** 2 / (t[j, j] - norm)) for j in range(k))
            assert most - t.diagonal()[:k].sum() <= 2 * second
