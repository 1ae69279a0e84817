"""Badly scaled and extremely ill-conditioned systems, and pseudoinverses of any rank."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

import gramian.linalg as gl
from cases import hilbert, moler, mp, mp_error, seeded, untyped
from gramian import random
from gramian.errors import ConvergenceError, InputError, ShapeError, UnsupportedError
from gramian.linalg.engine.double_double import Pair, fine_product, pair, product, rounding
from gramian.linalg.engine.equilibrated import equilibrate, equilibration, restored


def krylov(n, growth):
    a = random.normal(n, n, generator=seeded(1), dtype=torch.float64) * 3
    columns = [random.normal(n, generator=seeded(2), dtype=torch.float64)]
    while len(columns) < n:
        columns.append(a @ columns[-1])
    return torch.stack(columns, 1) * 10 ** torch.linspace(0, growth, n, dtype=torch.float64)


ENOUGH = {
    "moler 26": moler(26),
    "moler 30": moler(30),
    "hilbert 12": hilbert(12),
    "krylov": krylov(10, 0),
    "krylov over 30 decades": krylov(10, 30),
    "its transpose": krylov(10, 30).mT.contiguous(),
    "rows and columns over 60 decades": 10 ** torch.linspace(-30, 30, 6, dtype=torch.float64)[:, None]
    * random.normal(6, 6, generator=seeded(3), dtype=torch.float64)
    * 10 ** torch.linspace(25, -25, 6, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", ENOUGH)
def test_bad_scaling_and_condition_numbers_to_1e20_are_inverted_and_solved(kind):
    m = ENOUGH[kind]
    b = torch.arange(1.0, 1 + len(m), dtype=torch.float64)
    with mpmath.workdps(200):
        exact = mp(m) ** -1
    value, certificate = gl.inv_ex(m)
    assert certificate.converged
    assert mp_error(value, exact) <= float(certificate.error_bound) * (1 + 1e-12)
    value, certificate = gl.solve_ex(m, b)
    assert certificate.converged
    assert mp_error(value[:, None], exact * mp(b[:, None])) <= float(certificate.error_bound) * (1 + 1e-12)


def test_what_is_singular_at_any_scaling_is_refused():
    thirds = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]], dtype=torch.float64)
    for m in (thirds, 1e20 * thirds, thirds * torch.tensor([1.0, 2.0**90, 2.0**-90])):
        for f in (gl.inv_ex, lambda m: gl.solve_ex(m, m[0])):
            value, certificate = f(m)
            assert "singular" in certificate.reasons[0]
            assert value.isnan().all()


def test_one_hopeless_matrix_leaves_the_others_as_they_are():
    batch = torch.stack([moler(8), torch.ones(8, 8, dtype=torch.float64), krylov(8, 20)])
    value, certificate = gl.inv_ex(batch, method="equilibrated")
    assert certificate.converged.tolist() == [True, False, True]
    assert torch.equal(value[0], gl.inv(moler(8), method="equilibrated"))


def test_equilibration_is_exact_and_brings_rows_and_columns_near_one():
    m = ENOUGH["rows and columns over 60 decades"][None]
    s = equilibration(m)
    x = equilibrate(pair(m), s).hi
    for dim in (1, 2):
        assert (x.abs().amax(dim) > 2.0**-4).all()
        assert (x.abs().amax(dim) <= 1).all()
    torch.testing.assert_close(restored(torch.linalg.inv(x), s)[0], gl.inv(m[0]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("times", [product, fine_product])
def test_products_of_pairs_are_within_their_bounds_in_norm_and_entry_by_entry(times):
    def exact(x):
        return mp(x.hi[0]) + mp(x.lo[0])

    for seed, n in enumerate((2, 5, 9)):
        spread = 10 ** (4 * random.normal(n, generator=seeded(seed), dtype=torch.float64))
        x, y, low, lower = random.normal(4, 1, n, n, generator=seeded(seed + 10), dtype=torch.float64)
        x, y = x * spread[:, None], y * spread
        a = Pair(x, 2.0**-54 * x * low, x.new_zeros(1))
        b = Pair(y, 2.0**-54 * y * lower, x.new_zeros(1))
        found = times(a, b)
        with mpmath.workdps(80):
            error = exact(found) - exact(a) * exact(b)
            assert mpmath.norm(error) <= float(found.error)
            bound = sum(row[0, :, None] * column[0] for row, column in rounding(a, b, times))
            assert all(abs(error[i, j]) <= float(bound[i, j]) for i in range(n) for j in range(n))
        assert float(found.error) < (1e-27 if times is fine_product else 1e-20) * float(x.norm() * y.norm())


DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def of_rank(rank, m, n, dtype, seed=0):
    left, right = (
        random.normal(*s, generator=seeded(seed + i), dtype=dtype) for i, s in enumerate(((m, rank), (rank, n)))
    )
    return left @ right


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)], ids=str)
def test_the_rank_is_found_and_told_and_the_answer_is_torch_s(shape, dtype):
    a = of_rank(2, *shape, dtype)
    value, certificate = gl.pinv_ex(a)
    assert certificate.converged
    assert certificate.rank == 2
    torch.testing.assert_close(value, torch.linalg.pinv(a, rtol=1e-5), rtol=1e-4, atol=1e-6)
    b = random.normal(shape[0], 3, generator=seeded(9), dtype=dtype)
    value, certificate = gl.lstsq_ex(a, b)
    assert certificate.rank == 2
    torch.testing.assert_close(value, torch.linalg.pinv(a, rtol=1e-5) @ b, rtol=1e-4, atol=1e-5)
    told, certificate = gl.pinv_ex(a, rank=1)
    u, s, v = torch.linalg.svd(a, full_matrices=False)
    torch.testing.assert_close(told, v[:1].mH @ u[:, :1].mH / s[0], rtol=1e-4, atol=1e-6)
    assert certificate.rank == 1
    zero, certificate = gl.pinv_ex(torch.zeros_like(a))
    assert (certificate.rank, certificate.error_bound) == (0, 0)
    assert not zero.any()


def test_bounds_of_lower_ranks_hold():
    for seed in range(6):
        a = of_rank(3, 7, 5, torch.float64, seed) + 10.0 ** -(seed + 4) * of_rank(5, 7, 5, torch.float64, seed + 20)
        value, certificate = gl.pinv_ex(a, rank=3)
        u, s, v = mpmath.svd_r(mp(a))
        exact = v[:3, :].T * mpmath.diag([1 / x for x in s[:3]]) * u[:, :3].T
        assert certificate.converged
        assert mp_error(value, exact) <= float(certificate.error_bound)


def test_a_rank_that_rounding_decides_and_a_missing_gap_are_refused():
    diagonal = torch.diag(torch.tensor([1.0, 1e-6], dtype=torch.float64))
    turn = random.orthogonal(2, 2, generator=seeded(0), dtype=torch.float64)
    a = turn @ diagonal @ turn.mT
    assert not gl.pinv_ex(a, tolerance=1e-6)[1].converged
    assert gl.pinv_ex(a, tolerance=1e-7)[1].rank == 2
    with pytest.raises(ConvergenceError, match="pinv: 1 of 1"):
        gl.pinv(torch.eye(3), rank=2)
    for wrong in (torch.ones(3, 2), torch.eye(3, 2) @ torch.diag(torch.tensor([1.0, 0.0])), torch.zeros(3, 2)):
        for options in ({"rank": 2}, {"tolerance": 0.0}):
            with pytest.raises(ConvergenceError, match="rank-deficient"):
                gl.pinv(wrong, **options)
    for options in ({"rank": 3}, {"rank": -1}, {"tolerance": 1.0}, {"tolerance": -1e-3}):
        with pytest.raises(InputError, match="pinv: expected a"):
            gl.pinv(torch.ones(3, 2), **options)


def test_least_squares_take_vectors_broadcast_batches_and_damping():
    a = random.normal(2, 1, 6, 4, generator=seeded(0), dtype=torch.float64)
    b = random.normal(3, 6, 2, generator=seeded(1), dtype=torch.float64)
    value, certificate = gl.lstsq_ex(a, b)
    assert value.shape == (2, 3, 4, 2)
    assert certificate.converged.shape == certificate.rank.shape == (2, 3)
    torch.testing.assert_close(value, torch.linalg.lstsq(a.expand(2, 3, 6, 4), b.expand(2, 3, 6, 2)).solution)
    torch.testing.assert_close(gl.lstsq(a[0, 0], b[0, :, 0]), value[0, 0, :, 0])
    torch.testing.assert_close(gl.lstsq(a[:, 0], b[:2, :, 1]), torch.stack([value[i, i, :, 1] for i in range(2)]))
    damping = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)
    wanted = torch.linalg.solve(a.mT @ a + damping[..., None, None] * eye, a.mT @ b)
    torch.testing.assert_close(gl.lstsq(a, b, damping), wanted)
    torch.testing.assert_close(gl.lstsq(of_rank(2, 6, 4, torch.float64), b[0], 1e-3).isnan().any(), torch.tensor(False))
    with untyped(), pytest.raises(ShapeError, match="lstsq: expected"):
        gl.lstsq(a, b[:, :-1])


def along(function, a, e, h=1e-6):
    """The derivative along E by the graph, and by a central difference."""
    _, tangent = torch.func.jvp(function, (a,), (e,))
    return tangent, (function(a + h * e) - function(a - h * e)) / (2 * h)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (3, 3)], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_derivatives_at_any_rank(shape, rank):
    a, e = (random.normal(*shape, generator=seeded(i), dtype=torch.float64) for i in (1, 2))

    def function(x):
        return gl.pinv(x, rank=rank, rtol=1e-9)

    found, wanted = along(function, a, e)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    w = random.normal(*found.shape, generator=seeded(3), dtype=torch.float64)
    (grad,) = torch.autograd.grad((function(a.requires_grad_()) * w).sum(), a)
    torch.testing.assert_close((grad * e).sum(), (found * w).sum())


def test_a_pseudoinverse_at_ties_has_its_first_derivative_at_any_rank_and_all_at_full_rank():
    a = torch.eye(4, 3, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(gl.pinv(a).sum(), a, create_graph=True)
    assert torch.autograd.grad(grad.sum(), a)[0].isfinite().all()
    lower = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)).requires_grad_()
    (grad,) = torch.autograd.grad(gl.pinv(lower).sum(), lower, create_graph=True)
    assert grad.isfinite().all()
    with pytest.raises(UnsupportedError, match="second derivative"):
        torch.autograd.grad(grad.sum(), lower)


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
def test_principal_inverse_roots_satisfy_their_equation(p, dtype):
    eye = torch.eye(4, dtype=dtype)
    m = random.normal(2, 4, 4, generator=seeded(0), dtype=dtype) / 3 + 2 * eye
    x, certificate = gl.inv_root_ex(m, p, symmetric=False)
    assert certificate.converged.all()
    torch.testing.assert_close(torch.linalg.matrix_power(x, p) @ m, eye.expand(2, 4, 4), rtol=1e-5, atol=1e-6)
    w, v = torch.linalg.eig(m.to(torch.complex128))
    exact = (v * w[:, None, :] ** (-1 / p)) @ torch.linalg.inv(v)
    error = torch.linalg.norm(x - exact, dim=(1, 2)) / torch.linalg.norm(exact, dim=(1, 2))
    assert (error <= certificate.error_bound + 1e-13).all()


def test_principal_inverse_roots_take_what_they_can_and_refuse_the_rest():
    m = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    damped = m + 0.5 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(gl.inv_root(m, 2, 0.5, symmetric=False), gl.inv_root(damped, 2, symmetric=False))
    found, wanted = along(lambda x: gl.inv_root(x, 3, symmetric=False, rtol=1e-9), m, m.mT)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    with pytest.raises(ConvergenceError, match="negative real axis"):
        gl.inv_root(-m, 3, symmetric=False)
    with pytest.raises(InputError, match="damping is for p ≤ 2"):
        gl.inv_root(m, 3, 0.1, symmetric=False)
    with pytest.raises(InputError, match="unknown method"):
        gl.inv_root(m, 3, symmetric=False, method="eigh64")


@pytest.mark.parametrize("dim", [(-2, -1), (0, 2), (2, 0), (1, -1)], ids=str)
def test_the_spectral_norm_takes_the_dimensions_that_torch_s_takes(dim):
    x = random.normal(3, 4, 5, generator=seeded(0))
    for keepdim in (False, True):
        torch.testing.assert_close(
            gl.spectral_norm(x, dim=dim, keepdim=keepdim), torch.linalg.matrix_norm(x, 2, dim=dim, keepdim=keepdim)
        )
    for wrong in ((0, 0), (0, 3), (1, -2)):
        with pytest.raises(InputError, match="two dimensions"):
            gl.spectral_norm(x, dim=wrong)
    with pytest.raises(InputError, match="dense"):
        gl.spectral_norm(torch.eye(3).to_sparse(), keepdim=True)
    assert math.isclose(float(gl.spectral_norm(x[0])), float(torch.linalg.matrix_norm(x[0], 2)), rel_tol=1e-6)


@pytest.mark.parametrize("p", [None, -2, "fro"])
def test_the_condition_takes_dimensions_too(p):
    x = random.normal(3, 4, 3, generator=seeded(1), dtype=torch.float64)
    peer = torch.linalg.cond(x.movedim(1, 0), p)
    torch.testing.assert_close(gl.cond(x, p, dim=(0, 2)), peer)
    torch.testing.assert_close(
        gl.cond(x, p, dim=(2, 0), keepdim=True), torch.linalg.cond(x.permute(1, 2, 0), p)[None, :, None]
    )
    with pytest.raises(InputError, match="dense"):
        gl.cond(torch.eye(3).to_sparse(), p, keepdim=True)
