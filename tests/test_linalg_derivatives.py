"""Derivatives of the matrix functions: right in every mode, at repeated and zero eigenvalues too, or refused."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

import gramian.linalg as gl
from cases import seeded
from gramian import random
from gramian.errors import InputError, ShapeError, UnsupportedError

FINE = 1e-12  # finite differences need values far better than the default rtol


def general(*shape, seed=0, shift=0.0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64) + shift


def definite(*shape, seed=0):
    a = general(*shape, shape[-1], seed=seed)
    return a @ a.mT + 0.5 * torch.eye(shape[-1], dtype=torch.float64)


def symmetric(function):
    """The function of the symmetric part: a finite difference in one entry is not symmetric."""
    return lambda m, *rest: function((m + m.mT) / 2, *rest)


def product_of(u, s, v):
    return (u * s[..., None, :]) @ v.mT


def low_rank(a):
    return product_of(*gl.svd_lowrank(a, 2, rtol=FINE))


def refined(a):
    return gl.polar(a, method="svd_refined", rtol=FINE)


def shrunk(loss):
    return lambda a, *noise: gl.svd_shrink(a, *noise, loss=loss, rtol=1e-6)


TWICE = {
    "inv": (lambda m: gl.inv(m, rtol=FINE), general(2, 4, 4, shift=0.1)),
    "inv damping": (
        lambda m, d: gl.inv(m, d, rtol=FINE), definite(2, 4), torch.tensor([0.5, 0.1], dtype=torch.float64)
    ),
    "solve": (lambda m, b: gl.solve(m, b, rtol=FINE), general(2, 4, 4, seed=1), general(2, 4, 3)),
    "solve damping": (
        lambda m, b, d: gl.solve(m, b, d, rtol=FINE), definite(4), general(4, 1), torch.tensor(0.3, dtype=torch.float64)
    ),
    "sqrtm": (symmetric(lambda m: gl.sqrtm(m, rtol=FINE)), definite(2, 4)),
    "sqrtm at ties": (symmetric(lambda m: gl.sqrtm(m, rtol=FINE)), 2 * torch.eye(4, dtype=torch.float64)),
    "inv_root 1": (symmetric(lambda m: gl.inv_root(m, 1, rtol=FINE)), definite(3)),
    "inv_root 2": (symmetric(lambda m: gl.inv_root(m, 2, rtol=FINE)), definite(2, 4)),
    "inv_root 5": (symmetric(lambda m: gl.inv_root(m, 5, rtol=FINE)), definite(3)),
    "inv_root, zero and repeated, damped": (
        symmetric(lambda m, d: gl.inv_root(m, 4, d, rtol=FINE)),
        torch.diag(torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)),
        torch.tensor(0.5, dtype=torch.float64),
    ),
    "expm": (lambda m: gl.expm(m, rtol=FINE), general(2, 4, 4)),
    "logm": (lambda m: gl.logm(m, rtol=FINE), general(3, 3) / 2 + 2 * torch.eye(3, dtype=torch.float64)),
    "sign": (lambda m: gl.sign(m, rtol=FINE), general(2, 4, 4)),
    "sqrtm, not symmetric": (
        lambda m, d: gl.sqrtm(m, d, symmetric=False, rtol=FINE),
        general(2, 4, 4) / 2 + 3 * torch.eye(4, dtype=torch.float64),
        torch.tensor(0.3, dtype=torch.float64),
    ),
    "pinv tall": (lambda a: gl.pinv(a, rtol=FINE), general(2, 5, 3)),
    "pinv wide": (lambda a: gl.pinv(a, rtol=FINE), general(3, 5)),
    "pinv square": (lambda a: gl.pinv(a, rtol=FINE), general(3, 3)),
    "lstsq": (lambda a, b: gl.lstsq(a, b, rtol=FINE), general(5, 3), general(5, 2)),
    "polar tall": (refined, general(2, 5, 3)),
    "polar wide": (refined, general(3, 5)),
    "polar at ties": (refined, torch.eye(4, 3, dtype=torch.float64)),
    "svdvals": (lambda a: gl.svdvals(a, rtol=FINE), general(2, 5, 3)),
    "spectral_norm": (lambda a: gl.spectral_norm(a, rtol=FINE), general(2, 3, 5)),
    "cond": (lambda a: gl.cond(a, rtol=FINE), general(2, 4, 4)),
    "svd_lowrank": (low_rank, general(2, 6, 4)),
    "svd_lowrank, its factors": (lambda a: gl.svd_lowrank(a, 2, rtol=FINE), general(4, 6)),
    "pca": (lambda x: gl.pca(x, 2, rtol=FINE), general(7, 4)),
    "svd_shrink": (shrunk("frobenius"), general(6, 4, shift=4.0)),
    "svd_shrink, noise given": (shrunk("nuclear"), general(4, 6, shift=4.0), torch.tensor(0.3, dtype=torch.float64)),
    "svd_shrink, operator": (shrunk("operator"), general(4, 4, shift=4.0), torch.tensor(0.3, dtype=torch.float64)),
    "matrix_power_scaled": (lambda a: gl.matrix_power_scaled(a, 5, rtol=FINE), general(2, 3, 3)),
    "matrix_power_scaled, inverse": (lambda a: gl.matrix_power_scaled(a, -3, rtol=FINE), definite(3)),
    "product_scaled": (
        lambda a, b: gl.product_scaled([a, b, a], rtol=FINE), general(2, 3, 3), general(2, 3, 3, seed=1)
    ),
}  # fmt: skip
"""Functions that have two derivatives where they are tested, and their arguments."""


def leaves(case):
    function, *arguments = case
    return function, [x.clone().requires_grad_() for x in arguments]


@pytest.mark.parametrize("case", TWICE.values(), ids=TWICE)
def test_first_and_second_derivatives_agree_with_finite_differences_in_both_modes(case):
    function, arguments = leaves(case)
    assert gradcheck(function, arguments, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, arguments, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("case", TWICE.values(), ids=TWICE)
def test_vmap_equals_the_loop_also_of_derivatives(case):
    function, *arguments = case
    stacked = [torch.stack([x, x.flip(-1).flip(-2) if x.ndim > 1 else x]) for x in arguments]

    def weighted(*x):
        out = function(*x)
        flat = torch.cat([y.flatten() for y in ([out] if isinstance(out, torch.Tensor) else out)])
        return (flat * torch.linspace(1.0, 2.0, flat.numel(), dtype=flat.dtype)).sum()

    def along(*x):
        return torch.func.jvp(weighted, x, tuple(torch.ones_like(y) for y in x))[1]

    for call in (weighted, torch.func.grad(weighted), along):
        mapped = torch.func.vmap(call)(*stacked)
        for i in range(2):
            torch.testing.assert_close(mapped[i], call(*(x[i] for x in stacked)), rtol=1e-9, atol=1e-9)


def test_vmap_over_one_argument_of_several():
    m, b = definite(4), general(3, 4, 2)
    torch.testing.assert_close(torch.func.vmap(gl.solve, (None, 0))(m, b), gl.solve(m.expand(3, 4, 4), b))
    shifts = torch.tensor([0.1, 1.0], dtype=torch.float64)
    mapped = torch.func.vmap(gl.inv, (None, 0))(definite(5, 4), shifts)
    torch.testing.assert_close(mapped[1], gl.inv(definite(5, 4), 1.0))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_derivatives_follow_the_scale(scale):
    m = (scale * definite(4)).requires_grad_()
    with torch.no_grad():
        unit = m / scale
    unit.requires_grad_()
    for function, degree in ((gl.inv, -1.0), (gl.sqrtm, 0.5), (lambda x: gl.inv_root(x, 4), -0.25), (gl.polar, 0.0)):
        (ours,) = torch.autograd.grad(function(m).sum(), m)
        (expected,) = torch.autograd.grad(function(unit).sum(), unit)
        torch.testing.assert_close(ours * scale ** (1 - degree), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_have_gradients_of_their_own_type(dtype):
    m = definite(8).to(dtype).requires_grad_()
    exact = definite(8).to(dtype).double().requires_grad_()
    for function in (lambda x: gl.inv_root(x, 2, damping=0.1, rtol=0.1), lambda x: gl.svdvals(x, rtol=0.1)):
        (ours,) = torch.autograd.grad(function(m).sum(), m)
        (expected,) = torch.autograd.grad(function(exact).sum(), exact)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def test_ties_of_singular_values_have_a_subgradient():
    a = torch.eye(3, dtype=torch.float64, requires_grad=True)
    (largest,) = torch.autograd.grad(gl.spectral_norm(a), a)
    assert float(torch.linalg.matrix_norm(largest, "nuc")) == pytest.approx(1.0)  # the dual norm's unit ball
    assert float((largest * a).sum()) == pytest.approx(1.0)
    (total,) = torch.autograd.grad(gl.svdvals(a).sum(), a)
    torch.testing.assert_close(total, torch.eye(3, dtype=torch.float64))


def test_a_penalty_on_the_spectral_norm_trains_a_wide_matrix_too():
    w = general(600, 700, seed=3).float().requires_grad_()
    norms = []
    for _ in range(4):
        norm = gl.spectral_norm(w)
        (grad,) = torch.autograd.grad(norm, w)
        with torch.no_grad():
            w -= grad
        norms.append(float(norm))
    assert norms == sorted(norms, reverse=True)
    assert norms[0] - norms[-1] > 0.1


REFUSED = {
    "sqrtm at a singular matrix": (gl.sqrtm, torch.diag(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)), "damping"),
    "svd_lowrank at a tie": (lambda a: gl.svd_lowrank(a, 2)[0], torch.eye(4, dtype=torch.float64), "equal"),
    "pca at a tie": (
        lambda x: gl.pca(x, 1)[0], torch.cat([torch.eye(3), -torch.eye(3)]).double(), "equal"
    ),
    "spectral_radius": (gl.spectral_radius, definite(3), "spectral_norm"),
    "spectral_density": (lambda a: gl.spectral_density(a).nodes, definite(3), "svdvals"),
}  # fmt: skip


@pytest.mark.parametrize(("function", "a", "advice"), REFUSED.values(), ids=REFUSED)
def test_where_there_is_no_derivative_asking_for_one_says_so(function, a, advice):
    a = a.clone().requires_grad_()
    out = function(a)  # the value alone is fine
    with pytest.raises(UnsupportedError, match=advice):
        out.sum().backward()


def test_no_second_derivative_is_made_up_where_singular_values_are_equal():
    a = torch.eye(3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(gl.svdvals(a).square().sum(), a, create_graph=True)
    with pytest.raises(UnsupportedError, match="equal"):
        grad.sum().backward()


def test_a_gradient_that_avoids_the_null_space_of_a_root_exists():
    m = torch.diag(torch.tensor([0.0, 0.0, 4.0], dtype=torch.float64)).requires_grad_()
    (grad,) = torch.autograd.grad(gl.sqrtm(m)[2, 2], m)
    assert float(grad[2, 2]) == pytest.approx(0.25)


def test_one_bad_matrix_spoils_only_its_own_gradient():
    m = definite(3, 4)
    m[1, 0, 0] = math.nan
    m.requires_grad_()
    for function in (gl.inv_ex, gl.sqrtm_ex, lambda x: gl.inv_root_ex(x, 4), gl.polar_ex, gl.svdvals_ex):
        value, certificate = function(m)
        (grad,) = torch.autograd.grad(value.sum(), m)
        assert certificate.converged.tolist() == [True, False, True]
        assert grad[[0, 2]].isfinite().all()
        assert grad[1].isnan().any()


def test_certificates_are_no_part_of_the_graph_and_no_grad_makes_none():
    m = definite(4).requires_grad_()
    value, certificate = gl.inv_ex(m)
    assert value.requires_grad
    assert not any(x.requires_grad for x in certificate.tensors())
    with torch.no_grad():
        assert not gl.inv(m).requires_grad
    assert not gl.inv(m.detach()).requires_grad


def test_the_value_under_a_graph_is_the_value_without():
    a = general(3, 40, 30).float()
    for function in (gl.polar, gl.svdvals, gl.spectral_norm, gl.cond, lambda x: gl.svd_lowrank(x, 3)[1]):
        assert torch.equal(function(a), function(a.clone().requires_grad_()).detach())


@pytest.mark.parametrize("exponent", [-155, 155, 200])
def test_derivatives_of_very_large_and_small_matrices(exponent):
    scale = 10.0**exponent
    m = (scale * torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)).requires_grad_()
    unit = (m.detach() / scale).requires_grad_()
    for p in (2, 4, 8):
        (ours,) = torch.autograd.grad(gl.inv_root(m, p)[0, 0], m)
        (expected,) = torch.autograd.grad(gl.inv_root(unit, p)[0, 0], unit)
        wanted = expected * scale ** (-1 / p) / scale
        keep = wanted.abs() > 1e-300
        torch.testing.assert_close(ours[keep], wanted[keep], rtol=1e-6, atol=0)
    (ours,) = torch.autograd.grad(gl.cond(m), m)
    (expected,) = torch.autograd.grad(gl.cond(unit), unit)
    torch.testing.assert_close(ours * scale, expected, rtol=1e-8, atol=1e-8)


def test_forward_mode_over_forward_mode_is_refused():
    m = definite(3)
    for function in (gl.inv, gl.sqrtm, gl.svdvals, lambda a: gl.inv_root(a, 4), gl.polar):
        with pytest.raises(UnsupportedError, match="forward mode over forward mode"):
            torch.func.jacfwd(torch.func.jacfwd(lambda a, f=function: f(a).sum()))(m)


def test_a_batch_in_forward_mode_is_refused_by_pca_of_batches():
    x = general(6, 3)
    with pytest.raises(UnsupportedError, match="one tensor"):
        torch.func.jvp(lambda rows: gl.pca([rows], 1)[1], (x,), (x,))


def test_the_polar_factor_of_a_nearly_singular_matrix_has_the_same_derivative_in_both_modes():
    u, _, vt = torch.linalg.svd(general(4, 4))
    a = (u * torch.tensor([1.0, 0.5, 0.2, 1e-8], dtype=torch.float64)) @ vt
    weights, e = general(4, 4, seed=1), general(4, 4, seed=2)

    def function(a):
        return (gl.polar(a, method="svd_refined") * weights).sum()

    along = torch.func.jvp(function, (a,), (e,))[1]
    torch.testing.assert_close((torch.func.grad(function)(a) * e).sum(), along, rtol=1e-8, atol=0)


def test_factors_at_a_tie_are_refused_only_where_the_loss_has_them():
    a = torch.stack([general(4, 3), torch.zeros(4, 3, dtype=torch.float64)]).requires_grad_()
    (grad,) = torch.autograd.grad(low_rank(a)[0].sum(), a)
    assert grad.isfinite().all()
    assert grad[0].any()
    assert not grad[1].any()
    tied = torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64)).requires_grad_()
    (grad,) = torch.autograd.grad(gl.svd_lowrank(tied, 2)[1].sum(), tied)
    torch.testing.assert_close(grad, torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)))


def test_a_noise_that_is_estimated_as_zero_has_no_derivative():
    a = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(UnsupportedError, match="noise"):
        gl.svd_shrink(a).sum().backward()
    (grad,) = torch.autograd.grad(gl.svd_shrink(a, 0.0).sum(), a)
    torch.testing.assert_close(grad, torch.ones_like(a))


def test_empty_matrices_have_empty_gradients():
    a = torch.zeros(3, 0, 0, dtype=torch.float64, requires_grad=True)
    for function in (lambda x: gl.matrix_power_scaled(x, 3)[0], gl.inv, gl.svdvals):
        (grad,) = torch.autograd.grad(function(a).sum(), a)
        assert grad.shape == a.shape


def test_batches_that_come_one_by_one_are_refused_where_they_are_in_a_graph():
    with pytest.raises(UnsupportedError, match="one tensor"):
        gl.pca([general(5, 3).requires_grad_()], 1)


def test_a_sparse_matrix_is_refused_by_name():
    a = general(5, 5).to_sparse().requires_grad_()
    with pytest.raises(UnsupportedError, match="to_dense"):
        gl.spectral_norm(a).backward()


COMPILED = """
import torch, gramian.linalg as gl

def loss(m):
    u, s, v = gl.svd_lowrank(m, 2)
    total = (gl.inv_root(2 * m, 4, 0.1, certify=False) * 3).sum() + gl.spectral_norm(m + 1) + s.sum()
    total = total + gl.polar(m)[0].sum()
    power, size = gl.matrix_power_scaled(m, 3)
    total = total + power.sum() + size + gl.product_scaled([m, m.mT])[0].sum() + gl.solve(m, m[0])[1]
    root, certificate = gl.sqrtm_ex(m, rtol=1e-3)
    return total + gl.pca(m, 2).explained_variance.sum() + (root * certificate.converged).sum()

a = torch.arange(36.0, dtype=torch.float64).reshape(6, 6).sin()
ours, compiled = ((a @ a.T + torch.eye(6)).requires_grad_() for _ in range(2))
loss(ours).backward()
torch.compile(loss, backend="aot_eager", fullgraph=True)(compiled).backward()
assert torch.equal(ours.grad, compiled.grad)
try:
    torch.compile(lambda m: gl.inv(m).sum() * 0 + 1, backend="aot_eager", fullgraph=True)(torch.zeros(3, 3))
except gl.certificate.ConvergenceError as e:
    assert "singular" in str(e)
else:
    raise SystemExit("no certificate was asked for")
"""


@pytest.mark.slow
def test_a_compiled_graph_without_a_break_gives_the_same_gradient_and_asks_for_the_certificate():
    # In a process of its own: torch.compile cannot trace the type checks that the tests add.
    subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], check=True)


ONE = {
    "inv": gl.inv, "inv_root": lambda m: gl.inv_root(m, 4), "sqrtm": gl.sqrtm, "polar": gl.polar, "svdvals": gl.svdvals,
    "solve": lambda m: gl.solve(m, m[..., :2]), "spectral_norm": gl.spectral_norm, "cond": gl.cond,
    "svd_lowrank": lambda m: gl.svd_lowrank(m, 2), "svd_shrink": lambda m: gl.svd_shrink(m, 0.1),
    "pca": lambda m: gl.pca(m, 2), "matrix_power_scaled": lambda m: gl.matrix_power_scaled(m, 3),
    "product_scaled": lambda m: gl.product_scaled([m, m.mT]), "syrk": gl.syrk, "second_moment": gl.second_moment,
    "matmul": lambda m: gl.matmul(m, m), "spectral_radius": gl.spectral_radius, "spectral_density": gl.spectral_density,
    "eigvalsh_top": lambda m: gl.eigvalsh_top(m, 2), "expm": gl.expm, "logm": gl.logm, "pinv": gl.pinv,
    "sign": lambda m: gl.sign(m @ torch.diag((-1.0) ** torch.arange(m.shape[-1])).to(m)),
    "lstsq": lambda m: gl.lstsq(m, m[..., :2].tril()),
}  # fmt: skip
"""Every public function, as a function of one definite matrix."""


def tensors(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)


def test_every_function_has_a_derivative_in_both_modes_or_refuses_it():
    public = {name.removesuffix("_ex") for name in gl.__all__ if name[0].islower()}
    assert set(ONE) == public
    refusing = set()
    m, e = definite(4), general(4, 4, seed=1)
    e = e + e.mT
    for name, function in ONE.items():
        m.requires_grad_()
        out = tensors(function(m))
        assert all(x.requires_grad for x in out), name
        try:
            weights = [torch.randn(x.shape, generator=seeded(3), dtype=torch.float64) for x in out]
            (grad,) = torch.autograd.grad(out, m, weights)
        except UnsupportedError:
            refusing.add(name)
            with pytest.raises(UnsupportedError, match=name):
                torch.func.jvp(lambda x, f=function: tensors(f(x))[0], (m.detach(),), (e,))
            continue
        several = torch.stack([weights[0], 2 * weights[0]])
        if name not in ("svd_lowrank", "pca"):  # whose vectors look at the gradients' values
            (batched,) = torch.autograd.grad(tensors(function(m))[0], m, several, is_grads_batched=True)
            torch.testing.assert_close(batched[1], 2 * batched[0])
        _, along = torch.func.jvp(lambda x, f=function: tuple(tensors(f(x))), (m.detach(),), (e,))
        total = sum((w * t).sum() for w, t in zip(weights, along, strict=True))
        torch.testing.assert_close((grad * e).sum(), total, rtol=1e-8, atol=1e-8)
        assert float(grad.abs().max()) > 0, name
    assert refusing == {"spectral_radius", "spectral_density", "eigvalsh_top"}


def test_functions_of_meta_and_fake_tensors_have_the_shapes_and_types_of_real_ones():
    for dtype in (torch.float64, torch.bfloat16):
        m = definite(5).to(dtype)
        mode = FakeTensorMode()
        fake, meta = mode.from_tensor(m), m.to("meta").requires_grad_()
        for name, function in ONE.items():
            real = [(x.shape, x.dtype) for x in tensors(function(m))]
            out = tensors(function(meta))
            assert [(x.shape, x.dtype) for x in out] == real, name
            assert torch.autograd.grad(sum(x.sum() for x in out), meta)[0].shape == m.shape
            with mode:
                assert [(x.shape, x.dtype) for x in tensors(function(fake))] == real, name


def frechet(m, e, function, slope):
    """The derivative of a function of a symmetric matrix along E by Daleckii and Krein's divided differences."""
    w, v = torch.linalg.eigh(m)
    gap, mean = w[:, None] - w, (w[:, None] + w) / 2
    tie = gap.abs() < 1e-5 * w.max()
    value = function(w)
    share = torch.where(tie, slope(mean), (value[:, None] - value) / torch.where(tie, 1.0, gap))
    return v @ (share * (v.mT @ e @ v)) @ v.mT


@pytest.mark.parametrize(
    ("dtype", "n", "tol"), [(torch.float64, 6, 1e-9), (torch.float32, 6, 1e-5), (torch.float32, 40, 1e-5)]
)
def test_roots_and_polar_factors_agree_with_divided_differences_at_ties_without_another_eigendecomposition(
    dtype, n, tol, monkeypatch
):
    q = torch.linalg.qr(general(n, n)).Q
    m = (q * torch.tensor([1e-3, 1e-3, 1.0, 1.0, 2.0, 2.0], dtype=torch.float64).repeat(n)[:n]) @ q.mT
    m = ((m + m.mT) / 2).to(dtype)
    e = general(n, n, seed=1)
    e = (e + e.mT).to(dtype).double()
    expected = [frechet(m.double(), e, torch.sqrt, lambda w: 0.5 * w**-0.5)]
    expected += [
        frechet(m.double(), e, lambda w, p=p: w ** (-1 / p), lambda w, p=p: -1 / p * w ** (-1 / p - 1))
        for p in (1, 2, 3, 4, 7)
    ]
    # polar(M) = I moves by the skew Ω with MΩ + ΩM = E − Eᵀ.
    w, v = torch.linalg.eigh(m.double())
    skew = general(n, n, seed=2).to(dtype).double()
    inner = v.mT @ (skew - skew.mT) @ v
    expected += [v @ (inner / (w[:, None] + w)) @ v.mT]
    given = [e] * 6 + [skew]
    # Of a tall matrix the part outside the range is divided by H.
    tall = (general(n + 3, n, seed=3) + torch.eye(n + 3, n)).to(dtype)
    side = general(n + 3, n, seed=4).to(dtype)
    left, s, vh = torch.linalg.svd(tall.double(), full_matrices=False)
    inner = left.mT @ side.double() @ vh.mT
    within = left @ ((inner - inner.mT) / (s[:, None] + s)) @ vh
    wanted_tall = within + ((side.double() @ vh.mT - left @ inner) / s) @ vh
    functions = [gl.sqrtm, *(lambda x, p=p: gl.inv_root(x, p) for p in (1, 2, 3, 4, 7)), gl.polar]
    leaves = [m.clone().requires_grad_() for _ in functions]
    both = [tall.requires_grad_(), tall.detach().mT.clone().requires_grad_()]
    polars = [gl.polar(x) for x in both]
    values = [function(x) for function, x in zip(functions, leaves, strict=True)]
    monkeypatch.setattr(torch.linalg, "eigh", None)
    monkeypatch.setattr(torch.linalg, "svd", None)
    for q, x, g in ((polars[0], both[0], side), (polars[1].mT, both[1], side)):
        (ours,) = torch.autograd.grad(q, x, g)
        ours = ours if x is both[0] else ours.mT
        torch.testing.assert_close(ours.double(), wanted_tall, rtol=tol, atol=10 * tol * float(wanted_tall.abs().max()))
    for value, x, g, wanted in zip(values, leaves, given, expected, strict=True):
        (ours,) = torch.autograd.grad(value, x, g.to(dtype))
        torch.testing.assert_close(ours.double(), wanted, rtol=tol, atol=tol * float(wanted.abs().max()))


def test_a_system_takes_what_torch_takes():
    m, g = definite(3, 4), seeded(5)
    for a, shape, left in (
        (m[0], (4,), True), (m, (3, 4), True), (m[0], (5, 4, 2), True), (m, (2, 1, 4, 3), True), (m, (2, 4), False),
    ):  # fmt: skip
        a, b = a + 0.1 * a.tril(-1), torch.randn(shape, generator=g, dtype=torch.float64)
        ours, peer = gl.solve(a, b, left=left), torch.linalg.solve(a, b, left=left)
        torch.testing.assert_close(ours, peer)
        vector = b.clone().requires_grad_()
        (grad,) = torch.autograd.grad(gl.solve(a, vector, left=left).sum(), vector)
        (wanted,) = torch.autograd.grad(torch.linalg.solve(a, vector, left=left).sum(), vector)
        torch.testing.assert_close(grad, wanted)
    with pytest.raises(ShapeError, match="broadcast"):
        gl.solve(m, general(2, 4, 1))


def test_rows_that_are_all_the_same_vary_along_nothing():
    for rows in (torch.full((5, 3), 0.1), iter([torch.full((5, 3), 1e30), torch.full((2, 3), 1e30)])):
        result = gl.pca(rows, 2)
        assert result.explained_variance.tolist() == [0.0, 0.0]
        torch.testing.assert_close(result.components @ result.components.mT, torch.eye(2))
        assert result.mean.tolist() in ([torch.tensor(0.1).item()] * 3, [torch.tensor(1e30).item()] * 3)


def test_the_condition_in_other_norms_is_torch_s_and_has_a_derivative():
    m = torch.cat([definite(2, 5), torch.zeros(1, 5, 5, dtype=torch.float64)])
    for p in (1, -1, math.inf, -math.inf, -2, "fro", "nuc"):
        for a in (m, m.float()):
            value, certificate = gl.cond_ex(a, p)
            peer = torch.linalg.cond(a[:2].double(), p)
            assert certificate.converged.tolist() == [True, True, False]
            torch.testing.assert_close(value[:2].double(), peer, rtol=1e-5, atol=0)
            assert ((value[:2] - peer).abs() <= certificate.error_bound[:2] * peer).all()
            assert value[2] == (0 if p == -2 else math.inf)
        if p in (-1, -2, "nuc"):
            leaf = m[0, :3, :3].clone().requires_grad_()
            assert gradcheck(lambda x, p=p: gl.cond(x, p, rtol=1e-10), leaf, check_forward_ad=True, fast_mode=True)
    with pytest.raises(InputError, match="'fro'"):
        gl.cond(m, 3)


@pytest.mark.parametrize("name", ["inv_root", "sqrtm"])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_the_derivative_of_a_large_root_is_torchs_where_that_exists(name, scale):
    """From 256 rows on two of its products are halved."""
    n, power = 260, {"inv_root": -0.25, "sqrtm": 0.5}[name]
    a = general(n, n, seed=8)
    m = (scale * (a @ a.mT / n + torch.eye(n, dtype=torch.float64))).requires_grad_()
    weights = general(n, n, seed=9)
    w, v = torch.linalg.eigh(m)
    ours = gl.inv_root(m, 4) if name == "inv_root" else gl.sqrtm(m)
    (expected,) = torch.autograd.grad((v * w**power) @ v.mT, m, weights)
    (found,) = torch.autograd.grad(ours, m, weights)
    assert torch.linalg.norm(found - (expected + expected.mT) / 2) < 1e-9 * torch.linalg.norm(expected)
    several = torch.stack([weights, weights.mT])
    ours = gl.inv_root(m, 4) if name == "inv_root" else gl.sqrtm(m)
    (batched,) = torch.autograd.grad(ours, m, several, is_grads_batched=True)
    assert torch.linalg.norm(batched - found) < 1e-12 * torch.linalg.norm(found)


@pytest.mark.parametrize(("n", "p"), [(256, -1), (300, -2), (513, -4), (300, 2)])
def test_large_roots_have_the_derivative_of_divided_differences(n, p):
    spectrum = torch.logspace(0, -2, n, dtype=torch.float64)
    m = random.with_spectrum(n, n, spectrum=spectrum, symmetric=True, generator=seeded(3), dtype=torch.float64)
    m, weights = ((m + m.mT) / 2).float(), random.normal(n, n, generator=seeded(4), dtype=torch.float32)
    x = m.clone().requires_grad_()
    value = gl.sqrtm(x) if p == 2 else gl.inv_root(x, -p)
    (found,) = torch.autograd.grad(value, x, weights)
    w, v = torch.linalg.eigh(m.double())
    f, apart = w ** (1 / p), w[:, None] - w
    quotients = torch.where(apart == 0, torch.diag(w ** (1 / p - 1) / p), (f[:, None] - f) / apart)
    exact = v @ (quotients * (v.mT @ ((weights + weights.mT) / 2).double() @ v)) @ v.mT
    assert torch.linalg.norm(found - exact) < 2e-5 * torch.linalg.norm(exact)
    assert torch.equal(found, found.mT)
