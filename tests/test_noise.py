"""Noise is not structure: the limit laws are exact, spikes are found, heavy tails are not mistaken for them."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gramian.inspection import describe
from gramian.inspection.weights.entries import LARGEST, LEAST, count_entries
from gramian.inspection.weights.noise import against_noise, marchenko_pastur_cdf, tracy_widom_quantile, tracy_widom_sf
from gramian.inspection.weights.tail import CRITICAL_DISTANCE, _fit, fit_tail


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_tracy_widom_has_its_moments():
    """Bornemann (2010), table 10: mean −1.20653357458, variance 1.60778103458."""
    x = np.linspace(-11, 11, 2201)
    sf = np.array([tracy_widom_sf(s) for s in x])
    mean = -11 + np.trapezoid(sf, x)
    second = 121 + np.trapezoid(2 * x * sf, x)  # E s² = a² + ∫ 2 s P(s) from a
    assert mean == pytest.approx(-1.20653357458, abs=1e-5)
    assert second - mean**2 == pytest.approx(1.60778103458, abs=1e-4)


@pytest.mark.parametrize("s", [6.0, 10.0, 20.0, 40.0])
def test_small_probabilities_follow_the_tail(s):
    """1 − F₁(s) ~ exp(−⅔ s^{3/2}) / (4 √π s^{3/4})  (Baik, Buckingham & DiFranco 2008)."""
    asymptote = math.exp(-2 / 3 * s**1.5) / (4 * math.sqrt(math.pi) * s**0.75)
    assert tracy_widom_sf(s) == pytest.approx(asymptote, rel=1.2 / s**1.5)


def test_probabilities_are_monotone_and_inverted():
    values = [tracy_widom_sf(s) for s in np.linspace(-15, 60, 151)]
    assert all(0 <= b <= a <= 1 for a, b in pairwise(values))
    for level in (0.5, 1e-3, 1e-9):
        assert tracy_widom_sf(tracy_widom_quantile(level)) == pytest.approx(level, rel=1e-4)


@pytest.mark.parametrize("shape", [(400, 400), (800, 200), (500, 450)])
def test_a_gaussian_matrix_follows_marchenko_pastur(shape):
    m, n = shape
    values = np.sort((torch.linalg.svdvals(normal(m, n).double()).square() / m).numpy())
    assert np.abs(marchenko_pastur_cdf(values, m, n) - (np.arange(n) + 0.5) / n).max() < 3 / n


@pytest.mark.parametrize("strength", [1.4, 3.0, 100.0])
def test_a_planted_direction_is_found_and_counted(strength):
    m, n = 200, 120
    edge = math.sqrt(m) + math.sqrt(n)
    u, v = torch.linalg.qr(normal(m, 2, seed=1)).Q, torch.linalg.qr(normal(n, 2, seed=2)).Q
    noise = describe(normal(m, n) + strength * edge * u @ v.mT).noise
    assert noise is not None
    assert noise.above == 2
    assert noise.p_value < 1e-5
    assert noise.edge == pytest.approx(edge, rel=0.02)


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_a_direction_below_the_transition_is_not(strength):
    m, n = 200, 120
    u, v = torch.linalg.qr(normal(m, 1, seed=1)).Q, torch.linalg.qr(normal(n, 1, seed=2)).Q
    noise = describe(normal(m, n) + strength * math.sqrt(m) * u @ v.mT).noise
    assert noise is not None
    assert noise.above == 0
    assert noise.is_noise


@pytest.mark.parametrize("seed", range(5))
def test_extreme_entries_are_not_structure(seed):
    w = normal(100, 100, seed=seed) / normal(2, 100, 100, seed=seed + 50).square().mean(0).sqrt()  # Student t, 2
    noise = describe(w).noise
    assert noise is not None
    assert noise.above == 0
    assert "extreme entries" in noise.note


def test_small_sides_abstain():
    assert describe(normal(15, 300)).noise is None
    assert against_noise(torch.zeros(20, dtype=torch.float64), (20, 20)) is None


# ---- power-law tails -----------------------------------------------------------------------------------------------


def with_eigenvalues(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.sort(np.sqrt(values))[::-1].copy())


def test_a_power_law_is_found_with_its_interval():
    covered = 0
    for seed in range(40):
        values = 1 + np.random.default_rng(seed).pareto(1.5, 400)
        tail = fit_tail(with_eigenvalues(values))
        if tail.alpha is not None:
            covered += tail.low <= 2.5 <= tail.high
    assert covered >= 30


@pytest.mark.parametrize("make", ["gaussian", "uniform", "log-normal", "orthogonal"])
def test_what_is_no_power_law_abstains(make):
    fitted = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        values = {
            "gaussian": lambda rng=rng: np.linalg.svd(rng.standard_normal((300, 200)))[1] ** 2,
            "uniform": lambda rng=rng: rng.uniform(0.5, 1.5, 300),
            "log-normal": lambda rng=rng: np.exp(0.5 * rng.standard_normal(400)),
            "orthogonal": lambda: np.ones(300),
        }[make]()
        tail = fit_tail(with_eigenvalues(values))
        fitted += tail.alpha is not None
        assert tail.alpha is not None or tail.note
    assert fitted <= 3


@pytest.mark.parametrize("count", [0, 1, 49])
def test_few_values_abstain(count):
    tail = fit_tail(torch.ones(count, dtype=torch.float64))
    assert tail.alpha is None
    assert "fewer" in tail.note


def test_the_critical_distance_is_the_quantile_of_fitted_power_laws():
    rng = np.random.default_rng(1)
    logs = np.sort(rng.exponential(1 / 1.5, (400, 200)), axis=1)
    _, start, distance = _fit(logs)
    size = (logs >= start[:, None]).sum(1)
    assert np.quantile(distance * np.sqrt(size), 0.9) == pytest.approx(CRITICAL_DISTANCE, rel=0.12)


# ---- entries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_limits_of_narrow_dtypes_are_those_of_casts(dtype):
    largest = torch.tensor(LARGEST[dtype], dtype=torch.float64)
    least = torch.tensor(LEAST[dtype], dtype=torch.float64)
    assert largest.float().to(dtype).isfinite()
    assert torch.nextafter(largest.float(), torch.tensor(math.inf)).to(dtype).isinf()
    assert least.float().to(dtype) == 0
    assert torch.nextafter(least.float(), torch.tensor(1.0)).to(dtype) != 0


@given(st.lists(st.floats(width=32), min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_counts_are_those_of_casts(values):
    w = torch.tensor(values)[None]
    entries = count_entries([w])
    finite = w[w.isfinite()]
    assert entries.num_nonfinite == w.numel() - finite.numel()
    assert entries.num_zeros == int((w == 0).sum())
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype)[6:]
        assert entries.overflows[name] == int(finite.to(dtype).isinf().sum())
        assert entries.underflows[name] == int(((finite.to(dtype) == 0) & (finite != 0)).sum())
