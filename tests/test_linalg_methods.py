"""Every method keeps its bound where probes replace products, and `auto` climbs from cheap to certain by matrix."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

import gramian.linalg as gl
from cases import DEVICES, SQUARE, indefinite, mp, seeded
from gramian import random
from gramian.linalg.engine import cost, double_double, probes
from gramian.linalg.engine.eigenvalue_ratio import below
from gramian.linalg.engine.escalation import ladder
from gramian.linalg.engine.function import FUNCTIONS, examples
from gramian.linalg.engine.symmetric_products import gram, symmetric_product
from gramian.linalg.polar_factor.direction import cheapest
from gramian.linalg.polar_factor.qdwh import weights

POLAR, INV, SOLVE, INV_ROOT, SQRTM, SVDVALS = (
    FUNCTIONS[name].methods for name in ("polar", "inv", "solve", "inv_root", "sqrtm", "svdvals")
)

KAPPAS = (1.0, 3.0, 1e2, 1e4, 1e6, 1e9)
EPS = 2.0**-53


def spectra(n, kappa):
    grid = torch.linspace(0, 1, n, dtype=torch.float64)
    return (kappa**-grid, torch.where(grid < 1, 1.0, 1 / kappa), torch.where(grid > 0, 1 / kappa, 1.0))


def gallery(m, n, *, psd, dtype=torch.float32):
    """Matrices of every condition number and three kinds of spectrum, in one batch."""
    out = []
    for i, kappa in enumerate(KAPPAS):
        for s in spectra(min(m, n), kappa):
            g = seeded(100 * i + len(out))
            a = random.with_spectrum(m, n, spectrum=s, symmetric=psd, generator=g, dtype=torch.float64)
            out.append((a + a.mT) / 2 if psd else a)
    return torch.stack(out).to(dtype)


def by_eigh(m, power):
    w, v = torch.linalg.eigh(m.double())
    return (v * w.clamp_min(0)[:, None, :] ** power) @ v.mT, w


def polar_oracle(a):
    u, s, vh = torch.linalg.svd(a.double(), full_matrices=False)
    return u @ vh, s[:, 0] / s[:, -1]


def check_bounds(value, certificate, exact, amplification):
    """Error ≤ bound, but for what the float64 oracle itself may err by, and where that is below one."""
    error = (value.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    error = torch.where(certificate.error_bound.isinf(), 0.0, error)  # NaN where there is no answer
    own = 200 * EPS * amplification
    known = own < 1e-2
    assert known.sum() > 4
    assert (error <= certificate.error_bound * (1 + 1e-12) + own)[known].all()
    return error, known


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(48, 48), (160, 40), (64, 200)], ids=str)
@pytest.mark.parametrize("method", ["auto", *(m for m in POLAR if m != "newton_schulz")])
def test_polar_methods_are_within_their_bounds(method, shape, dtype):
    a = gallery(*shape, psd=False, dtype=dtype)
    exact, kappa = polar_oracle(a)
    value, certificate = gl.polar_ex(a, method=method)
    check_bounds(value, certificate, exact, kappa)
    if method == "auto":
        assert certificate.converged[kappa < 1e7].all()


CASES = [
    (label, name, options, method)
    for label, name, options in examples()
    for method in ("auto", *FUNCTIONS[name].methods)
    if method != "newton_schulz"  # honest on average only
]


@pytest.mark.parametrize(("label", "name", "options", "method"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_every_method_of_every_function_is_within_its_bounds(label, name, options, method):
    function = FUNCTIONS[name]
    a = gallery(48, 48, psd=function.domain != "general")
    a = indefinite(a) if function.domain == "symmetric" else a
    _, kappa = polar_oracle(a)
    value, certificate = getattr(gl, f"{name}_ex")(a, method=method, **options(a))
    wide = a.double()
    exact = function.plain(wide, **options(wide))
    nudge = random.normal(*a.shape, generator=seeded(9), dtype=torch.float64)
    nudged = wide + 1e-10 * torch.linalg.matrix_norm(wide)[:, None, None] * (nudge + nudge.mT) / 100
    moved = (function.plain(nudged, **options(wide)) - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    # Where float64 gives NaN, or the function is too sensitive, the oracle says nothing.
    amplification = torch.maximum(kappa, moved / 1e-10).nan_to_num(nan=math.inf)
    check_bounds(value, certificate, exact.nan_to_num(nan=1.0), amplification)
    if method == "auto":
        assert (amplification < 1e5).sum() > 4
        assert certificate.converged[amplification < 1e5].all()


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("method", ["auto", *INV_ROOT])
def test_inverse_root_methods_are_within_their_bounds(method, p):
    m = gallery(56, 56, psd=True)
    exact, w = by_eigh(m, -1 / p)
    kappa = torch.where(w[:, 0] > 0, w[:, -1] / w[:, 0], math.inf)
    value, certificate = gl.inv_root_ex(m, p, method=method)
    check_bounds(value, certificate, exact, kappa)
    if method == "auto":
        assert certificate.converged[kappa < 1e7].all()


@pytest.mark.parametrize("method", ["auto", *SQRTM])
def test_square_root_methods_are_within_their_bounds(method):
    m = gallery(56, 56, psd=True)
    exact, w = by_eigh(m, 0.5)
    value, certificate = gl.sqrtm_ex(m, method=method)
    check_bounds(value, certificate, exact, (w[:, -1] / w[:, 0].clamp_min(1e-30)).sqrt())
    if method == "auto":
        assert certificate.converged.all()


@pytest.mark.parametrize("psd", [True, False])
@pytest.mark.parametrize("method", ["auto", *INV])
def test_inverse_methods_are_within_their_bounds(method, psd):
    if method.startswith("cholesky") and not psd:
        pytest.skip("Cholesky is for symmetric matrices")
    m = gallery(56, 56, psd=psd)
    _, kappa = polar_oracle(m)
    value, certificate = gl.inv_ex(m, method=method)
    check_bounds(value, certificate, torch.linalg.inv(m.double()), kappa)


@pytest.mark.parametrize("psd", [True, False])
@pytest.mark.parametrize("method", ["auto", *SOLVE])
def test_solutions_are_within_their_bounds(method, psd):
    if method.startswith("cholesky") and not psd:
        pytest.skip("Cholesky is for symmetric matrices")
    m = gallery(56, 56, psd=psd)
    b = random.normal(len(m), 56, 3, generator=seeded(5))
    _, kappa = polar_oracle(m)
    value, certificate = gl.solve_ex(m, b, method=method)
    check_bounds(value, certificate, torch.linalg.solve(m.double(), b.double()), kappa)


@pytest.mark.parametrize("method", ["auto", *SVDVALS])
def test_singular_values_are_within_their_bounds(method):
    a = gallery(90, 48, psd=False)
    value, certificate = gl.svdvals_ex(a, method=method)
    check_bounds(value, certificate, torch.linalg.svdvals(a.double()), torch.ones(len(a)))
    if method == "auto":
        assert certificate.converged.all()


@pytest.mark.parametrize("device", DEVICES)
def test_auto_climbs_matrix_by_matrix(device):
    well = random.with_spectrum(300, 128, spectrum=torch.linspace(1, 2, 128), generator=seeded(1))
    ill = random.with_spectrum(300, 128, spectrum=torch.logspace(0, -5, 128), generator=seeded(2))
    hopeless = ill @ torch.diag((torch.arange(128) > 0).float())
    _, certificate = gl.polar_ex(torch.stack([well, ill, hopeless, well]).to(device))
    names = certificate.method_names
    assert certificate.converged.tolist() == [True, True, False, True]
    assert names[0] == names[3]
    places = [list(POLAR).index(name) for name in names]
    assert places[0] < places[1] < places[2]


def test_directions_take_products_only_where_they_are_cheaper(monkeypatch):
    a = random.normal(3, 48, 48, generator=seeded(8))
    a[1] = 0
    monkeypatch.setattr(cost, "DEFAULTS", {"cpu": cost.DEFAULTS["cuda"], "cuda": cost.DEFAULTS["cuda"]})
    q, certificate = gl.polar_ex(a, rtol=0.5)
    _, precise = gl.polar_ex(a, rtol=1e-4)
    monkeypatch.undo()
    assert certificate.method_names[::2] == ["newton_schulz"] * 2
    assert certificate.kind_names[0] == "estimate"
    assert certificate.converged.tolist() == [True, False, True]
    exact, _ = polar_oracle(a[::2])
    error = (q[::2].double() - exact).flatten(1).norm(dim=1) / 48**0.5
    assert (error <= certificate.error_bound[::2]).all()
    assert "newton_schulz" not in precise.method_names


def test_what_auto_returns_is_never_the_argument():
    a = torch.stack([torch.eye(64), SQUARE["hilbert"](64).float()])
    before = a.clone()
    q, _ = gl.polar_ex(a)
    assert torch.equal(a, before)
    q.zero_()
    assert torch.equal(a, before)


def test_probes_fail_as_seldom_as_they_say():
    for k, gain in probes.GAINS.items():
        below = mpmath.gammainc(mpmath.mpf(k) / 2, 0, mpmath.mpf(k) / gain**2 / 2, regularized=True)
        assert probes.FAILURE / 5 < below < probes.FAILURE
    k, whole = probes.WIDTH, probes.GAINS[probes.WIDTH]
    for spread, gain in probes.SPREAD:
        rho = spread * gain**2 / whole**2
        tail = math.exp(-rho * k / 2 * (gain**-2 - 1 + 2 * math.log(gain)))
        assert probes.FAILURE / 40 < tail < probes.FAILURE / len(probes.SPREAD)


@pytest.mark.parametrize("rank", [1, 3, 60])
@pytest.mark.parametrize("n", [20, 60, 300])
def test_probes_bound_a_norm(n, rank):
    p = probes.probes(n, torch.device("cpu"))
    for seed in range(20):
        g = seeded(seed)
        e = random.normal(99, rank, generator=g, dtype=torch.float64) @ random.normal(
            rank, n, generator=g, dtype=torch.float64
        )
        bound = probes.of_norm((e @ p.omega)[None], p).item()
        close = probes.closer((e @ p.omega)[None], p).item()
        exact = torch.linalg.norm(e).item()
        assert exact * (1 - 1e-12) <= close <= bound <= 10 * exact
        assert (p.failure == 0) == (bound < exact * (1 + 1e-12))
        assert n != 300 or rank < 60 or close < 0.75 * bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_thin_products_widen_what_they_read(layout, dtype):
    a = random.normal(2, 700, 90, generator=seeded(3), dtype=dtype)
    a = a if layout == "rows" else a.mT.contiguous().mT
    z, y = random.normal(2, 90, 5, generator=seeded(4)).double(), random.normal(2, 700, 5, generator=seeded(5)).double()
    assert torch.allclose(probes.apply(a, z), a.double() @ z, rtol=1e-12, atol=1e-12)
    assert torch.allclose(probes.apply_transposed(a, y), a.double().mT @ y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 5, 3), (2, 600, 300), (1, 3000, 515)], ids=str)
def test_half_work_products_are_products(shape):
    x = random.normal(*shape, generator=seeded(6))
    exact = x.double().mT @ x.double()
    for value, eps in ((gram(x), 2.0**-23), (gram(x, torch.float64), 2.0**-52), (symmetric_product(x.mT, x), 2.0**-23)):
        assert torch.equal(value, value.mT)
        assert torch.linalg.norm(value - exact) <= shape[1] * eps * torch.linalg.norm(exact)


def test_halley_weights_lift_the_interval():
    low, steps = 1e-3, 0
    while low < 1 - 1e-6:
        a, b, c = weights(low)
        ends = [x * (a + b * x * x) / (1 + c * x * x) for x in (low, 1.0)]
        inside = torch.linspace(low, 1, 1000, dtype=torch.float64)
        image = inside * (a + b * inside**2) / (1 + c * inside**2)
        assert image.max() <= 1 + 1e-9
        assert image.min() >= ends[0] * (1 - 1e-9)
        assert ends[1] == pytest.approx(1)
        low, steps = ends[0], steps + 1
    assert steps == 3


@pytest.mark.parametrize("ratio", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("n", [100, 600])
def test_guessed_condition_is_near(ratio, n):
    spectrum = torch.logspace(0, math.log10(ratio), n, dtype=torch.float64)
    m = random.with_spectrum(n, n, spectrum=spectrum, symmetric=True, generator=seeded(7), dtype=torch.float32)
    m = torch.stack([m + m.mT, torch.eye(n)])
    assert below(m, ratio / 3).tolist() == [False, False]
    assert below(m, 3 * ratio).tolist() == [True, ratio == 1]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("rtol", [0.0, 1e-8, 1e-4, 1e-1])
@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (4096, 1024), (512, 64, 64)], ids=str)
def test_ladders_end_in_the_last_resort_and_gain_accuracy(name, rtol, shape):
    methods = FUNCTIONS[name].methods
    for device in ("cpu", "cuda"):
        names = ladder(methods, shape, rtol, device)
        places = [list(methods).index(name) for name in names]
        assert places == sorted(places)
        assert names[-1] == list(methods)[-1]
        assert all(rtol >= methods[name].finest for name in names)


def test_a_processor_without_bfloat16_gets_no_product_in_it(monkeypatch):
    half = {torch.bfloat16}
    for words, wanted in (({"avx2": True}, {torch.float32}), ({"avx512_bf16": True}, half), ({"amx_bf16": True}, half)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda words=words: words)
        cheapest.cache_clear()
        assert {cheapest(n, ratio * n, 8, 0.1, "cpu").dtype for n in (64, 256, 1024) for ratio in (1, 4)} == wanted
    monkeypatch.undo()
    cheapest.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spread", [1.0, 1e8])
def test_thin_double_double_products_are_within_their_bound(spread, dtype):
    scales = torch.logspace(0, math.log10(spread), 40, dtype=torch.float64)
    a = (random.normal(2, 40, 40, generator=seeded(9), dtype=dtype).double() * scales).to(dtype).double()
    z = random.normal(2, 40, 3, generator=seeded(10), dtype=torch.float64) / scales[:, None]
    lo = a * 2.0**-54
    found = double_double.thin_product(double_double.Pair(a, lo, torch.zeros(2)), torch.linalg.matrix_norm(a), z)
    for i in range(2):
        exact = (mp(a[i]) + mp(lo[i])) * mp(z[i])
        error = mpmath.norm(mp(found.hi[i]) + mp(found.lo[i]) - exact)
        assert error <= found.error[i].item()
        assert error <= 2.0**-60 * mpmath.norm(mp(a[i])) * mpmath.norm(mp(z[i]))


@pytest.mark.parametrize("shape", [(1300, 300), (300, 1300), (2, 600, 257)])
@pytest.mark.parametrize("work", [torch.float32, torch.float64])
def test_gram_matrices_a_few_rows_at_a_time(shape, work):
    x = random.normal(*shape, generator=seeded(5), dtype=torch.float32)
    x = x.mT if shape[-2] < shape[-1] else x  # stored by columns
    exact = x.mT.double() @ x.double()
    found = gram(x, work)
    assert found.dtype == work
    assert torch.equal(found, found.mT)
    assert (found - exact).norm() < (2e-6 if work == torch.float32 else 1e-14) * exact.norm()


@pytest.mark.parametrize("kappa", [10.0, 1e3, 1e5])
@pytest.mark.parametrize(
    ("function", "symmetric", "near"),
    [
        (lambda x, **o: gl.inv_root_ex(x, 1, **o), True, 40),
        (lambda x, **o: gl.inv_root_ex(x, 2, **o), True, 40),
        (lambda x, **o: gl.inv_root_ex(x, 4, **o), True, 40),
        (lambda x, **o: gl.sqrtm_ex(x, **o), True, 40),
        (lambda x, **o: gl.polar_ex(x, **o), False, 200),
        (lambda x, **o: gl.pinv_ex(x, tolerance=0.0, **o), False, 40),
    ],
)
@pytest.mark.parametrize("rtol", [1e-2, 1e-4])
def test_bounds_of_larger_matrices_hold_and_are_near(function, symmetric, near, kappa, rtol):
    spectrum = torch.logspace(0, -math.log10(kappa), 150, dtype=torch.float64)
    m = random.with_spectrum(150, 150, spectrum=spectrum, symmetric=symmetric, generator=seeded(8), dtype=torch.float64)
    m = ((m + m.mT) / 2 if symmetric else m).float()
    value, certificate = function(m, rtol=rtol)
    exact, reference = function(m.double(), rtol=1e-10)
    assert certificate.converged.item()
    assert reference.converged.item()
    error = float((value - exact).norm() / exact.norm())
    assert error < float(certificate.error_bound) + float(reference.error_bound)
    assert float(certificate.error_bound) < near * error


SMALL = [(1, 1), (2, 2), (7, 7), (32, 32)]


@pytest.mark.parametrize(
    ("name", "method", "options", "shape"),
    [
        *(("polar", method, {}, shape) for method in ("svd", "gram_eigh64") for shape in [*SMALL, (60, 5)]),
        *(("sqrtm", "eigh", {}, shape) for shape in SMALL),
        *(("inv_root", "eigh64", {"p": 4}, shape) for shape in SMALL),
    ],
)
def test_small_matrices_of_narrow_types_are_bounded_by_lapacks_own_error_where_it_is_small(
    name, method, options, shape
):
    psd = name != "polar"
    x = gallery(*shape, psd=psd, dtype=torch.float64) / 2
    x = torch.cat([x, torch.zeros(1, *shape, dtype=torch.float64)])
    if psd:
        options = {**options, "shift": torch.zeros(len(x), dtype=torch.float64)}
    rows = FUNCTIONS[name].methods
    rough, fine = (
        rows[method].answer(x, certify=True, dtype=dtype, rtol=1e-4, **options)
        for dtype in (torch.float32, torch.float64)
    )
    best = rows["svd_refined" if name == "polar" else "eigh_refined"].answer(
        x, certify=True, dtype=torch.float64, rtol=math.inf, **options
    )
    known = best.error.isfinite()
    assert known[:-1].all()
    off = torch.linalg.matrix_norm(rough.value - best.value)
    for answer in (rough, fine):
        assert (off <= answer.error + best.error)[known].all()
    # Where κ ≤ 100 that bound does, and costs less; it is not as fine as the other, and never much above a rounding.
    well = slice(0, 9)
    assert (rough.error[well] >= fine.error[well]).all()
    if min(shape) > 1:
        assert (rough.error[well] > 2 * fine.error[well]).all()
    assert (rough.error <= torch.maximum(4 * 2.0**-24 * torch.linalg.matrix_norm(rough.value), fine.error)).all()
