"""Shapes, dtypes, errors, scales: one bad matrix never harms its neighbors, and bad arguments say what to do."""

from __future__ import annotations

import pytest
import torch

import gramian.linalg as gl
from cases import DEVICES, EVERY, HALF, SHAPES, WIDE, hostile_for, overflows, seeded, untyped
from gramian import random
from gramian.errors import ConvergenceError, DtypeError, InputError, ShapeError
from gramian.linalg.certificate import OVERFLOW, REASONS, UNDERFLOW
from gramian.linalg.engine.function import FUNCTIONS as REGISTRY
from gramian.linalg.engine.function import examples


def certified(name, options=lambda a: {}, **fixed):
    return lambda a: getattr(gl, f"{name}_ex")(a, **options(a), **fixed)


REGISTERED = {label: certified(name, options) for label, name, options in examples()}
NAMES = {label: name for label, name, _ in examples()}
GENERAL = {label: f for label, f in REGISTERED.items() if REGISTRY[NAMES[label]].domain == "general"} | {
    "polar/newton_schulz": certified("polar", method="newton_schulz"),
    "svd_lowrank": lambda a: gl.svd_lowrank_ex(a, min(1, *a.shape[-2:])),
}
SYMMETRIC = {label: f for label, f in REGISTERED.items() if label not in GENERAL} | {
    "inv/cholesky": certified("inv", method="cholesky"),
    "solve/many": lambda a: gl.solve_ex(a, a),
}
ALL = {**GENERAL, **SYMMETRIC}


def needs(name):
    """What `hostile_for` has to make for it."""
    if name in GENERAL:
        return "general"
    return "symmetric" if name in NAMES and REGISTRY[NAMES[name]].domain == "symmetric" else "psd"


def tensors(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*WIDE, *HALF], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_any_shape(name, shape, dtype, device):
    a = random.normal(*shape, generator=seeded(0), dtype=dtype, device=device)
    if name in SYMMETRIC:
        k = shape[-1]
        a = gl.syrk(a).to(dtype) + torch.eye(k, dtype=dtype, device=device)
    value, certificate = ALL[name](a)
    assert certificate.converged.shape == a.shape[:-2]
    for field in ("residual", "error_bound", "kind", "failure_probability", "steps", "method", "reason"):
        assert getattr(certificate, field).shape == a.shape[:-2]
    for x in tensors(value):
        assert x.dtype == dtype
        assert x.device == a.device
        assert x.shape[: len(shape) - 2] == shape[:-2]
    if not name.startswith("polar/"):
        converged, reasons = certificate.converged.flatten().tolist(), certificate.reasons
        for ok, reason, x in zip(converged, reasons, a.reshape(len(converged), *a.shape[-2:]), strict=True):
            assert ok or (reason == REASONS[OVERFLOW] and name in EVERY and overflows(name, x)), reason
        assert len(certificate.method_names) == len(converged)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_a_bad_matrix_leaves_its_neighbors_alone(name, dtype, device):
    a = hostile_for(needs(name), 5, 30, 4, 4, dtype)
    a[::7] = torch.nan
    a[3] = torch.inf
    a = a.to(device)
    value, certificate = ALL[name](a)
    for i in range(a.shape[0]):
        alone, own = ALL[name](a[i])
        assert own.converged == certificate.converged[i]
        for x, y in zip(tensors(alone), tensors(value), strict=True):
            # A batched product may sum in another order than a single one.
            if own.converged and certificate.converged[i]:
                bound = (own.error_bound + certificate.error_bound[i]) * 1.01 * torch.linalg.norm(x.double())
                apart = torch.linalg.norm(x.double() - y[i].double())
                assert apart <= bound or name == "svd_lowrank"
            assert torch.equal(x.isnan(), y[i].isnan())


@pytest.mark.parametrize("power", [-30, 30])
@pytest.mark.parametrize(
    "name", [*(x for x in REGISTERED if not isinstance(REGISTRY[NAMES[x]].degree, str)), "polar/newton_schulz"]
)
def test_scaling_by_a_power_of_two_scales_the_answer_exactly(name, power):
    a = gl.syrk(random.normal(3, 8, 5, generator=seeded(1)))
    function = REGISTRY[NAMES.get(name, "polar")]
    options = {label: o for label, _, o in examples()}.get(name, lambda a: {})(a)
    degree = function.degree(**options) if callable(function.degree) else function.degree
    k = 4 * power // 2
    before, after = ALL[name](a)[0], ALL[name](a * 2.0**k)[0]
    assert torch.equal(before * 2.0 ** (k * float(degree)), after)


@pytest.mark.parametrize("name", ALL)
@untyped()
def test_wrong_input_says_what_to_do(name):
    own = NAMES.get(name, name.partition("/")[0])
    with pytest.raises(ShapeError, match=rf"{own}: expected .*\(512,\)"):
        ALL[name](torch.zeros(512)) if own != "svd_lowrank" else gl.svd_lowrank_ex(torch.zeros(512), 1)
    with pytest.raises(DtypeError, match=f"{own}: expected float64.*Convert"):
        ALL[name](torch.zeros(3, 3, dtype=torch.int64))
    if own == "svd_lowrank":
        with pytest.raises(DtypeError, match=r"complex64.*imaginary part"):
            ALL[name](torch.zeros(3, 3, dtype=torch.complex64))
    if name in SYMMETRIC:
        with pytest.raises(ShapeError, match="square"):
            ALL[name](torch.zeros(2, 3))


@pytest.mark.parametrize("method", ["nonsense", ""])
def test_unknown_method_lists_the_known(method):
    a = torch.eye(3)
    for _, name, options in examples():
        with pytest.raises(InputError, match=f"{name}: unknown method.*{', '.join(REGISTRY[name].methods)}"):
            certified(name, options, method=method)(a)
    with pytest.raises(InputError, match=f"svd_lowrank: unknown method.*{', '.join(gl.lowrank.SVD_LOWRANK)}"):
        gl.svd_lowrank(a, 1, method=method)


@untyped()
def test_other_arguments_are_checked():
    a = torch.eye(3)
    for call in (
        lambda: gl.inv(a, damping=-1.0),
        lambda: gl.inv(a, damping=torch.zeros(2)),
        lambda: gl.inv(a, rtol=-1.0),
        lambda: gl.inv_root(a, 0),
        lambda: gl.svd_lowrank(a, 4),
        lambda: gl.solve(a, torch.zeros(2, 1)),
        lambda: gl.polar(a, steps=0),
        lambda: gl.second_moment(torch.zeros(0, 3)),
    ):
        with pytest.raises(InputError):
            call()


def test_value_form_raises_with_the_reason():
    with pytest.raises(ConvergenceError, match=r"inv: 1 of 2 matrices.*matrix 1:.*singular.*inv_ex"):
        gl.inv(torch.stack([torch.eye(2), torch.zeros(2, 2)]))
    with pytest.raises(ConvergenceError, match="not symmetric"):
        gl.sqrtm(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    with pytest.raises(ConvergenceError, match=r"above rtol.*Pass damping="):
        gl.inv(torch.tensor([[3.0]]), rtol=0.0)


@pytest.mark.parametrize("device", DEVICES)
def test_an_answer_that_overflows_its_dtype_says_so_and_what_to_do(device):
    small = torch.tensor([[[1e-6]], [[0.5]]], dtype=torch.float16, device=device)
    for f in (gl.inv_ex, lambda m: gl.inv_root_ex(m, 1), lambda m: gl.solve_ex(m, torch.ones_like(m))):
        value, certificate = f(small)
        assert value.flatten().tolist() == [float("inf"), 2.0]
        assert certificate.converged.tolist() == [False, True]
        assert certificate.reason.tolist() == [OVERFLOW, 0]
        assert certificate.error_bound[0] == float("inf")
        assert f(small.float())[1].converged.all()
    with pytest.raises(ConvergenceError, match="matrix 0: the answer overflows its dtype: convert") as caught:
        gl.inv(small)
    assert "damping" not in str(caught.value)
    _, certificate = gl.cond_ex(torch.diag(torch.tensor([1.0, 1e-5], dtype=torch.float16, device=device)))
    assert certificate.reasons == [REASONS[OVERFLOW]]
    _, certificate = gl.inv_ex(torch.tensor([[2.0**-1073]], dtype=torch.float64, device=device))
    assert certificate.reasons == [REASONS[OVERFLOW]]


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_an_answer_below_the_normal_numbers_says_so(dtype):
    eye = torch.eye(3, dtype=dtype)
    value, certificate = gl.expm_ex(torch.stack([-2000 * eye, 0 * eye]))
    assert not value[0].any()
    assert torch.equal(value[1], eye)
    assert certificate.reason.tolist() == [UNDERFLOW, 0]
    assert gl.expm_ex(torch.diag(torch.tensor([-2000.0, 0.0], dtype=dtype)))[1].converged


def test_the_codes_of_reasons_do_not_change():
    codes = ("NONE", "NOT_FINITE", "SINGULAR", "NOT_SYMMETRIC", "INDEFINITE", "INACCURATE", "LAPACK", "OVERFLOW")
    assert [getattr(gl.certificate, name) for name in codes] == list(range(8))


@pytest.mark.parametrize("dtype", [*WIDE, *HALF], ids=str)
def test_products_are_exactly_symmetric_and_accumulate_wide(dtype):
    x = random.normal(2, 300, 33, generator=seeded(4), dtype=dtype)
    gram = gl.syrk(x)
    assert gram.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(gram, gram.mT)
    exact = x.double().mT @ x.double()
    assert torch.linalg.norm(gram - exact) <= 300 * torch.finfo(gram.dtype).eps * torch.linalg.norm(exact)
    assert torch.equal(gl.second_moment(x), gram / 300)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gl.syrk(x), gram)


def test_a_batch_of_larger_matrices_is_inverted_on_more_than_one_thread():
    # torch's own batched LU raises here.
    m = random.normal(3, 200, 200, generator=seeded(31), dtype=torch.float64)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        value, certificate = gl.inv_ex(m, method="lu")
        radius, proof = gl.spectral_radius_ex(m, rtol=1e-3)
    finally:
        torch.set_num_threads(threads)
    assert certificate.converged.all()
    assert torch.allclose(value @ m, torch.eye(200, dtype=torch.float64).expand(3, -1, -1), atol=1e-8)
    assert proof.converged.all()
    assert torch.allclose(radius, torch.linalg.eigvals(m).abs().amax(-1))


@pytest.mark.parametrize(
    ("function", "told"),
    [("expm", "defined for these alone"), ("logm", "defined for these alone"), ("inv", r"gm\.linalg\.pinv"),
     ("sign", r"gm\.linalg\.polar"), ("sqrtm", "Gram matrix")],
)  # fmt: skip
def test_a_rectangle_and_a_vector_are_refused_in_plain_words(function: str, told: str) -> None:
    with untyped(), pytest.raises(ShapeError, match=told):
        getattr(gl, function)(torch.ones(2, 3))
    with untyped(), pytest.raises(ShapeError, match=r"A vector becomes a matrix of one column by a\[:, None\]"):
        getattr(gl, function)(torch.ones(3))
