"""Norms, condition, radius, density, powers, products, components agree with oracles within their bounds."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

import gramian.linalg as gl
from cases import SQUARE, WIDE, Map, hostile, mp, mp_error, oracle_svdvals, seeded, untyped
from gramian import random
from gramian.errors import ConvergenceError, DtypeError, InputError, ShapeError


def off(value, exact):
    """Relative error; 0 for two zeros, inf where only one is."""
    value = value.item()
    if not math.isfinite(value):
        return math.inf
    return float(abs(mpmath.mpf(value) - exact) / exact) if exact else (0.0 if value == 0 else math.inf)


def norm_of(a):
    return max(oracle_svdvals(a))


def cond_of(a):
    s = sorted(oracle_svdvals(a))
    return s[-1] / s[0] if s[0] > s[-1] * mpmath.mpf(10) ** -25 else mpmath.mpf(0)


NUMBERS = {
    "spectral_norm": (gl.spectral_norm_ex, norm_of, tuple(gl.norm.SPECTRAL_NORM)),
    "cond": (gl.cond_ex, cond_of, tuple(gl.condition.COND)),
}


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("shape", [(6, 6), (7, 3), (3, 6)], ids=str)
@pytest.mark.parametrize(("name", "method"), [(n, m) for n in NUMBERS for m in ("auto", *NUMBERS[n][2])])
def test_norm_and_condition_of_hostile_matrices_are_within_their_bounds(name, method, shape, dtype):
    function, oracle, _ = NUMBERS[name]
    a = hostile(901, 20, *shape, dtype, psd=False)
    value, certificate = function(a, method=method)
    for x, y, bound in zip(a, value, certificate.error_bound.tolist(), strict=True):
        exact = oracle(x) if bool(x.isfinite().all()) else None
        assert (math.inf if exact is None else off(y, exact)) <= bound * (1 + 1e-12)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_spectral_norm_always_converges_and_condition_up_to_rounding(dtype):
    for name, make in SQUARE.items():
        a = make(7).to(dtype)
        assert gl.spectral_norm_ex(a)[1].converged == bool(a.isfinite().all()), name
    assert gl.cond_ex(SQUARE["moler"](7))[1].converged
    assert not gl.cond_ex(SQUARE["zero"](4))[1].converged
    assert not gl.cond_ex(SQUARE["rank_deficient"](6))[1].converged


@pytest.mark.parametrize("kappa", [1.0, 1e3, 1e6])
def test_krylov_route_on_large_matrices(kappa):
    spectrum = torch.logspace(0, -math.log10(kappa), 200, dtype=torch.float64)
    a = random.with_spectrum(2, 260, 200, spectrum=3 * spectrum, generator=seeded(2), dtype=torch.float64)
    for matrix in (a, a[..., :200, :].contiguous()):
        s = torch.linalg.svdvals(matrix)
        for value, certificate, exact in (
            (*gl.spectral_norm_ex(matrix, method="lanczos", rtol=1e-4), s[:, 0]),
            (*gl.cond_ex(matrix, method="lanczos", rtol=1e-2), s[:, 0] / s[:, -1]),
        ):
            assert certificate.converged.all()
            assert ((value / exact - 1).abs() <= certificate.error_bound + 1e-9).all()


@pytest.mark.parametrize("wrap", [Map, lambda a: a.to_sparse_csr(), lambda a: a.to_sparse()])
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_maps_and_sparse_tensors_agree_with_dense(wrap, scale):
    a = random.normal(30, 20, generator=seeded(3)) * scale
    value, certificate = gl.spectral_norm_ex(wrap(a))
    assert certificate.converged
    assert certificate.kind_names == ["estimate"]
    assert abs(value / torch.linalg.matrix_norm(a.double(), 2) - 1) <= certificate.error_bound
    a[0, 0] = math.nan
    assert not gl.spectral_norm_ex(wrap(a))[1].converged


@pytest.mark.parametrize("shape", [(40, 30), (400, 300)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e12])
def test_a_float32_map_converges_in_spite_of_its_rounding(shape, scale):
    a = random.normal(*shape, generator=seeded(15)) * scale
    value, certificate = gl.spectral_norm_ex(Map(a))
    assert certificate.converged
    assert abs(value / torch.linalg.matrix_norm(a.double(), 2) - 1) <= certificate.error_bound <= 1e-4


@pytest.mark.parametrize("shape", [(600, 520), (2, 530, 530)], ids=str)
@pytest.mark.parametrize("rtol", [1e-2, 1e-4, 1e-6])
def test_lanczos_in_float32_counts_its_rounding(shape, rtol):
    a = random.normal(*shape, generator=seeded(16))
    value, certificate = gl.spectral_norm_ex(a.mT, rtol=rtol)
    assert set(certificate.method_names) == {"lanczos"}
    assert certificate.converged.all()
    exact = torch.linalg.matrix_norm(a.double(), 2)
    assert ((value.double() / exact - 1).abs() <= certificate.error_bound).all()


@pytest.mark.parametrize("noise", [1e-6, 1e-3, 1e-1])
def test_bound_on_the_top_allows_for_noise(noise):
    n, r = 300, 16
    spectrum = torch.cat([torch.ones(1), torch.linspace(0.9, 0, n - 1)]).double()
    m = random.with_spectrum(n, n, spectrum=spectrum, symmetric=True, generator=seeded(17), dtype=torch.float64)
    g = seeded(18)

    def apply(y):
        # Rounding that is never the same, of up to `noise` for each block.
        e = random.normal(1, r, n, generator=g, dtype=torch.float64)
        return y @ m + noise * e / (2 * math.sqrt(n))

    start = random.normal(1, r, n, generator=seeded(19), dtype=torch.float64)
    found = gl.engine.krylov.lanczos(apply, start, 12)
    d = found.rows @ m - found.t @ found.rows
    d[:, -r:] -= found.residual
    size = torch.linalg.matrix_norm(d, 2)
    theta = gl.engine.krylov.ritz(found)
    for near in (1 + 1e-9, 1.01):  # too bold a guess is corrected
        high = gl.engine.krylov.top_bound(found, theta, theta * near, noise=size)
        assert high >= 1 - 1e-12
        assert high <= 1 + max(2e-3, 1e2 * noise)
        share = torch.full_like(size, noise)
        more = gl.engine.krylov.top_bound(found, theta, theta * near, noise=size, share=share)
        assert more - theta >= (high - theta) / gl.engine.krylov.CLOSE


@pytest.mark.parametrize("kappa", [1e2, 1e8, 1e12])
@pytest.mark.parametrize("shape", [(9, 9), (13, 6)], ids=str)
def test_smallest_singular_value_of_the_ill_conditioned(shape, kappa):
    spectrum = torch.logspace(0, -math.log10(kappa), min(shape), dtype=torch.float64)
    a = random.with_spectrum(3, *shape, spectrum=spectrum, generator=seeded(20), dtype=torch.float64)
    value, error = gl.condition.smallest(a)
    for x, s, bound in zip(a, value, error, strict=True):
        exact = min(oracle_svdvals(x))
        assert abs(mpmath.mpf(s.item()) - exact) <= bound.item()
        assert bound <= 1e-6 * s


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_spectral_radius_is_within_its_bound(dtype):
    jordan = torch.eye(4, dtype=dtype) + torch.ones(4, dtype=dtype)[:3].diag(1)
    cases = [jordan, torch.ones(3, dtype=dtype).diag(1), *hostile(11, 20, 5, 5, dtype, psd=False)]
    for a in cases:
        value, certificate = gl.spectral_radius_ex(a)
        if not bool(a.isfinite().all()):
            assert not certificate.converged
            continue
        exact = max((abs(e) for e in mpmath.eig(mp(a), left=False, right=False)), default=mpmath.mpf(0))
        size = mpmath.norm(mp(a))
        exact = exact if exact > size * mpmath.mpf(10) ** -12 else None
        if exact is not None:
            assert off(value, exact) <= certificate.error_bound.item() * (1 + 1e-12)
    assert gl.spectral_radius(jordan) == 1
    assert gl.spectral_radius(cases[1]) == 0  # nilpotent
    # Of one in another basis the value is LAPACK's where nothing is proven.
    turn = torch.linalg.qr(random.normal(4, 4, generator=seeded(3), dtype=dtype)).Q
    value, certificate = gl.spectral_radius_ex(turn @ jordan @ turn.mT, method="gelfand")
    assert not certificate.converged
    assert value == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("k", [0, 1, 2, 7, 1000, 10**6, -1, -5, -(10**6)])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_scaled_powers_are_right_in_norm(k, dtype):
    g = seeded(5)
    cases = {
        "jordan": torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=dtype),
        "haar": random.orthogonal(4, 4, generator=g, dtype=dtype),
        "normal": random.normal(5, 5, generator=g, dtype=dtype),
        "huge": random.normal(4, 4, generator=g, dtype=dtype) * 1e30,
        "tiny": random.wishart(4, 4, samples=9, generator=g, dtype=dtype) * 1e-30,
    }
    for name, a in cases.items():
        (mantissa, log_scale), certificate = gl.matrix_power_scaled_ex(a, k)
        base = mp(a) if k >= 0 else mpmath.inverse(mp(a))
        exact = base ** abs(k)
        ours = mp(mantissa) * mpmath.exp(mpmath.mpf(log_scale.item()))
        error = float(mpmath.norm(ours - exact) / mpmath.norm(exact))
        assert certificate.converged, name
        assert error <= certificate.error_bound.item() * (1 + 1e-12), name
        assert (log_scale - float(mpmath.log(mpmath.norm(exact)))).abs() <= 1e-5


def test_scaled_powers_of_bad_matrices_say_so():
    nilpotent, nan, zero = torch.ones(2).diag(1), torch.full((3, 3), math.nan), torch.zeros(3, 3)
    (mantissa, log_scale), certificate = gl.matrix_power_scaled_ex(torch.stack([nilpotent, nan, zero]), 10**6)
    assert certificate.converged.tolist() == [True, False, True]
    assert log_scale[0] == log_scale[2] == -math.inf
    assert not mantissa[0].any()
    assert mantissa[1].isnan().all()
    _, certificate = gl.matrix_power_scaled_ex(torch.stack([torch.eye(3), zero]), -3)
    assert certificate.converged.tolist() == [True, False]
    assert certificate.reasons[1].startswith("the answer does not exist")


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_scaled_products_are_right_in_norm(scale):
    g = seeded(6)
    parts = [random.normal(3 + i % 3, 3 + (i + 1) % 3, generator=g) * scale for i in range(60)]
    (mantissa, log_scale), certificate = gl.product_scaled_ex(iter(parts))
    exact = mp(parts[0])
    for part in parts[1:]:
        exact = exact * mp(part)
    ours = mp(mantissa) * mpmath.exp(mpmath.mpf(log_scale.item()))
    assert certificate.converged
    assert float(mpmath.norm(ours - exact) / mpmath.norm(exact)) <= certificate.error_bound.item()


def test_scaled_products_that_cancel_are_flagged():
    p = torch.tensor([[1.0, 1.0], [1.0, 1.0]]) / 3
    q = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) / 3 + torch.tensor([[0.0, 0.0], [0.0, 1e-14]])
    assert not gl.product_scaled_ex([p.double(), q.double()], rtol=1e-6)[1].converged
    with pytest.raises(ConvergenceError, match="NaN"):
        gl.product_scaled([p, p * math.nan])


@pytest.mark.parametrize(("n", "seed"), [(50, 7), (300, 7), (600, 0)])
def test_density_is_within_its_bound(n, seed):
    """Also where the matrix was drawn from the seed that comes to mind first, which linalg must not use itself."""
    m = random.wishart(n, n, samples=2 * n, generator=seeded(seed), dtype=torch.float64)
    exact = torch.linalg.eigvalsh(m)
    for method in gl.density.DENSITY:
        density, certificate = gl.spectral_density_ex(m, method=method, rtol=1.0)
        grid = torch.linspace(0, float(exact[-1]) * 1.01, 20_001, dtype=torch.float64)
        ours = torch.cat([torch.zeros(1), density.weights.cumsum(0)])[torch.searchsorted(density.nodes, grid)]
        theirs = torch.searchsorted(exact, grid) / n
        distance = (ours - theirs).abs().mean() * grid[-1] / (exact[-1] - exact[0])
        assert distance <= certificate.error_bound + 1e-4
        assert abs(density.weights.sum() - 1) < 1e-12
        assert torch.equal(gl.spectral_density(Map(m), rtol=1.0).nodes, gl.spectral_density(Map(m), rtol=1.0).nodes)


def test_density_refuses_asymmetric():
    assert not gl.spectral_density_ex(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))[1].converged


def test_space_that_stops_growing_is_not_taken_for_the_whole():
    # Two eigenvalues only: the space ends before it has seen all 70 of the leading vectors.
    step = torch.cat([torch.ones(70), torch.full((70,), 1e-3)]).double()
    slow = torch.arange(1, 141, dtype=torch.float64) ** -0.5
    g = seeded(21)
    a = torch.stack(
        [random.with_spectrum(300, 140, spectrum=s, generator=g, dtype=torch.float64) for s in (step, slow)]
    )
    (u, s, v), certificate = gl.svd_lowrank_ex(a, 70, method="block_krylov")
    missed = (a - (u * s[:, None, :]) @ v.mT).flatten(1).norm(dim=1)
    optimum = torch.linalg.svdvals(a)[:, 70:].norm(dim=1)
    size = a.flatten(1).norm(dim=1)
    assert ((missed - optimum) / size <= certificate.error_bound + 1e-12).all()


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("decay", ["slow", "tail", "exact"])
def test_low_rank_in_float32_counts_its_rounding(decay, dtype):
    i = torch.arange(1, 201, dtype=torch.float64)
    spectrum = {"slow": i**-0.5, "tail": i**-1.5, "exact": (i < 13) / i}[decay]
    a = random.with_spectrum(260, 200, spectrum=spectrum, generator=seeded(22), dtype=dtype)
    (u, s, v), certificate = gl.svd_lowrank_ex(a.mT, 12)
    assert certificate.method_names == ["block_krylov"]
    assert certificate.converged
    optimum = torch.linalg.svdvals(a.double())[12:].norm()
    reached = (a.mT.double() - (u.double() * s.double()) @ v.double().mT).norm()
    assert (reached - optimum) / spectrum.norm() <= certificate.error_bound


@pytest.mark.parametrize("decay", ["slow", "fast", "flat", "deficient"])
def test_block_krylov_excess_is_within_its_bound(decay):
    i = torch.arange(1, 201, dtype=torch.float64)
    spectrum = {"slow": i**-0.5, "fast": i**-2, "flat": i * 0 + 1, "deficient": (i < 9) * 1.0}[decay]
    a = random.with_spectrum(2, 260, 200, spectrum=spectrum, generator=seeded(8), dtype=torch.float64)
    (u, s, v), certificate = gl.svd_lowrank_ex(a, 12, method="block_krylov", rtol=1e-4)
    assert certificate.converged.all()
    optimum = spectrum[12:].norm()
    reached = (a - (u * s[:, None, :]) @ v.mT).flatten(1).norm(dim=1)
    assert ((reached - optimum) / spectrum.norm() <= certificate.error_bound).all()
    (u, _, v), _ = gl.svd_lowrank_ex(a.mT, 12, rtol=1e-4)
    assert (u.shape, v.shape) == ((2, 200, 12), (2, 260, 12))


@pytest.mark.parametrize("loss", ["frobenius", "operator", "nuclear"])
def test_shrinkage_recovers_a_signal_and_its_noise(loss):
    g = seeded(9)
    signal = random.normal(200, 3, generator=g) @ random.normal(3, 120, generator=g)
    noisy = signal + 0.5 * random.normal(200, 120, generator=g)
    for noise in (None, 0.5):
        clean = gl.svd_shrink(noisy, noise, loss=loss)
        assert torch.linalg.matrix_rank(clean, rtol=1e-5) == 3
        assert torch.dist(clean, signal) < 0.35 * torch.dist(noisy, signal)
    assert torch.dist(gl.svd_shrink(noisy, 0.0), noisy) < 1e-4 * noisy.norm()
    assert not gl.svd_shrink(0.1 * random.normal(50, 40, generator=g), 1.0).any()
    assert gl.svd_shrink_ex(torch.stack([torch.eye(2), torch.full((2, 2), math.nan)]))[1].converged[1].item() is False


def test_median_of_marchenko_pastur_is_that_of_wishart():
    for ratio in (0.2, 1.0):
        m = random.wishart(400, 400, samples=int(400 / ratio), generator=seeded(10), dtype=torch.float64)
        assert abs(torch.linalg.eigvalsh(m).median() - gl.shrinkage.marchenko_pastur_median(ratio)) < 0.01


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_streamed_components_are_those_of_the_whole(scale):
    x = (random.normal(500, 6, generator=seeded(11), dtype=torch.float64) * torch.arange(1.0, 7) + 1e6) * scale
    whole, parts = gl.pca(x, 3), gl.pca(iter(x.split(7)), 3)
    centered = x - x.mean(0)
    s = torch.linalg.svdvals(centered / scale)
    for result in (whole, parts):
        assert (result.explained_variance / scale**2 / (s[:3] ** 2 / 499) - 1).abs().max() < 1e-8
        assert (result.mean / x.mean(0) - 1).abs().max() < 1e-12
        assert (result.components @ result.components.mT - torch.eye(3)).abs().max() < 1e-12
    assert (whole.components - parts.components).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("split", [3, 50])
def test_variances_are_within_their_bound(dtype, offset, split):
    if dtype == torch.bfloat16:
        offset = min(offset, 10.0)  # beyond, the rows are all but equal
    x = (random.normal(50, 4, generator=seeded(15), dtype=torch.float64) * torch.arange(1.0, 5) + offset).to(dtype)
    result, certificate = gl.pca_ex(iter(x.split(split)), 3, rtol=1.0)
    with mpmath.workdps(40):
        rows = mpmath.matrix(x.double().tolist())
        means = [mpmath.fsum(rows[:, j]) / 50 for j in range(4)]
        centered = mpmath.matrix(50, 4)
        for i in range(50):
            for j in range(4):
                centered[i, j] = rows[i, j] - means[j]
        covariance = centered.T * centered / 49
        exact = sorted(mpmath.eigsy(covariance, eigvals_only=True), reverse=True)
        found = [mpmath.mpf(v) for v in result.explained_variance.double().tolist()]
        along = mpmath.matrix(result.components.double().tolist())
        along = [(along[i, :] * covariance * along[i, :].T)[0] for i in range(3)]
        error = max(float(abs(f - e) / exact[0]) for pair in (exact, along) for f, e in zip(found, pair, strict=False))
    assert certificate.converged
    assert 0 < error <= certificate.error_bound
    assert certificate.error_bound < {torch.float64: 1e-8, torch.float32: 1e-6, torch.bfloat16: 4e-2}[dtype]


def test_components_of_what_is_not_finite_or_constant():
    rows = torch.ones(4, 2)
    rows[1, 1] = math.nan
    result, certificate = gl.pca_ex(rows, 1)
    assert certificate.reasons == ["the matrix holds NaN or inf"]
    assert result.components.isnan().all()
    result, certificate = gl.pca_ex(torch.zeros(4, 2), 1)
    assert certificate.converged
    assert result.explained_variance == 0


@pytest.mark.parametrize("method", gl.products.MATMUL)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize(("a", "b"), [((3, 5, 7), (7, 9)), ((2, 60, 40), (40, 50)), ((0, 3), (3, 2)), ((2, 0), (0, 2))])
def test_products_are_within_their_bound(method, dtype, a, b):
    x = random.normal(*a, generator=seeded(12), dtype=torch.float64).to(dtype)
    y = random.normal(*b, generator=seeded(13), dtype=torch.float64).to(dtype) * 1e20
    value, certificate = gl.matmul_ex(x, y, method=method, rtol=2e-2)
    apart = torch.linalg.norm(value.double() - x.double() @ y.double(), dim=(-2, -1))
    sizes = torch.linalg.norm(x.double(), dim=(-2, -1)) * torch.linalg.norm(y.double())
    assert certificate.converged.all()
    assert (apart <= certificate.error_bound * sizes).all()
    if method == "bfloat16" and sizes.numel() and sizes.min() > 0:
        assert not gl.matmul_ex(x, y, method=method, rtol=1e-6)[1].converged.any()
        assert (certificate.error_bound <= 30 * apart / sizes).all()
    if len(a) == 3:
        x[1, 0, 0] = math.inf
        finite = torch.arange(len(x)) != 1
        assert torch.equal(gl.matmul_ex(x, y, method=method, rtol=2e-2)[1].converged, finite)


@untyped()
def test_spectral_radius_of_sparse_matrices_and_maps():
    a = torch.tensor([[0.0, 1.0], [-4.0, 0.0]])

    class Map:
        shape = (2, 2)

        def matvec(self, x):
            return a @ x

        def matmat(self, x):
            return a @ x

        def adjoint(self):
            return self

    for form in (a.to_sparse_csr(), a.to_sparse(), Map()):
        assert gl.spectral_radius(form) == pytest.approx(2.0)
    with pytest.raises(ShapeError, match="square map"):
        gl.spectral_radius(torch.zeros(2, 3).to_sparse_csr())


@pytest.mark.parametrize("method", ["auto", *gl.products.MATMUL])
@pytest.mark.parametrize(("a", "b"), [((3, 5, 7), (7, 9)), ((4, 4), (2, 4, 1)), ((0, 3), (3, 2)), ((2, 0), (0, 2))])
def test_every_product_is_the_product(method, a, b):
    x = random.normal(*a, generator=seeded(12), dtype=torch.float64)
    y = random.normal(*b, generator=seeded(13), dtype=torch.float64)
    tolerance = 3 / 256 if method == "bfloat16" else 1e-13
    assert torch.linalg.norm(gl.matmul(x, y, method=method) - x @ y) <= tolerance * x.norm() * y.norm()


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("shape", [(300, 1030), (2, 1100, 1024), (1024, 1025)], ids=str)
def test_halved_gram_is_the_gram(shape, dtype):
    x = random.normal(*shape, generator=seeded(14), dtype=dtype)
    gram = gl.syrk(x)
    exact = x.double().mT @ x.double()
    assert torch.equal(gram, gram.mT)
    assert torch.linalg.norm(gram - exact) <= shape[-2] * torch.finfo(dtype).eps * torch.linalg.norm(exact)
    x.requires_grad_()
    gl.syrk(x).sum().backward()
    assert x.grad is not None


@untyped()
def test_wrong_arguments_say_what_to_do():
    a = torch.eye(3)
    for error, call in (
        (ShapeError, lambda: gl.matrix_power_scaled(torch.zeros(2, 3), 2)),
        (InputError, lambda: gl.matrix_power_scaled(a, 1e6)),
        (InputError, lambda: gl.product_scaled([])),
        (ShapeError, lambda: gl.product_scaled([a, torch.zeros(2, 2)])),
        (InputError, lambda: gl.svd_shrink(a, -1.0)),
        (InputError, lambda: gl.svd_shrink(a, loss="l1")),
        (InputError, lambda: gl.pca(a, 4)),
        (InputError, lambda: gl.pca([], 0)),
        (DtypeError, lambda: gl.pca(a * math.nan, 1)),
        (ShapeError, lambda: gl.matmul(a, torch.zeros(2, 2))),
        (DtypeError, lambda: gl.matmul(a, a.double())),
        (DtypeError, lambda: gl.spectral_norm("a")),
        (ShapeError, lambda: gl.spectral_density(torch.zeros(2, 3))),
        (InputError, lambda: gl.cond(a, method="qr")),
    ):
        with pytest.raises(error):
            call()


@pytest.mark.parametrize("k", [0, 1, -2, 3])
def test_empty_matrices(k):
    assert gl.matrix_power_scaled(torch.zeros(0, 3, 3), k)[0].shape == (0, 3, 3)
    assert gl.spectral_norm(torch.zeros(2, 0, 3)).tolist() == [0, 0]
    assert gl.spectral_norm(torch.zeros(0, 3, 3)).shape == (0,)
    assert gl.cond(torch.zeros(0, 3, 3)).shape == (0,)
    assert mp_error(gl.svd_shrink(torch.zeros(2, 2)), mp(torch.zeros(2, 2))) == 0
