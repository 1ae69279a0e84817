"""Without a certificate every function gives the value of the same route, and says only what it saw to fail."""

from __future__ import annotations

import math

import pytest
import torch

import gramian.linalg as gl
from cases import WIDE, rank_deficient, seeded
from gramian import random
from gramian.errors import ConvergenceError
from gramian.linalg.certificate import REASONS, UNASKED
from gramian.linalg.engine.function import FUNCTIONS as REGISTRY
from gramian.linalg.engine.function import examples
from gramian.linalg.linear_map import as_linear_map


def spd(n, dtype, decades=2):
    spectrum = torch.logspace(0, -decades, n, dtype=torch.float64)
    return random.with_spectrum(2, n, n, spectrum=spectrum, symmetric=True, generator=seeded(5), dtype=dtype)


def flat(value):
    return [value] if isinstance(value, torch.Tensor) else [*value]


def without(function, *args, **options):
    value, proof = function(*args, certify=False, **options)
    assert not proof.converged.any()
    assert (proof.error_bound == math.inf).all()
    assert (proof.reason == UNASKED).all(), proof.reasons
    return value, proof


METHODS = [(label, name, options, m) for label, name, options in examples() for m in REGISTRY[name].methods]


@pytest.mark.parametrize(("label", "name", "options", "method"), METHODS, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_every_method_gives_the_same_value(label, name, options, method, dtype):
    m = spd(48, dtype)
    function = getattr(gl, f"{name}_ex")
    certified, proof = function(m, method=method, **options(m))
    value, bare = without(function, m, method=method, **options(m))
    # The last correction of some is known only with its bound.
    close = {"newton", "svd_refined", "squaring", "squaring_refined"}
    tolerance = 4 * torch.finfo(dtype).eps if method in close else 0.0
    assert (value - certified).norm() <= tolerance * certified.norm()
    assert bare.method_names == proof.method_names


SPECTRAL = {
    "spectral_norm": [lambda a, **o: gl.spectral_norm_ex(a, **o), "lanczos", "svdvals"],
    "cond": [lambda a, **o: gl.cond_ex(a, **o), "gram", "lanczos", "inverse"],
    "svd_lowrank": [lambda a, **o: gl.svd_lowrank_ex(a, 3, **o), "block_krylov", "svd"],
}


@pytest.mark.parametrize(("name", "method"), [(k, m) for k, (_, *rest) in SPECTRAL.items() for m in rest])
def test_numbers_and_factors_are_those_of_the_certified_call(name, method):
    a = random.normal(2, 200, 150, generator=seeded(6), dtype=torch.float64)
    function = SPECTRAL[name][0]
    certified, _ = function(a, method=method)
    value, bare = without(function, a, method=method)
    assert set(bare.method_names) == {method}
    for x, y in zip(flat(value), flat(certified), strict=True):
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-9)


def test_auto_takes_the_first_route_that_does_not_decline():
    m = spd(64, torch.float32, 1)
    for f in (gl.inv, lambda m, **o: gl.inv_root(m, 4, **o), gl.sqrtm, gl.polar, gl.svdvals, gl.expm, gl.pinv, gl.cond):
        assert torch.allclose(f(m, certify=False), f(m), rtol=2e-4, atol=2e-4)
    for p in (-2, 1, "fro"):
        assert torch.allclose(gl.cond(m, p, certify=False), gl.cond(m, p), rtol=1e-4)
    b = m[..., :3]
    assert torch.allclose(gl.solve(m, b, certify=False), gl.solve(m, b), rtol=1e-4, atol=1e-5)
    assert torch.allclose(gl.lstsq(m, b, certify=False), gl.lstsq(m, b), rtol=1e-4, atol=1e-5)
    root = gl.sqrtm(m, symmetric=False, certify=False)
    assert torch.allclose(root @ root, m, rtol=1e-4, atol=1e-5)
    narrow = as_linear_map("test", m[0].to_sparse())
    assert torch.allclose(gl.spectral_norm(narrow, certify=False), gl.spectral_norm(narrow), rtol=1e-6)
    assert torch.allclose(gl.svd_lowrank(narrow, 2, certify=False)[1], gl.svd_lowrank(narrow, 2)[1], rtol=1e-6)


def test_what_is_seen_to_fail_still_raises():
    m = rank_deficient(40)
    a = torch.stack([m, torch.eye(40, dtype=m.dtype), torch.full_like(m, math.nan)])
    value, proof = gl.polar_ex(a, certify=False)
    assert proof.reasons == [REASONS[2], REASONS[UNASKED], REASONS[1]]
    assert value[2].isnan().all()
    assert torch.allclose(value[1], a[1])
    with pytest.raises(ConvergenceError, match="singular"):
        gl.inv(torch.zeros(3, 3), certify=False)
    with pytest.raises(ConvergenceError, match="NaN or inf"):
        gl.sqrtm(torch.full((3, 3), math.inf), certify=False)
    with pytest.raises(ConvergenceError, match="negative"):
        gl.inv_root(-torch.eye(3), 2, certify=False)


NAN = torch.full((3, 3), math.nan)
SEEN = {
    "pinv": (lambda **o: gl.pinv_ex(torch.ones(3, 2), tolerance=0.0, **o), "rank-deficient"),
    "lstsq": (lambda **o: gl.lstsq_ex(torch.ones(3, 2), torch.ones(3, 1), tolerance=0.0, **o), "rank-deficient"),
    "lstsq of NaN": (lambda **o: gl.lstsq_ex(torch.eye(3), NAN, **o), "NaN or inf"),
    "solve": (lambda **o: gl.solve_ex(torch.ones(3, 3), torch.ones(3, 1), **o), "singular"),
    "solve of NaN": (lambda **o: gl.solve_ex(torch.eye(3), NAN, **o), "NaN or inf"),
    "direction": (lambda **o: gl.polar_ex(NAN, rtol=0.1, **o), "NaN or inf"),
    "newton_schulz": (lambda **o: gl.polar_ex(NAN, method="newton_schulz", **o), "NaN or inf"),
    "coupled_newton": (
        lambda **o: gl.inv_root_ex(torch.diag(torch.tensor([1.0, -1.0])), 4, method="coupled_newton", **o),
        "above rtol",
    ),
    "asymmetric": (lambda **o: gl.sqrtm_ex(torch.ones(3, 3).triu(), **o), "symmetric"),
    "root": (lambda **o: gl.sqrtm_ex(-torch.eye(3), symmetric=False, **o), "negative real axis"),
    "inverse root": (lambda **o: gl.inv_root_ex(-torch.eye(3), 2, symmetric=False, **o), "negative real axis"),
    "inverse third root": (lambda **o: gl.inv_root_ex(-torch.eye(3), 3, symmetric=False, **o), "negative real axis"),
    "logm": (lambda **o: gl.logm_ex(-torch.eye(3), **o), "negative real axis"),
    "sign": (lambda **o: gl.sign_ex(torch.zeros(3, 3), **o), "imaginary axis"),
    "expm": (lambda **o: gl.expm_ex(1e30 * torch.ones(3, 3), **o), "overflows"),
    "cond": (lambda **o: gl.cond_ex(NAN, **o), "NaN or inf"),
    "svd_shrink": (lambda **o: gl.svd_shrink_ex(NAN, **o), "NaN or inf"),
    "pca": (lambda **o: gl.pca_ex(NAN, 1, **o), "NaN or inf"),
    "power": (lambda **o: gl.matrix_power_scaled_ex(torch.zeros(2, 2), -1, **o), "singular"),
    "product": (lambda **o: gl.product_scaled_ex([NAN, NAN], **o), "NaN or inf"),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_is_seen_to_fail_is_said(name):
    call, reason = SEEN[name]
    _, proof = call(certify=False)
    assert not proof.converged.any()
    assert all(reason in found for found in proof.reasons), proof.reasons


def test_pseudoinverses_and_inverse_roots_are_those_of_the_certified_call():
    g = seeded(8)
    low = random.normal(12, 3, generator=g, dtype=torch.float64) @ random.normal(3, 7, generator=g, dtype=torch.float64)
    b = random.normal(12, 2, generator=g, dtype=torch.float64)
    m = 3 * torch.eye(6, dtype=torch.float64) + random.normal(6, 6, generator=g, dtype=torch.float64)
    for call in (
        lambda **o: gl.pinv_ex(low, **o),
        lambda **o: gl.pinv_ex(low, rank=2, **o),
        lambda **o: gl.lstsq_ex(low, b, **o),
        lambda **o: gl.lstsq_ex(low, b, 0.1, **o),
        lambda **o: gl.lstsq_ex(low, b, rank=2, **o),
        lambda **o: gl.inv_root_ex(m, 1, symmetric=False, **o),
        lambda **o: gl.inv_root_ex(m, 2, symmetric=False, **o),
        lambda **o: gl.inv_root_ex(m, 3, symmetric=False, **o),
    ):
        certified, proof = call()
        value, bare = without(call)
        assert proof.converged.all()
        assert getattr(bare, "rank", None) == getattr(proof, "rank", None)
        torch.testing.assert_close(value, certified, rtol=1e-12, atol=1e-13)


OTHERS = {
    "svd_shrink": lambda **o: gl.svd_shrink_ex(random.normal(9, 6, generator=seeded(3)), **o),
    "pca": lambda **o: gl.pca_ex(random.normal(20, 6, generator=seeded(4)), 3, **o),
    "pca in batches": lambda **o: gl.pca_ex(iter(random.normal(20, 6, generator=seeded(4)).split(7)), 3, **o),
    "power": lambda **o: gl.matrix_power_scaled_ex(random.normal(2, 6, 6, generator=seeded(5)), 37, **o),
    "negative power": lambda **o: gl.matrix_power_scaled_ex(random.normal(6, 6, generator=seeded(6)), -5, **o),
    "complex power": lambda **o: gl.matrix_power_scaled_ex(torch.tensor([[1j, 2], [0.5, 1]]), 9, **o),
    "product": lambda **o: gl.product_scaled_ex([random.normal(4, 4, generator=seeded(i)) for i in range(5)], **o),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_value_is_the_same_to_the_last_bit(name):
    (certified, proof), (value, bare) = OTHERS[name](), OTHERS[name](certify=False)
    for x, y in zip(*((v if isinstance(v, tuple) else (v,)) for v in (certified, value)), strict=True):
        assert torch.equal(x, y)
    assert proof.converged.all()
    assert not bare.converged.any()
    assert bare.error_bound.isinf().all()
    assert bare.converged.shape == proof.converged.shape
    assert set(bare.reasons) == {"no certificate was asked for"}


def test_it_is_differentiable():
    m = spd(6, torch.float64)
    grads = []
    for certify in (True, False):
        x = m.clone().requires_grad_()
        gl.inv_root(x, 2, certify=certify).square().sum().backward()
        grads.append(x.grad)
    assert torch.allclose(*grads)
