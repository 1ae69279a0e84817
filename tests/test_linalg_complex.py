"""Complex matrices: right against complex arithmetic, certified, differentiable, composable, or refused by name."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gramian.linalg as gl
from cases import seeded, untyped
from complex_cases import COMPLEX, complex_error, hostile_complex, score_complex
from gramian.errors import ConvergenceError, DtypeError, ShapeError
from gramian.linalg.certificate import RTOL
from gramian.linalg.engine.real_form import less_certain, nearest_complex, real_form

DTYPES = (torch.complex64, torch.complex128)
FINE = 1e-12


def general(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.complex128)


def definite(n, seed=0):
    a = general(n, n, seed=seed)
    return a @ a.mH + torch.eye(n)


def values(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", COMPLEX)
def test_no_error_is_above_its_bound(name, dtype):
    silent, _, flagged, met = score_complex(name, 40, 6, dtype, RTOL[dtype])
    assert silent == []
    assert flagged <= 0.1 * met


JORDAN = torch.tensor([[1j, 1.0, 0.0], [0.0, 1j, 1.0], [0.0, 0.0, 1j]], dtype=torch.complex128)
GALLERY = {
    "nan": torch.full((3, 3), complex(0, math.nan), dtype=torch.complex128),
    "inf": torch.tensor([[complex(1, math.inf), 0], [0, 1]], dtype=torch.complex128),
    "zero": torch.zeros(3, 3, dtype=torch.complex128),
    "rank one": torch.tensor([[1, 2j, 0], [1j, -2, 0], [2, 4j, 0]], dtype=torch.complex128),
    "huge": 1e30 * definite(3),
    "tiny": 1e-30 * definite(3),
    "nearly singular": definite(3) @ torch.diag(torch.tensor([1, 1e-8, 1e-16], dtype=torch.complex128)),
    "defective": JORDAN,
    "nearly Hermitian": definite(3) * (1 + 1e-16j),
    "not Hermitian": definite(3) + 1e-3 * JORDAN,
    "unit": torch.eye(3, dtype=torch.complex128) * 1j,
    "one number": torch.tensor([[3 - 4j]], dtype=torch.complex128),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", GALLERY)
def test_the_gallery_gives_no_silent_failure(kind, dtype):
    a = GALLERY[kind].to(dtype)
    for name, (function, oracle, _, needs) in COMPLEX.items():
        value, certificate = function(a)
        finite = bool(a.isfinite().all())
        hermitian = float((a - a.mH).abs().amax()) <= 1e-6 * float(a.abs().amax()) if finite else False
        if needs == "psd" and not hermitian:
            assert not certificate.converged, name
            continue
        exact = oracle(a) if finite else None
        assert complex_error(value, exact) <= float(certificate.error_bound) * (1 + 1e-12), name
    assert certificate.converged.shape == ()


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_what_is_not_hermitian_or_does_not_exist_says_so():
    with pytest.raises(ConvergenceError, match="not Hermitian"):
        gl.sqrtm(GALLERY["not Hermitian"])
    with pytest.raises(ConvergenceError, match="singular"):
        gl.inv(GALLERY["rank one"])
    with pytest.raises(ConvergenceError, match="negative eigenvalues"):
        gl.inv_root(-definite(3), 2)
    with untyped(), pytest.raises(ShapeError, match=r"got \(2, 3\)"):
        gl.inv(general(2, 3))
    with untyped(), pytest.raises(DtypeError, match=r"complex64\)"):
        gl.inv(torch.empty(2, 2, dtype=torch.complex32, device="meta"))


REAL = {
    "svd_lowrank": lambda a: gl.svd_lowrank(a, 1), "svd_shrink": gl.svd_shrink, "pca": lambda a: gl.pca(a, 1),
    "eigvalsh_top": lambda a: gl.eigvalsh_top(a, 1), "spectral_radius": gl.spectral_radius,
    "spectral_density": gl.spectral_density, "syrk": gl.syrk, "second_moment": gl.second_moment,
    "matmul": lambda a: gl.matmul(a, a),
}  # fmt: skip


@untyped()
def test_functions_that_stay_real_refuse_by_name_and_do_not_advise_to_drop_the_imaginary_part():
    public = {name.removesuffix("_ex") for name in gl.__all__ if name[0].islower()}
    assert set(TAKING) | set(REAL) == public
    a = definite(3)
    for name, function in REAL.items():
        with pytest.raises(DtypeError, match=rf"{name}: .*imaginary part") as caught:
            function(a)
        assert ".to(torch.float" not in str(caught.value)
        form = torch.cat([torch.cat([a.real, -a.imag], -1), torch.cat([a.imag, a.real], -1)], -2)
        assert torch.equal(form, real_form(a))
    with pytest.raises(DtypeError, match="imaginary part"):
        gl.spectral_norm(a.to_sparse())


TAKING = {
    "inv": lambda m: gl.inv(m, rtol=FINE),
    "solve": lambda m: gl.solve(m, m[..., 0] + 1, rtol=FINE),
    "lstsq": lambda m: gl.lstsq(m, m[..., 0] + 1, 0.1, rtol=1e-9),
    "polar": lambda m: gl.polar(m, method="svd_refined", rtol=FINE),
    "svdvals": lambda m: gl.svdvals(m, rtol=FINE),
    "spectral_norm": lambda m: gl.spectral_norm(m, rtol=FINE),
    "cond": lambda m: gl.cond(m, rtol=FINE),
    "pinv": lambda m: gl.pinv(m, rtol=FINE),
    "expm": lambda m: gl.expm(m / 4, rtol=FINE),
    "logm": lambda m: gl.logm(m, rtol=1e-9),
    "sign": lambda m: gl.sign(m, rtol=1e-9),
    "inv_root": lambda m: gl.inv_root((m + m.mH) / 2, 4, rtol=FINE),
    "sqrtm": lambda m: gl.sqrtm((m + m.mH) / 2, rtol=FINE),
    "matrix_power_scaled": lambda m: gl.matrix_power_scaled(m, 3),
    "product_scaled": lambda m: gl.product_scaled([m, m.mH]),
}
"""Every function that takes complex matrices, as a function of one definite matrix."""

MORE = {
    "sqrtm, principal": lambda m: gl.sqrtm(m, symmetric=False, rtol=1e-9),
    "inv_root, principal": lambda m: gl.inv_root(m, 2, symmetric=False, rtol=1e-9),
    "cond in another norm": lambda m: gl.cond(m, "fro", rtol=1e-9),
    "solve, real to complex": lambda m: gl.solve(m.real + torch.eye(2), m, rtol=FINE),
    "solve from the right": lambda m: gl.solve(m, m[:1] + 1, left=False, rtol=FINE),
    "pinv of rank one": lambda m: gl.pinv(m, rank=1, rtol=1e-8),
}


@pytest.mark.parametrize("name", [*TAKING, *MORE])
def test_derivatives_agree_with_finite_differences_in_torch_s_convention(name):
    function = (TAKING | MORE)[name]
    m, e, h = definite(2) + 0.1 * general(2, 2, seed=5), general(2, 2, seed=6), 1e-5
    first = values(function(m))
    weights = [torch.randn(x.shape, generator=seeded(7), dtype=x.dtype) for x in first]

    def loss(x):
        return sum((w.conj() * y).real.sum() for w, y in zip(weights, values(function(x)), strict=True))

    def gradient(x, create_graph=False):
        x = x.requires_grad_()
        return torch.autograd.grad(loss(x), x, create_graph=create_graph)[0], x

    def along(grad):
        return (grad.conj() * e).real.sum()

    grad, x = gradient(m.clone(), create_graph=True)
    close = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(along(grad), (loss(m + h * e) - loss(m - h * e)) / (2 * h), **close)
    torch.testing.assert_close(torch.func.jvp(loss, (m,), (e,))[1], along(grad), rtol=1e-9, atol=1e-10)
    if name != "pinv of rank one":  # singular values occur twice in the real form, and their vectors turn
        (second,) = torch.autograd.grad(along(grad), x)
        moved = [along(gradient(m + s * h * e)[0]) for s in (1, -1)]
        torch.testing.assert_close(along(second), (moved[0] - moved[1]) / (2 * h), **close)


def test_repeated_eigenvalues_have_the_derivative_that_torch_s_do_not():
    m = torch.eye(3, dtype=torch.complex128).mul(4).requires_grad_()
    (grad,) = torch.autograd.grad(gl.sqrtm(m).real.sum(), m)
    torch.testing.assert_close(grad, torch.full_like(grad, 0.25))  # d√M = dM / 2√M at a multiple of I


def test_vmap_meta_and_fake_tensors_give_what_a_batch_gives():
    m = torch.stack([definite(3), definite(3, seed=1)])
    for name, function in TAKING.items():
        whole = values(function(m))
        mapped = values(torch.func.vmap(lambda x, f=function: tuple(values(f(x))))(m))
        for x, y in zip(whole, mapped, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10, msg=name)
        shapes = [(x.shape, x.dtype) for x in whole]
        assert [(x.shape, x.dtype) for x in values(function(m.to("meta")))] == shapes, name
        with (mode := FakeTensorMode()):
            assert [(x.shape, x.dtype) for x in values(function(mode.from_tensor(m)))] == shapes, name


COMPILED = """
import torch, gramian.linalg as gl

def loss(m):
    h = (m + m.mH) / 2
    total = gl.inv(m).abs().sum() + gl.solve(m, m[0]).abs().sum() + gl.inv_root(h, 4).real.sum() + gl.svdvals(m)[0]
    total = total + gl.spectral_norm(m) + gl.cond(m) + gl.cond(m, 1) + gl.pinv(m).imag.sum()
    power, size = gl.matrix_power_scaled(m, 3)
    return total + gl.lstsq(m, m[0]).real.sum() + gl.expm(m / 9).real.sum() + power.real.sum() + size

a = torch.arange(9.0, dtype=torch.float64).reshape(3, 3).sin() + 1j * torch.arange(9.0).reshape(3, 3).cos()
ours, compiled = ((a @ a.mH + torch.eye(3)).requires_grad_() for _ in range(2))
loss(ours).backward()
torch.compile(loss, backend="aot_eager", fullgraph=True)(compiled).backward()
assert torch.allclose(ours.grad, compiled.grad, rtol=1e-13, atol=0)
"""


@pytest.mark.slow
def test_a_compiled_graph_has_no_break():
    subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], check=True)


def test_powers_and_products_are_torch_s():
    a = general(2, 3, 3)
    for k in (0, 1, 3, -2):
        mantissa, size = gl.matrix_power_scaled(a, k)
        torch.testing.assert_close(mantissa * size.exp()[:, None, None], torch.linalg.matrix_power(a, k))
    mantissa, size = gl.product_scaled([a, a.mH, a.real])
    torch.testing.assert_close(mantissa * size.exp()[:, None, None], a @ a.mH @ a.real.to(a.dtype))
    zero = gl.product_scaled([torch.zeros(2, 2, dtype=torch.complex64)])
    assert not zero[0].any()
    assert zero[1] == -math.inf


def test_a_wide_norm_takes_its_gradient_from_lanczos():
    a = torch.randn(520, 530, generator=seeded(0), dtype=torch.complex64).requires_grad_()
    (grad,) = torch.autograd.grad(gl.spectral_norm(a, rtol=1e-2), a)
    u, _, v = torch.linalg.svd(a.detach(), full_matrices=False)
    cosine = (u[:, 0].conj() @ grad @ v[0].conj()).abs()
    assert cosine > 0.99
    torch.testing.assert_close(torch.linalg.matrix_norm(grad), torch.tensor(1.0), rtol=1e-4, atol=0)


def test_the_nearest_complex_matrix_is_no_farther_and_its_rounding_is_counted():
    x = torch.randn(50, 4, 4, generator=seeded(0), dtype=torch.float64).float()
    value, rounding = nearest_complex(x)
    (p, s), (r, q) = (half.double().chunk(2, -1) for half in x.chunk(2, -2))
    exact = torch.complex((p + q) / 2, (r - s) / 2)
    assert (
        torch.linalg.norm(value - exact, dim=(1, 2)) <= rounding * torch.linalg.norm(exact, dim=(1, 2)) * 1.001
    ).all()
    assert torch.equal(nearest_complex(real_form(exact))[0], exact)
    assert not nearest_complex(real_form(exact))[1].any()
    _, proof = gl.inv_ex(torch.eye(2))
    assert not less_certain(proof, torch.tensor(1e-3), 1e-4).converged


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halves_of_subnormal_numbers_are_counted(dtype):
    info = torch.finfo(dtype)
    for exponent in range(4, 40, 7):
        a = (general(3, 3, seed=exponent) * info.tiny * 2.0 ** (exponent - 30)).to(dtype)
        for name in ("svdvals", "polar", "spectral_norm"):
            function, oracle, *_ = COMPLEX[name]
            value, certificate = function(a)
            assert complex_error(value, oracle(a)) <= float(certificate.error_bound) * (1 + 1e-12), (name, exponent)


def test_hostile_complex_matrices_have_the_spectrum_of_the_real_ones():
    a = hostile_complex("psd", 3, 16, 4, 4, torch.complex128)
    finite = a.isfinite().flatten(1).all(1)
    assert ((a - a.mH)[finite].abs() <= 1e-14 * a[finite].abs().amax((1, 2), keepdim=True)).all()
    assert (a[finite].imag.abs().amax((1, 2)) > 0).float().mean() > 0.8
