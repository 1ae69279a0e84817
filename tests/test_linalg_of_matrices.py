"""expm, logm, sign and the principal root: within their bounds, whatever the matrix, and right where they converge."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

import gramian.linalg as gl
from cases import EVERY, SQUARE, WIDE, hostile, hostile_for, mp, mp_error, seeded, untyped
from gramian import random
from gramian.errors import ConvergenceError, ShapeError
from gramian.linalg.certificate import RTOL
from gramian.linalg.principal_root import PRINCIPAL_ROOT


def root(m, **options):
    return gl.sqrtm_ex(m, symmetric=False, **options)


FUNCTIONS = {
    "expm": (gl.expm_ex, EVERY["expm"][1]),
    "logm": (gl.logm_ex, EVERY["logm"][1]),
    "sign": (gl.sign_ex, EVERY["sign"][1]),
    "root": (root, lambda a: PRINCIPAL_ROOT.exact(mpmath, mp(a))),
}


def turned(seed, count, n, dtype, skew=2.0):
    """Matrices with complex eigenvalues over ten decades, off the negative axis, in a basis of κ to 10^skew."""
    g, out = seeded(seed), []
    for _ in range(count):
        u = random.uniform(3, generator=g, dtype=torch.float64).tolist()
        size = 10 ** (-10 * u[0] * random.uniform(n, generator=g, dtype=torch.float64))
        angle = 3.1 * random.uniform(n, generator=g, dtype=torch.float64)
        b = torch.zeros(n, n, dtype=torch.float64)
        for j in range(0, n - 1, 2):
            c, s = float(size[j] * angle[j].cos()), float(size[j] * angle[j].sin())
            b[j : j + 2, j : j + 2] = torch.tensor([[c, s], [-s, c]])
        if n % 2:
            b[-1, -1] = size[-1]
        spectrum = torch.logspace(0, -skew * u[1], n, dtype=torch.float64)
        v = random.with_spectrum(n, n, spectrum=spectrum, generator=g, dtype=torch.float64)
        a = v @ b @ torch.linalg.inv(v)
        out.append((a * 10 ** (60 * u[2] - 30) if u[2] > 0.6 else a).to(dtype))
    return torch.stack(out)


def jordan(n, value):
    return torch.eye(n, dtype=torch.float64) * value + torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)


def matrices(n, dtype, seed):
    return {
        "turned": turned(seed, 4, n, dtype),
        "any": hostile_for("square", seed + 1, 4, n, n, dtype),
        "definite": hostile(seed + 2, 4, n, n, dtype, psd=True),
        "gallery": torch.stack([make(n).to(dtype) for make in SQUARE.values()]),
        "jordan": torch.stack([jordan(n, x).to(dtype) for x in (0.5, 3.0, -2.0, 1e-3)]),
    }


@pytest.mark.parametrize("dtype", [*WIDE, torch.float16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_error_is_above_its_bound(name, dtype):
    function, exact_of = FUNCTIONS[name]
    flags = []
    for kind, a in matrices(3, dtype, 11).items():
        value, certificate = function(a)
        assert value.dtype == dtype
        for i, x in enumerate(a):
            exact = exact_of(x) if bool(x.isfinite().all()) else None
            error, bound = mp_error(value[i], exact), float(certificate.error_bound[i])
            assert error <= bound * (1 + 1e-12), (kind, i)
            assert certificate.converged[i] == (bound <= RTOL[dtype]), (kind, i)
            if exact is not None and kind in ("turned", "definite") and dtype in WIDE:
                size = max(abs(e) for e in exact)
                flags.append(not certificate.converged[i] and 1e-30 < size < 1e30)
    assert sum(flags) <= 0.1 * len(flags)


FIRST = [("logm", "inverse_scaling"), ("root", "denman_beavers"), ("sign", "newton")]


@pytest.mark.parametrize(("name", "first"), FIRST)
def test_functions_far_from_normal_are_found_in_a_basis_of_eigenvectors(name, first):
    a = turned(31, 6, 4, torch.float64, skew=6.0)
    function, exact_of = FUNCTIONS[name]
    _, direct = function(a, method=first)
    assert not direct.converged.all()
    _, proof = function(a)
    assert set(proof.method_names) == {"eigenvectors"}
    exact = [exact_of(x) for x in a[::2]]
    for method in ("eigenvectors", "diagonalized"):
        value, proof = function(a, method=method)
        assert proof.converged.all()
        for x, y, bound in zip(exact, value[::2], proof.error_bound[::2], strict=True):
            assert mp_error(y, x) <= bound


@pytest.mark.parametrize("name", dict(FIRST))
def test_by_eigenvectors_no_error_is_above_its_bound(name):
    function, exact_of = FUNCTIONS[name]
    every = [a for kind, a in matrices(4, torch.float64, 12).items() if kind != "gallery"]
    near = torch.stack(
        [torch.eye(4, dtype=torch.float64) + random.normal(4, 4, generator=seeded(i)) * 10.0**-i for i in range(9)]
    )
    for a in (*every, near, *(near_the_axis(d) for d in (1e-3, 1e-12))):
        value, proof = function(a, method="eigenvectors")
        for x, y, bound in zip(a, value, proof.error_bound, strict=True):
            if bound < math.inf:
                assert mp_error(y, exact_of(x)) <= bound * (1 + 1e-12)


@pytest.mark.parametrize(("name", "none"), [("logm", -1.0), ("root", -1.0), ("sign", 0.0)])
def test_without_a_basis_of_eigenvectors_they_are_certified_or_refused(name, none):
    a = torch.stack([jordan(3, 0.5), torch.eye(3, dtype=torch.float64), jordan(3, none)])
    function, exact_of = FUNCTIONS[name]
    value, proof = function(a, method="diagonalized")
    assert not proof.converged[2]
    for x, y, bound in zip(a[:2], value, proof.error_bound, strict=False):
        assert mp_error(y, exact_of(x)) <= bound
    _, proof = function(a)
    assert proof.converged.tolist() == [True, True, False]
    assert "axis" in proof.reasons[2]


def near_the_axis(distance, n=4):
    """Eigenvalues ±1 and some at this distance from the axis: a pair right or left of it, one, and one on each side."""
    d = distance
    blocks = [[[d, 1.0], [-1.0, d]], [[-d, 1.0], [-1.0, -d]], [[d, 0.0], [0.0, -1.0]], [[d, 1.0], [0.0, -d]]]
    a = torch.diag(torch.tensor([0.0, 0.0, 1.0, -1.0], dtype=torch.float64)).repeat(len(blocks), 1, 1)
    a[:, :2, :2] = torch.tensor(blocks, dtype=torch.float64)
    return a


@pytest.mark.parametrize("skew", [None, 3.0], ids=["as it is", "far from normal"])
def test_near_the_imaginary_axis_a_sign_is_right_or_refused(skew):
    a = torch.cat([near_the_axis(d) for d in (1e-8, 1e-17, 1e-40)])
    if skew is not None:
        spectrum = torch.logspace(0, -skew, 4, dtype=torch.float64)
        v = random.with_spectrum(len(a), 4, 4, spectrum=spectrum, generator=seeded(9), dtype=torch.float64)
        a = v @ a @ torch.linalg.inv(v)
    exact = [EVERY["sign"][1](x) for x in a]
    for method in ("auto", "eigenvectors", "newton", "diagonalized"):
        value, proof = gl.sign_ex(a, method=method)
        for x, y, bound in zip(exact, value, proof.error_bound, strict=True):
            assert bound == math.inf if x is None else mp_error(y, x) <= bound * (1 + 1e-12)
        # The fourth has a condition number of 1/d².
        assert proof.converged[:3].all() or method == "newton"
        if skew is None and method in ("auto", "diagonalized"):
            assert proof.converged[4:7].all()
            assert not proof.converged[[8, 9, 11]].any()


@pytest.mark.parametrize("n", [5, 24])
def test_a_sign_in_a_basis_of_eigenvectors_is_proven_at_any_side(n):
    m = random.normal(3, n, n, generator=seeded(4), dtype=torch.float64)
    value, proof = gl.sign_ex(m, method="diagonalized")
    iterated, other = gl.sign_ex(m, method="newton")
    assert proof.converged.all()
    assert (proof.kind == 0).all()
    apart = (value - iterated).norm(dim=(1, 2)) / value.norm(dim=(1, 2))
    assert (apart <= (proof.error_bound + other.error_bound) * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_are_torch_s_or_satisfy_their_equations_beyond_the_size_where_operators_are_formed(name):
    g, eye = seeded(2), torch.eye(24, dtype=torch.float64)
    m = random.normal(2, 24, 24, generator=g, dtype=torch.float64) / 24**0.5 / 2 + 2 * eye
    if name == "sign":
        m[:, :12] *= -1
    _, quick = FUNCTIONS[name][0](m)
    assert quick.converged.all()
    assert (quick.kind == 0).all()
    value, certificate = FUNCTIONS[name][0](m, method=dict(FIRST).get(name, "auto"))
    assert certificate.converged.all()
    assert (certificate.error_bound < 1e-9).all()
    assert (certificate.kind == int(name != "expm")).all()
    wanted = torch.linalg.matrix_exp(m) if name == "expm" else m
    back = {
        "expm": lambda x: x,
        "logm": torch.linalg.matrix_exp,
        "root": lambda x: x @ x,
        "sign": lambda x: x @ m @ x,
    }[name](value)
    torch.testing.assert_close(back, wanted, rtol=1e-9, atol=1e-11 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("function", "m", "reason"),
    [
        (gl.logm_ex, torch.diag(torch.tensor([1.0, -1.0])), "negative real axis"),
        (gl.logm_ex, torch.ones(2, 2), "negative real axis"),
        (root, torch.diag(torch.tensor([1.0, -1.0])), "negative real axis"),
        (gl.sign_ex, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), "imaginary axis"),
        (gl.sign_ex, torch.zeros(2, 2), "imaginary axis"),
        (gl.expm_ex, torch.full((2, 2), 1e30), "overflows"),
        (gl.expm_ex, torch.full((2, 2), math.inf), "NaN or inf"),
        (lambda m: gl.pinv_ex(m, tolerance=0.0), torch.ones(3, 2), "rank-deficient"),
        (lambda m: gl.lstsq_ex(m, m, rank=2), torch.ones(3, 2), "rank-deficient"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_reason(function, m, reason):
    _, certificate = function(m)
    assert not certificate.converged
    assert certificate.error_bound == math.inf
    assert reason in certificate.reasons[0]


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_an_exponential_that_underflows_is_not_zero(dtype):
    for exponent in (-120.0, -760.0, -1e5):
        m = torch.diag(torch.tensor([exponent, 2 * exponent], dtype=dtype))
        value, certificate = gl.expm_ex(m)
        error = mp_error(value, EVERY["expm"][1](m))
        assert error <= certificate.error_bound
        assert bool(certificate.converged) == (exponent == -120 and dtype == torch.float64)


def test_a_nilpotent_part_costs_no_squarings_and_no_digits():
    m = torch.tensor([[1.0, 1e6], [0.0, 1.0]], dtype=torch.float64)
    value, certificate = gl.expm_ex(m)
    assert certificate.error_bound < 1e-13
    torch.testing.assert_close(value, math.e * torch.tensor([[1.0, 1e6], [0.0, 1.0]], dtype=torch.float64))


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (4, 4)])
def test_least_squares_are_torch_s_and_their_bounds_hold(shape):
    m, n = shape
    a = hostile(5, 12, m, n, torch.float64, psd=False)
    b = random.normal(12, m, 2, generator=seeded(1), dtype=torch.float64)
    value, certificate = gl.lstsq_ex(a, b, tolerance=0.0)
    assert certificate.converged.sum() >= 6
    for i, x in enumerate(a):
        y = EVERY["pinv"][1](x) if bool(x.isfinite().all()) else None
        exact = None if y is None else y * mp(b[i])
        assert mp_error(value[i], exact) <= certificate.error_bound[i] * (1 + 1e-12)
    fine = random.normal(m, n, generator=seeded(2), dtype=torch.float64)
    torch.testing.assert_close(gl.lstsq(fine, b[0]), torch.linalg.pinv(fine) @ b[0])
    with untyped(), pytest.raises(ShapeError, match="lstsq"):
        gl.lstsq(fine, b[0, :-1])


def test_the_value_form_names_the_function():
    with pytest.raises(ConvergenceError, match="logm"):
        gl.logm(-torch.eye(2))
    with pytest.raises(ConvergenceError, match=r"sqrtm.*negative real axis"):
        gl.sqrtm(-torch.eye(2), symmetric=False)


def test_many_pairs_of_eigenvalues_are_found_by_eigenvectors() -> None:
    """Their imaginary parts add up to zero but for rounding."""
    spectrum = torch.logspace(0, -3, 64, dtype=torch.float64)
    for seed in range(3):
        m = random.with_spectrum(64, 64, spectrum=spectrum, generator=seeded(seed), dtype=torch.float64)
        value, proof = gl.sign_ex(m, method="eigenvectors")
        assert proof.converged.all()
        assert (value @ value - torch.eye(64)).norm() < 1e-6 * value.norm() ** 2


def test_exponentials_far_from_normal_are_proven_where_plain_squaring_proves_nothing():
    """Triangular and companion matrices; a nilpotent block, which has no eigenvectors; and one with both."""
    matrices = [
        [[0.0, 1e6, 0.0], [0.0, 0.0, 1e6], [0.0, 0.0, 0.0]],
        [[0.0, 1e12], [0.0, 0.0]],
        [[1e-8, 1e8], [0.0, 1.0]],
        [[0.0, 1e4], [0.0, 1.0]],
        [[-1.0, 1e7, 3.0], [0.0, -1.0, 1e7], [0.0, 0.0, 2.0]],
        [[-3.0, 1e3, -1e5], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
    ]
    for rows in matrices:
        m = torch.tensor(rows, dtype=torch.float64)
        value, proof = gl.expm_ex(m)
        with mpmath.workdps(120):
            exact = mpmath.expm(mp(m), method="taylor")
            error = mp_error(value, exact)
        assert proof.converged, rows
        assert error <= proof.error_bound.item()
