"""The products-only polar factor: its coefficients follow from their definition, and nothing makes it blow up."""

from __future__ import annotations

import mpmath
import pytest
import torch

import gramian.linalg as gl
from cases import DEVICES, hostile, seeded
from gramian import random
from gramian.linalg.polar_factor.newton_schulz import COEFFICIENTS


def minimax_quintic(low, high):
    """The odd quintic closest to 1 on [low, high], by Remez exchange of the two interior extrema."""
    nodes = [low, (3 * low + high) / 4, (low + 3 * high) / 4, high]
    for _ in range(100):
        rows = [[x, x**3, x**5, (-1) ** i] for i, x in enumerate(nodes)]
        a, b, c, _ = mpmath.lu_solve(mpmath.matrix(rows), mpmath.matrix([1] * 4))
        root = mpmath.sqrt(9 * b**2 - 20 * a * c)
        new = [low, mpmath.sqrt((-3 * b - root) / (10 * c)), mpmath.sqrt((-3 * b + root) / (10 * c)), high]
        if max(abs(x - y) for x, y in zip(new, nodes, strict=True)) < mpmath.mpf(10) ** -30:
            break
        nodes = new
    return a, b, c


def test_coefficients_derive_from_minimax_composition():
    low, high, cushion = mpmath.mpf("1e-3"), mpmath.mpf(1), mpmath.mpf("0.02407327424182761")
    for published in COEFFICIENTS[:-1]:
        quintic = minimax_quintic(max(low, cushion * high), high)
        # The cushion leaves the true interval off center: divide so that p(low) and p(high) are equally far from 1.
        ends = [sum(q * x ** (2 * i + 1) for i, q in enumerate(quintic)) for x in (low, high)]
        quintic = [q * 2 / sum(ends) for q in quintic]
        assert [float(q) for q in quintic] == pytest.approx(published, rel=1e-13)
        low = ends[0] * 2 / sum(ends)
        high = 2 - low
    assert COEFFICIENTS[-1] == (15 / 8, -10 / 8, 3 / 8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(6, 64, 64), (4, 96, 32), (4, 32, 96), (2, 3, 16, 8)], ids=str)
def test_reaches_the_polar_factor_and_its_estimate_covers_the_error(shape, device):
    k = min(shape[-2:])
    spectrum = torch.logspace(0, -2, k, dtype=torch.float64)
    a = random.with_spectrum(*shape, spectrum=spectrum, generator=seeded(2), dtype=torch.float32, device=device)
    q, certificate = gl.polar_ex(a, method="newton_schulz", rtol=1e-2)
    assert certificate.converged.all()
    assert set(certificate.kind_names) == {"estimate"}
    exact = gl.polar(a.double())
    error = torch.linalg.norm(q.double() - exact, dim=(-2, -1)) / k**0.5
    assert (error <= certificate.error_bound).all()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_hostile_matrices_stay_bounded_and_apart(seed, dtype):
    a = hostile(900 + seed, 40, 8, 6, torch.float32, psd=False)
    a[0], a[1] = 0, torch.ones(8, 6)
    a[2] = 1e38
    a[3] = 1e-42
    finite = a.isfinite().flatten(1).all(1)
    x, certificate = gl.polar_ex(a, method="newton_schulz", dtype=dtype)
    assert torch.equal(x.isfinite().flatten(1).all(1), finite)
    assert not certificate.converged[~finite].any()
    assert torch.linalg.matrix_norm(x[finite], 2).max() < 1.3
    assert torch.equal(x[0], torch.zeros(8, 6))
    alone = gl.polar_ex(a[finite], method="newton_schulz", dtype=dtype)[0]
    assert torch.allclose(alone, x[finite], atol=1e-4 if dtype is None else 5e-2)


@pytest.mark.parametrize("seed", range(3))
def test_converged_estimates_cover_the_error_on_hostile_matrices(seed):
    a = hostile(4200 + seed, 100, 6, 6, torch.float32, psd=False)
    x, certificate = gl.polar_ex(a, method="newton_schulz", rtol=0.1)
    exact, reference = gl.polar_ex(a.double())
    checked = certificate.converged & reference.converged
    error = torch.linalg.norm(x.double() - exact, dim=(-2, -1)) / 6**0.5
    assert (error <= certificate.error_bound)[checked].all()
    assert checked.sum() > 10


def test_steps_and_certify_are_honored():
    a = random.normal(3, 8, 8, generator=seeded(6))
    _, certificate = gl.polar_ex(a, method="newton_schulz", steps=3, certify=False)
    assert certificate.steps.tolist() == [3, 3, 3]
    assert not certificate.converged.any()
    assert certificate.error_bound.isinf().all()
    residuals = [gl.polar_ex(a, method="newton_schulz", steps=s)[1].residual.max() for s in (3, 5, 7, 9)]
    assert residuals == sorted(residuals, reverse=True)
