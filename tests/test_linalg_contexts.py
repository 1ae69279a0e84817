"""What surrounds a call does not change its answer: autocast, a default device, symbols in a compiled graph, subnormal
scales; and what is no dense matrix is refused by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import gramian.linalg as gl
from cases import Map, seeded, untyped
from gramian import prox, random
from gramian.errors import InputError
from gramian.linalg.engine import lapack


def matrices(*shape, seed=0, dtype=torch.float32):
    return random.normal(*shape, generator=seeded(seed), dtype=dtype)


def definite(n, dtype=torch.float32):
    a = matrices(n, n, dtype=dtype)
    return a @ a.mT / n + torch.eye(n, dtype=dtype)


NARROWED = {
    "polar": lambda m: gl.polar_ex(m, rtol=1e-3),
    "qdwh": lambda m: gl.polar_ex(m, rtol=1e-2, method="qdwh"),
    "inv_root": lambda m: gl.inv_root_ex(m, 4, rtol=1e-2, method="coupled_newton"),
    "inv": lambda m: gl.inv_ex(m, rtol=1e-3),
    "sqrtm": lambda m: gl.sqrtm_ex(m, rtol=1e-3),
}


@pytest.mark.parametrize("name", NARROWED)
def test_autocast_changes_neither_an_answer_nor_its_derivatives(name):
    m, along = definite(150), matrices(150, 150, seed=1)

    def look():
        w = m.clone().requires_grad_()
        value, proof = NARROWED[name](w)
        (grad,) = torch.autograd.grad(value, w, along)
        _, tangent = torch.func.jvp(lambda x: NARROWED[name](x)[0], (m,), (along,))
        return value.detach(), proof.error_bound, grad, tangent

    full = look()
    assert full[1].isfinite()
    with torch.autocast("cpu", torch.bfloat16):
        narrowed = look()
    assert all(torch.equal(a, b) for a, b in zip(full, narrowed, strict=True))


def test_the_distance_from_orthogonal_is_not_made_of_autocast_s_rounding():
    w = random.orthogonal(64, 64, generator=seeded(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert prox.Orthogonal(1.0).penalty(w) < 1e-10


ANYWHERE = {
    "inv": lambda a: gl.inv(a),
    "polar": lambda a: gl.polar(a),
    "expm": lambda a: gl.expm(a / 20),
    "sign": lambda a: gl.sign(a),
    "svd_lowrank": lambda a: gl.svd_lowrank(a, 5)[1],
    "svd_shrink": lambda a: gl.svd_shrink(a),
    "spectral_norm": lambda a: gl.spectral_norm(Map(a)),
    "spectral_density": lambda a: gl.spectral_density(Map(a + a.mT)).nodes,
    "quadrature": lambda a: gl.spectral_density(Map(a + a.mT), method="lanczos_quadrature", rtol=10.0).nodes,
    "nuclear": lambda a: prox.Nuclear(1.0).prox(a, 1.0),
}


@pytest.mark.parametrize("name", ANYWHERE)
def test_a_default_device_does_not_reach_the_computation(name):
    a = matrices(130, 130)
    torch.set_default_device("meta")
    try:
        value = ANYWHERE[name](a)
    finally:
        torch.set_default_device(None)
    assert torch.equal(value, ANYWHERE[name](a))


SYMBOLS = """
import torch, gramian.linalg as gl

def same(function, *calls, **options):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="eager", **options)
    for given in calls:
        assert torch.equal(compiled(*given), function(*given)), given

draw = lambda n: torch.randn(n, n, generator=torch.Generator().manual_seed(n))
sizes = [(draw(n),) for n in (4, 6, 9)]
for function in (gl.inv, gl.polar, gl.pinv, lambda x: gl.solve(x, x.sum(-1)), lambda x: gl.inv_root(x @ x.mT, 2)):
    same(function, *sizes, dynamic=True)
a = draw(4) @ draw(4).mT
same(lambda x, damping: gl.inv(x, damping=damping), (a, 0.1), (a, 0.2), (a, 0.3))
same(lambda x, k: gl.svd_lowrank(x, k)[1], (a, 1), (a, 2), (a, 3))
"""


def test_a_graph_with_symbols_is_whole():
    """Of dynamic shapes, whose numbers are symbols too, and of numbers that change."""
    # In a process of its own: torch.compile cannot trace the type checks that the tests add.
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SYMBOLS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


DENSE = {
    "inv": gl.inv,
    "svdvals": gl.svdvals,
    "polar": gl.polar,
    "expm": gl.expm,
    "logm": gl.logm,
    "sign": gl.sign,
    "sqrtm": gl.sqrtm,
    "pinv": gl.pinv,
    "syrk": gl.syrk,
    "second_moment": gl.second_moment,
    "inv_root": lambda a: gl.inv_root(a, 2),
    "solve": lambda a: gl.solve(torch.eye(3), a),
    "lstsq": lambda a: gl.lstsq(torch.eye(3), a),
}


@pytest.mark.parametrize("name", DENSE)
def test_sparse_and_nested_tensors_are_refused_with_what_to_do(name):
    for sparse in (torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()):
        with untyped(), pytest.raises(InputError, match=r"dense tensor.*to_dense"):
            DENSE[name](sparse)
    if name not in ("solve", "lstsq"):
        nested = torch.nested.nested_tensor([torch.eye(2), torch.eye(3)])
        with untyped(), pytest.raises(InputError, match="nested"):
            DENSE[name](nested)


def test_eigenvalues_of_a_tiny_singular_matrix_do_not_end_the_process():
    """MKL's geev writes beyond its memory there, which shows sooner or later: so in a process of its own."""
    code = """
import torch
from gramian.linalg.engine import lapack
for n in (7, 9, 13):
    i = torch.arange(1.0, n + 1, dtype=torch.float64)
    m = torch.outer(i, i)[None] * 1e-150
    for _ in range(100):
        w, _, ok = lapack.eig(m)
        assert bool(ok) and abs(float(w.abs().amax() / (1e-150 * i.square().sum())) - 1) < 1e-12
        assert bool(lapack.eigvals(m)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_eigenvalues_come_back_at_any_scale():
    a = matrices(3, 5, 5, dtype=torch.float64)
    scales = torch.tensor([1e-300, 1.0, 1e300], dtype=torch.float64)[:, None]
    plain = torch.linalg.eigvals(a).abs().sort(-1).values
    for values in (lapack.eig(a * scales[:, :, None])[0], lapack.eigvals(a * scales[:, :, None])[0]):
        torch.testing.assert_close(values.abs().sort(-1).values / scales, plain, rtol=1e-12, atol=0)


SUBNORMAL = {
    "spectral_norm": gl.spectral_norm,
    "logm": gl.logm,
    "inv_root": lambda m: gl.inv_root(m, 4, symmetric=False),
}


@pytest.mark.parametrize("name", SUBNORMAL)
def test_subnormal_matrices_have_the_functions_that_their_multiples_have(name):
    m = torch.full((4, 4), 2.0**-1040, dtype=torch.float64).tril() + torch.eye(4, dtype=torch.float64) * 2.0**-1040
    value, near = SUBNORMAL[name](m), SUBNORMAL[name](m * 2.0**520 * 2.0**520)  # raise where nothing is certified
    back = {
        "spectral_norm": lambda: near * 2.0**-520 * 2.0**-520,
        "logm": lambda: near - 1040 * torch.eye(4, dtype=torch.float64) * torch.tensor(2.0).double().log(),
        "inv_root": lambda: near * 2.0**260,
    }
    torch.testing.assert_close(value, back[name](), rtol=1e-10, atol=0)


def test_singular_matrices_have_a_root_at_any_size_and_scale():
    """A correction that the null space's rounding had magnified left bounds up to 4, or infinite."""
    for n in (2, 5, 8, 9, 16, 33):
        for power in (0, 3, -3, -150):
            m = torch.ones(n, n, dtype=torch.float64) * 10.0**power
            exact = m / (n**0.5 * 10.0 ** (power / 2))
            value, proof = gl.sqrtm_ex(m)
            assert proof.converged, (n, power)
            assert (value - exact).norm() / exact.norm() <= proof.error_bound


def test_an_empty_principal_inverse_root_exists():
    assert gl.inv_root(torch.zeros(2, 0, 0), 3, symmetric=False).shape == (2, 0, 0)


def test_a_small_map_gives_all_its_eigenvalues():
    """The quadrature takes more products than it has columns, and cannot reach rtol there."""
    a = matrices(34, 34)
    m = a + a.mT
    for given in (Map(m), m.to_sparse_csr()):
        density, proof = gl.spectral_density_ex(given)
        assert proof.converged
        assert proof.kind_names == ["bound"]
        torch.testing.assert_close(density.nodes, torch.linalg.eigvalsh(m.double()), rtol=1e-5, atol=1e-5)
    assert gl.spectral_density(torch.eye(4).to_sparse_csr()).nodes.tolist() == [1.0] * 4
