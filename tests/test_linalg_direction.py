"""Directions for optimizers: σ within the asked distance of 1, best coefficients, and nothing that blows up."""

from __future__ import annotations

import math

import pytest
import torch

import gramian.linalg as gl
from cases import DEVICES, hostile, seeded, untyped
from gramian import random
from gramian.linalg.polar_factor.direction import cheapest, least_ratio
from gramian.linalg.polar_factor.few_passes import few_passes
from gramian.linalg.polar_factor.newton_schulz import COEFFICIENTS, composed
from gramian.linalg.polar_factor.zolotarev import fractions, zolotarev


@pytest.mark.parametrize("terms", [1, 2, 3, 5])
@pytest.mark.parametrize("low", [0.3, 1 / 128, 1e-3])
def test_fractions_are_the_best_of_their_degree(low, terms):
    f = fractions(low, terms)
    x = torch.logspace(math.log10(low), 0, 200_001, dtype=torch.float64)
    y = f.scale * x * (1 + sum(w / (x**2 + p) for w, p in zip(f.weights, f.poles, strict=True))) - 1
    assert y.abs().max().item() == pytest.approx(f.error, rel=1e-6)
    # Chebyshev: as many equal extremes of alternating sign as there are free coefficients, and one, make it the best.
    extreme = y[y.abs() > f.error * (1 - 1e-5)].sign()
    assert 1 + (extreme.diff() != 0).sum() == 2 * terms + 2


def test_composed_quintics_begin_with_the_published_ones():
    for found, published in zip(composed(1e-3, 7).coefficients, COEFFICIENTS[:-1], strict=False):
        assert found == pytest.approx(published, rel=1e-9)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_composed_quintics_err_by_what_they_say(steps):
    found = composed(1 / 64, steps)
    x = torch.linspace(1 / 64, 1, 100_001, dtype=torch.float64)
    for a, b, c in found.coefficients:
        x = x * (a + x**2 * (b + x**2 * c))
    assert (x - 1).abs().max().item() == pytest.approx(found.error, rel=1e-6)


@pytest.mark.parametrize("first", [5, 9])
@pytest.mark.parametrize("shape", [(128, 128), (128, 300)], ids=str)
def test_a_close_bound_reaches_smaller_singular_values(shape, first):
    spectrum = torch.ones(128, dtype=torch.float64)
    spectrum[64:] = 1 / 64  # ‖XXᵀ‖_F^½ is 2.8 times ‖X‖₂ then, and ‖(XXᵀ)²‖_F^¼ is 1.7 times it
    a = random.with_spectrum(2, *shape, spectrum=spectrum, generator=seeded(8), dtype=torch.float32)
    off, near = (
        (torch.linalg.svdvals(few_passes(a, low=1 / 128, steps=4, first=first, close=close)) - 1).abs().max()
        for close in (False, True)
    )
    assert near < composed(1 / 128, 4, first).error + 2e-3 < off


def gradient_like(kind, m, n, generator):
    """Spectra that gradients have: of noise, of a power law, of a few strong directions in noise."""
    k = min(m, n)
    if kind == "normal":
        return random.normal(2, m, n, generator=generator, dtype=torch.float32)
    if kind == "strong":
        edge = math.sqrt(m) + math.sqrt(n)
        strong = random.orthogonal(2, m, 5, generator=generator) @ random.orthogonal(2, 5, n, generator=generator)
        return random.normal(2, m, n, generator=generator, dtype=torch.float32) + 10 * edge * strong
    spectrum = torch.arange(1, k + 1, dtype=torch.float64) ** -float(kind)
    return random.with_spectrum(2, m, n, spectrum=spectrum, generator=generator, dtype=torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rtol", [0.2, 0.1, 0.03])
@pytest.mark.parametrize(
    ("kind", "shape"),
    # Not strong directions in square noise: much of that noise is below the reach.
    [(k, s) for k in ("normal", "0.5", "1") for s in ((64, 64), (96, 384), (300, 100), (256, 320))]
    + [("strong", s) for s in ((96, 384), (300, 100), (256, 320))],
    ids=str,
)
def test_direction_is_as_close_as_asked(kind, shape, rtol, device):
    a = gradient_like(kind, *shape, seeded(7)).to(device)
    q, certificate = gl.polar_ex(a, rtol=rtol, certify=False)
    sigma = torch.linalg.svdvals(q.double())
    assert (sigma - 1).square().mean(-1).sqrt().max() < 1.1 * rtol
    exact = gl.polar(a.double(), rtol=1e-9)
    aligned = torch.linalg.norm(q.double() - exact, dim=(-2, -1)) / min(shape) ** 0.5
    assert aligned.max() < 1.3 * rtol
    assert not certificate.converged.any()
    assert certificate.error_bound.isinf().all()


@pytest.mark.parametrize(
    "run",
    [
        lambda a: zolotarev(a, low=1 / 64, terms=2, dtype=torch.bfloat16),
        lambda a: zolotarev(a, low=5e-4, terms=4),
        lambda a: few_passes(a, low=1 / 64, steps=4, dtype=torch.bfloat16, close=True),
        lambda a: few_passes(a, low=1 / 64, steps=6, close=True),
        lambda a: gl.polar_ex(a, rtol=0.1, certify=False)[0],
    ],
    ids=["fractions bf16", "fractions", "quintics bf16", "quintics", "auto"],
)
@pytest.mark.parametrize("shape", [(40, 12, 40), (40, 40, 12), (10, 64, 64), (4, 256, 256)], ids=str)
def test_hostile_matrices_stay_bounded_and_apart(shape, run):
    a = hostile(77, *shape, torch.float32, psd=False)
    ones = torch.ones(shape[1:])
    a[0], a[1], a[2], a[3] = 0, ones, 1e30 * torch.randn(shape[1:], generator=seeded(1)), 1e-42 * ones
    finite = a.isfinite().flatten(1).all(1)
    x = run(a)
    assert torch.equal(x.isfinite().flatten(1).all(1), finite)
    assert torch.linalg.matrix_norm(x[finite], 2).max() < 1.6
    assert torch.equal(x[0], torch.zeros(shape[1:]))
    # The one direction of a matrix of rank one is found.
    assert abs(float((x[1] * ones).sum() / ones.norm()) - 1) < 0.3
    assert torch.allclose(run(a[finite]), x[finite], atol=0.1)


def test_empty_and_half_types_keep_their_shape_and_dtype():
    for shape in ((0, 4, 4), (3, 0, 4), (4, 0), (2, 1, 1)):
        q, certificate = gl.polar_ex(torch.ones(shape), rtol=0.1, certify=False)
        assert (q.shape, certificate.steps.shape) == (shape, shape[:-2])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        a = random.normal(3, 20, 30, generator=seeded(3), dtype=dtype)
        q, _ = gl.polar_ex(a, rtol=0.1, certify=False)
        assert q.dtype == dtype
        assert (torch.linalg.svdvals(q.double()) - 1).square().mean().sqrt() < 0.11


def test_same_matrix_gives_the_same_direction_alone_and_in_a_batch():
    a = random.normal(5, 300, 400, generator=seeded(4), dtype=torch.float32)
    together = zolotarev(a, low=1e-2, terms=2)
    assert torch.allclose(torch.stack([zolotarev(x, low=1e-2, terms=2) for x in a]), together, atol=1e-5)


@untyped()
def test_the_approach_and_its_limits():
    assert least_ratio(384, 0.1) == pytest.approx(1 / 384)
    assert least_ratio(10, 0.1) == pytest.approx(1 / 100)
    assert least_ratio(100_000, 0.1) == least_ratio(10, 1e-9)
    assert cheapest(384, 1536, 4, 0.1, "cpu").dtype == torch.bfloat16
    assert cheapest(384, 1536, 4, 0.01, "cpu").dtype == torch.float32
    assert cheapest(384, 1536, 4, 1e-4, "cpu").method == "newton_schulz"


@pytest.mark.parametrize("shape", [(3, 80, 80), (3, 60, 200)], ids=str)
def test_fractions_by_name_are_certified(shape):
    spectrum = torch.logspace(0, -1.5, min(shape[1:]), dtype=torch.float64)
    a = random.with_spectrum(*shape, spectrum=spectrum, generator=seeded(2), dtype=torch.float32)
    q, certificate = gl.polar_ex(a, method="zolotarev", rtol=0.05)
    assert certificate.converged.all()
    assert set(certificate.kind_names) == {"estimate"}
    error = torch.linalg.norm(q.double() - gl.polar(a.double()), dim=(-2, -1)) / min(shape[1:]) ** 0.5
    assert (error <= certificate.error_bound).all()
