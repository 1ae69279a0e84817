"""What torch was told about float32 products does not reach the certified functions: on processors with bfloat16 matrix
units, and GPUs, it would make estimates wrong and certified methods fail."""

import threading

import pytest
import torch

import gramian.linalg as gl
from gramian import random
from gramian.linalg.engine import lapack
from gramian.linalg.engine.precision import full_products
from gramian.linalg.engine.probes import probes, two_norm_bound
from gramian.linalg.polar_factor.zolotarev import zolotarev

MATMUL = torch.backends.mkldnn.matmul


def _everywhere(value):
    """torch's setting for all backends, also where torch.testing has frozen it."""
    torch._C._set_fp32_precision_setter("generic", "all", value)


@pytest.fixture(params=["medium", "bfloat16", "inherited"])
def narrow(request):
    """float32 products in bfloat16, by each of torch's settings."""
    before = torch.get_float32_matmul_precision()
    if request.param == "medium":
        torch.set_float32_matmul_precision("medium")
    elif request.param == "bfloat16":
        MATMUL.fp32_precision = "bf16"
    else:
        _everywhere("bf16")
    try:
        yield
    finally:
        _everywhere("none")
        MATMUL.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)
        MATMUL.fp32_precision = "none"
        torch.backends.cuda.matmul.fp32_precision = "none"


def _matrix(n, kappa, *, symmetric=False):
    spectrum = torch.logspace(0, -torch.tensor(float(kappa)).log10().item(), n, dtype=torch.float64)
    generator = torch.Generator().manual_seed(410_233)
    a = random.with_spectrum(n, n, spectrum=spectrum, symmetric=symmetric, generator=generator, dtype=torch.float64)
    return ((a + a.mT) / 2).float() if symmetric else a.float()


CALLS = {
    "polar": lambda: gl.polar_ex(_matrix(96, 10), rtol=1e-3),
    "newton_schulz": lambda: gl.polar_ex(_matrix(96, 10), method="newton_schulz", rtol=1e-2),
    "direction": lambda: gl.polar_ex(_matrix(96, 10), rtol=0.03, certify=False),
    "inv_root": lambda: gl.inv_root_ex(_matrix(96, 100, symmetric=True), 4),
    "coupled_newton": lambda: gl.inv_root_ex(_matrix(96, 100, symmetric=True), 4, method="coupled_newton"),
    "inv": lambda: gl.inv_ex(_matrix(96, 100)),
    "svd_lowrank": lambda: gl.svd_lowrank_ex(_matrix(160, 100), 4),
    "spectral_norm": lambda: gl.spectral_norm_ex(_matrix(600, 100)),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_answer_is_that_of_full_precision(name, narrow):
    found, proof = CALLS[name]()
    MATMUL.fp32_precision = "ieee"
    wanted, other = CALLS[name]()
    for x, y in zip(*((v if isinstance(v, tuple) else (v,)) for v in (found, wanted)), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(proof.error_bound, other.error_bound)
    assert proof.method_names == other.method_names


def test_derivatives_and_directions_of_optimizers_are_too(narrow):
    def gradient():
        x = _matrix(96, 10).requires_grad_()
        gl.polar(x).mul(_matrix(96, 3)).sum().backward()
        return x.grad

    found, direction = gradient(), zolotarev(_matrix(96, 100), low=1e-3, terms=3)
    MATMUL.fp32_precision = "ieee"
    assert torch.equal(found, gradient())
    assert torch.equal(direction, zolotarev(_matrix(96, 100), low=1e-3, terms=3))


def test_the_setting_is_restored(narrow):
    before = torch.backends.fp32_precision, MATMUL.fp32_precision
    with full_products(), full_products():
        assert MATMUL.fp32_precision == "ieee"
    with pytest.raises(ZeroDivisionError), full_products():
        _ = 1 / 0
    assert (torch.backends.fp32_precision, MATMUL.fp32_precision) == before
    _everywhere("ieee")
    inherits = MATMUL.fp32_precision == "ieee"
    assert inherits == (before[0] == "bf16")  # what was inherited still is


def test_threads_do_not_restore_each_others_setting(narrow):
    inside, leave, seen = threading.Event(), threading.Event(), []

    def first():
        with full_products():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with full_products():
        leave.set()
        thread.join()
        seen.append(MATMUL.fp32_precision)
    assert seen == ["ieee"]
    assert MATMUL.fp32_precision == "bf16"


def test_what_is_not_finite_proves_nothing_and_does_not_raise():
    e = torch.ones(2, 3, 5, dtype=torch.float64)
    e[1, 0, 0] = torch.nan
    found = two_norm_bound(e, probes(64, torch.device("cpu")))
    assert found[0].isfinite()
    assert found[1] == torch.inf
    m = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    m[1, 0, 1] = torch.inf
    w, v = lapack.small_eigh(m)
    assert w[0].tolist() == [1, 1, 1]
    assert v[0].isfinite().all()
    assert w[1].isnan().all()
    assert v[1].isnan().all()
    assert lapack.small_eigvalsh(m).isnan().tolist() == [[False] * 3, [True] * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [511, 512, 700])
def test_cholesky_in_strips(n, dtype):
    spectrum = torch.logspace(0, -3, n, dtype=torch.float64)
    g = torch.Generator().manual_seed(n)
    m = random.with_spectrum(n, n, spectrum=spectrum, symmetric=True, generator=g, dtype=torch.float64)
    m = (m + m.mT).to(dtype)
    broken = m.clone()
    broken[300, 300] = -1
    lower, info = lapack.cholesky(torch.stack([m, broken]))
    plain, code = torch.linalg.cholesky_ex(torch.stack([m, broken]))
    assert info.tolist() == code.tolist() == [0, 301]
    assert torch.equal(lower[0], lower[0].tril())
    torch.testing.assert_close(lower[0], plain[0], rtol=0, atol=2e3 * n * torch.finfo(dtype).eps)
    assert (lower[0] @ lower[0].mT - m).norm() < n * torch.finfo(dtype).eps * m.norm()
