"""What the Krylov routes prove holds on spectra made to mislead them."""

from __future__ import annotations

import math

import pytest
import torch

import gramian.linalg as gl
from cases import WIDE, Map, seeded
from gramian import random
from gramian.errors import ConvergenceError, InputError
from gramian.linalg.engine import escalation, krylov, lowrank_krylov
from kernels import OtherOrder

N = 140
J = torch.arange(1, N + 1, dtype=torch.float64)
SPECTRA = {
    "zero": 0 * J,
    "rank 1": (J == 1).double(),
    "equal": 0 * J + 3,
    "the top repeated, more often than a block is wide": torch.where(J <= 30, 1.0, 0.5 * J**-0.5),
    "a cluster at the top": torch.where(J <= 30, 1 - 1e-6 * J, 0.5),
    "a pair at the top": torch.where(J <= 2, 1 - 1e-7 * J, 0.9),
    "one just above the rest": torch.where(J == 1, 1 + 1e-3, 1.0),
    "slow": J**-0.5,
    "fast": 2.0 ** -(J / 2),
    "linear": 1 - J / (N + 1),
    "two steps": torch.where(J <= 12, 1.0, torch.where(J <= 40, 1e-3, 1e-6)),
    "a cluster at the bottom": torch.where(J > N - 30, 1e-3 * (1 + 1e-6 * J), 1.0),
}

SPECTRA = {name: s.double() for name, s in SPECTRA.items()}


def matrices(dtype, *, rows=170, scale=1.0):
    g = seeded(31)
    parts = [random.with_spectrum(rows, N, spectrum=s, generator=g, dtype=torch.float64) for s in SPECTRA.values()]
    return (torch.stack(parts) * scale).to(dtype)


def unlike(value, exact):
    """Relative error; 0 of two zeros, inf where only one is."""
    return torch.where((exact == 0) & (value == 0), 0.0, ((value - exact).abs() / exact.abs()).nan_to_num(nan=math.inf))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_norms_of_misleading_spectra_are_within_their_bounds(dtype, scale):
    a = matrices(dtype, scale=scale)
    exact = torch.linalg.svdvals(a.double())[:, 0]
    for rtol in (1e-2, 1e-4, 1e-6):
        value, certificate = gl.spectral_norm_ex(a, method="lanczos", rtol=rtol)
        assert (unlike(value.double(), exact) <= certificate.error_bound + 1e-13).all()
        assert certificate.converged.all(), [n for n, c in zip(SPECTRA, certificate.converged, strict=True) if not c]


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize(("scale", "order"), [(1.0, n) for n in (10, 11, 15, 20, 31, 36)] + [(1e30, 15)])
def test_verdicts_on_norms_do_not_depend_on_the_order_of_sums(scale, dtype, order):
    """Converged with every kernel's rounding, and in float64 by far.

    In these orders it was not when blocks kept rows of which nothing but rounding was left (rank 1, float64), and when
    the route did not leave room for the rounding of its answer (equal, float32, the order 20).
    """
    a = matrices(dtype, scale=scale)
    for rtol in (1e-2, 1e-4, 1e-6):
        with OtherOrder(order):
            _, certificate = gl.spectral_norm_ex(a, method="lanczos", rtol=rtol)
        assert certificate.converged.all(), [n for n, c in zip(SPECTRA, certificate.converged, strict=True) if not c]
        # Above 1e-4 the method stops where its bound reaches 0.9 rtol; below, float64's rounding is all there is.
        if dtype == torch.float64 and rtol < 1e-2:
            assert certificate.error_bound.max() < 0.1 * rtol


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_run_past_an_exhausted_space_stays_orthonormal(rank):
    """Its blocks are rounding: what of it lies in the space must not be normalized and kept."""
    a = random.normal(170, rank, generator=seeded(35), dtype=torch.float64)
    a = a @ random.normal(rank, N, generator=seeded(36), dtype=torch.float64)
    a = (a / a.norm())[None]
    start = random.normal(1, 16, N, generator=seeded(37), dtype=torch.float64)
    for order in range(1, 31):
        with OtherOrder(order):
            found = krylov.lanczos(lambda y: krylov.by(krylov.by(y, a.mT), a), start, 9)
        rows = found.rows[0]
        kept = rows.norm(dim=-1).round()
        assert (rows @ rows.mT - torch.diag(kept)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_routes_leave_room_for_the_rounding_of_the_answer(dtype):
    """A route whose error is just below what it was asked for converges, although the answer is rounded after it."""
    exact = torch.tensor([3.1, 1.7], dtype=torch.float64)

    def route(x, *, rtol):
        return escalation.Number(exact, rtol * exact / (1 + rtol), torch.zeros(2, dtype=torch.long))

    everything = torch.ones(2, dtype=torch.bool)
    for rtol in (1e-2, 1e-3):
        _, certificate = escalation.numbers(
            {"edge": route}, ["edge"], rtol, dtype, torch.ones(2, 1, 1), everything, (2,), lambda value, rows: value
        )
        assert certificate.converged.all()
        assert certificate.error_bound.min() > 0.4 * rtol


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("rows", [N, 170])
def test_conditions_of_misleading_spectra_are_within_their_bounds(dtype, rows):
    a = matrices(dtype, rows=rows)
    s = torch.linalg.svdvals(a.double())
    regular = s[:, -1] > 1e-10 * s[:, 0]
    value, certificate = gl.cond_ex(a, method="lanczos", rtol=1e-2)
    exact = s[:, 0] / s[:, -1]
    assert (unlike(value.double(), exact) <= certificate.error_bound + 1e-6)[regular].all()
    assert certificate.converged[s[:, -1] > 1e-8 * s[:, 0]].all()
    assert not certificate.converged[s[:, -1] <= 1e-15 * s[:, 0]].any()


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize(("scale", "rank"), [(1.0, 1), (1.0, 12), (1.0, 30), (1e30, 30), (1e-30, 12)])
def test_excesses_on_misleading_spectra_are_within_their_bounds(dtype, scale, rank):
    a = matrices(dtype, scale=scale)
    wide, s = a.double(), torch.linalg.svdvals(a.double())
    size, optimum = s.norm(dim=-1).clamp_min(2.0**-1000), s[:, rank:].norm(dim=-1)
    for method in ("block_krylov", "auto"):
        (u, d, v), certificate = gl.svd_lowrank_ex(a, rank, method=method, rtol=1e-4)
        missed = (wide - (u.double() * d.double()[:, None]) @ v.double().mT).flatten(1).norm(dim=1)
        assert ((missed - optimum) / size <= certificate.error_bound + 1e-13).all()
    assert certificate.converged.all()


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 15, 16, 17, 18, 33])
def test_krylov_routes_of_tiny_matrices(n, dtype):
    a = random.normal(6, n + 2, n, generator=seeded(32), dtype=torch.float64).to(dtype)
    a[1], a[2, :, 0], a[3] = 0, 0, a[3, :, :1] @ a[3, :1]
    s = torch.linalg.svdvals(a.double())
    for seed in range(3):
        g = seeded(seed)
        value, certificate = gl.spectral_norm_ex(a, method="lanczos", generator=g)
        assert (unlike(value.double(), s[:, 0]) <= certificate.error_bound + 1e-13).all()
        for rank in {1, n // 2, n}:
            (u, d, v), certificate = gl.svd_lowrank_ex(a, rank, method="block_krylov", generator=g)
            missed = (a.double() - (u.double() * d.double()[:, None]) @ v.double().mT).flatten(1).norm(dim=1)
            excess = (missed - s[:, rank:].norm(dim=-1)) / s.norm(dim=-1).clamp_min(2.0**-1000)
            assert (excess <= certificate.error_bound + 1e-13).all()


@pytest.mark.parametrize("name", SPECTRA)
def test_a_run_that_stops_too_early_still_bounds_the_top(name):
    m = torch.diag(SPECTRA[name])[None]
    for seed in range(4):
        for r, steps in ((1, 3), (2, 2), (8, 1), (16, 3), (16, 8)):
            start = random.normal(1, r, N, generator=seeded(seed), dtype=torch.float64)
            found = krylov.lanczos(lambda y: y @ m, start, steps)
            theta = krylov.ritz(found)
            for near in (1.0, 1 + 1e-9, 1.01, 3.0):
                high = krylov.top_bound(found, theta, theta * near, noise=torch.zeros_like(theta))
                assert high >= SPECTRA[name].max()


def test_the_bound_does_not_trust_the_test_to_fall():
    """With blocks of two ‖F E_qᵀ(λ − T)⁻¹E₁‖ can rise fivefold with λ: what is small at one excludes none above."""
    t = [[0.3, 0.0, -1.0, -0.7], [0.0, -2.2, -0.2, -0.2], [-1.0, -0.2, -0.7, -1.1], [-0.7, -0.2, -1.1, 1.1]]
    rows = torch.eye(40, dtype=torch.float64)[None]
    residual = torch.tensor([[-0.7, -2.3], [-0.1, -0.4]], dtype=torch.float64) @ rows[:, 4:6]
    found = krylov.Krylov(rows[:, :4], torch.tensor([t], dtype=torch.float64), residual, 2)
    theta, none = krylov.ritz(found), torch.zeros(1, 2, dtype=torch.float64)
    low, high = krylov.exclusion_ratio(found, theta[:, None] + torch.tensor([[0.1, 0.3]]), none)[0].tolist()
    assert high > 5 * low
    # Were the threshold between the two, an eigenvalue at θ + 0.3 could not be excluded.
    found = found._replace(residual=residual / math.sqrt(low * high))
    assert krylov.exclusion_ratio(found, theta[:, None] + 0.1, none[:, :1]) < 1
    assert krylov.top_bound(found, theta, theta + 0.1, noise=none[:, 0]) > theta + 0.3


@pytest.mark.parametrize("rows", [1030, 64])
def test_products_in_panels_are_the_products(rows):
    x = random.normal(1, rows, 600, generator=seeded(35))
    y = random.normal(1, 16, 600, generator=seeded(36))
    for a in (x, x.mT.contiguous().mT):
        image, back = krylov.forth_and_back(y, a)
        torch.testing.assert_close(image.double(), y.double() @ x.double().mT, rtol=0, atol=1e-3)
        torch.testing.assert_close(back.double(), y.double() @ x.double().mT @ x.double(), rtol=0, atol=5e-2)


@pytest.mark.parametrize("turned", [0.0, 0.01, 0.9, 1.0])
def test_columns_are_orthonormal_however_far_they_were_from_it(turned):
    z = random.normal(2, 300, 6, generator=seeded(37))
    z = torch.linalg.qr(z).Q * torch.logspace(0, -4, 6)
    z[1, :, 5] = (1 - turned) * z[1, :, 5] + turned * z[1, :, 0]
    z[0, :, 2] *= 1 - turned
    q, r = lowrank_krylov._columns(z)
    torch.testing.assert_close(q.mT @ q, torch.eye(6).expand(2, -1, -1), rtol=0, atol=2e-6)
    torch.testing.assert_close(q.double() @ r, z.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("r", [1, 3, 16])
def test_resolvents_are_those_of_the_whole_matrix(r):
    m = random.wishart(90, 90, samples=200, generator=seeded(33), dtype=torch.float64)
    found = krylov.lanczos(lambda y: y @ m, random.normal(2, r, 90, generator=seeded(34), dtype=torch.float64), 4)
    top = krylov.ritz(found)
    at = top[:, None] * torch.tensor([0.9, 1.001, 1.5])
    solved, above = krylov.resolvent(found, at)
    eye = torch.eye(4 * r, dtype=torch.float64)
    exact = torch.linalg.inv(at[..., None, None] * eye - found.t[:, None])[..., :r]
    assert above.tolist() == [[False, True, True]] * 2
    assert (solved - exact)[above].norm() <= 1e-10 * exact[above].norm()


@pytest.mark.parametrize("outside", [0.0, 0.3, 0.9, 1.1])
def test_sums_of_the_largest_eigenvalues_are_bounded(outside):
    """Of [[T, Rᵀ], [R, C]], for every C of that norm; and tightly, to second order in R."""
    p, k = 30, 8
    for seed in range(20):
        g = seeded(seed)
        t = torch.diag(torch.linspace(1.5, 0.5, p, dtype=torch.float64))
        r = 0.03 * random.normal(p, p, generator=g, dtype=torch.float64)
        c = random.with_spectrum(
            p, p, spectrum=outside * torch.rand(p, generator=g).double(), symmetric=True, generator=g, dtype=t.dtype
        )
        norm = float(torch.linalg.matrix_norm(c, 2))
        whole = torch.cat([torch.cat([t, r.mT], 1), torch.cat([r, c], 1)])
        exact = torch.linalg.eigvalsh(whole)
        highest = torch.tensor([math.inf, float(exact[-1])], dtype=t.dtype)
        tensor = torch.tensor([norm, norm], dtype=t.dtype)
        most, capped = lowrank_krylov.leading_sum_bound(
            t.expand(2, -1, -1), (r.mT @ r).expand(2, -1, -1), tensor, highest, k
        )
        assert exact[-k:].sum() <= capped + 1e-12
        assert capped <= most
        if outside <= 0.3:
            second = sum(float(r[:, j].norm() ** 2 / (t[j, j] - norm)) for j in range(k))
            assert most - t.diagonal()[:k].sum() <= 2 * second


WRAPS = {"map": Map, "csr": lambda a: a.to_sparse_csr(), "coo": lambda a: a.to_sparse()}


@pytest.mark.parametrize(
    ("scale", "wrap"), [*((1.0, wrap) for wrap in WRAPS), (1e30, "map"), (1e30, "csr"), (1e-30, "coo")]
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_low_rank_of_maps_and_sparse_matrices_is_within_its_bound(wrap, scale):
    a = matrices(torch.float64, scale=scale)
    for name, x in zip(SPECTRA, a, strict=True):
        s = torch.linalg.svdvals(x)
        for rank in (1, 12):
            for form in (x, x.mT)[: 1 + (scale == 1)]:
                (u, d, v), certificate = gl.svd_lowrank_ex(WRAPS[wrap](form), rank)
                assert (u.shape, d.shape, v.shape) == ((form.shape[0], rank), (rank,), (form.shape[1], rank))
                missed = (form - (u * d) @ v.mT).norm()
                excess = (missed - s[rank:].norm()) / s.norm().clamp_min(2.0**-1000)
                assert excess <= certificate.error_bound + 1e-13, name
                assert certificate.converged, name
                if s.norm():
                    assert certificate.residual == pytest.approx(float(missed / s.norm()), rel=0.2, abs=1e-5)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_low_rank_of_a_sparse_matrix_agrees_with_scipy():
    sparse = pytest.importorskip("scipy.sparse")
    linalg = pytest.importorskip("scipy.sparse.linalg")
    theirs = sparse.random(900, 700, density=0.01, random_state=3, format="csr")
    csr = torch.sparse_csr_tensor(*map(torch.from_numpy, (theirs.indptr, theirs.indices, theirs.data)), theirs.shape)
    for dtype in WIDE:
        a = csr.to(dtype)
        (u, s, v), certificate = gl.svd_lowrank_ex(a, 5, rtol=1e-5)
        assert certificate.converged
        assert u.dtype == s.dtype == v.dtype == dtype
        best = torch.from_numpy(linalg.svds(theirs, k=5, return_singular_vectors=False).copy()).sort(descending=True)[0]
        assert (s.double() <= best * (1 + 1e-6)).all()
        whole = a.to_dense().double()
        missed, optimum = (
            (whole - (u * s).double() @ v.mT.double()).norm(),
            (whole.norm() ** 2 - best.norm() ** 2).sqrt(),
        )
        assert (missed - optimum) / whole.norm() <= certificate.error_bound + 1e-7


def test_low_rank_of_a_float32_map():
    a = matrices(torch.float32)
    for x in a[[name in ("slow", "linear", "equal") for name in SPECTRA]]:
        (u, d, v), certificate = gl.svd_lowrank_ex(Map(x), 12)
        optimum = torch.linalg.svdvals(x.double())[12:].norm()
        assert certificate.converged
        assert u.dtype == torch.float32
        missed = (x.double() - (u.double() * d.double()) @ v.double().mT).norm()
        assert (missed - optimum) / x.double().norm() <= certificate.error_bound


def test_low_rank_of_bad_maps_says_so():
    a = matrices(torch.float64)[8].clone()
    a[3, 4] = math.nan
    for form in (Map(a), a.to_sparse_csr()):
        (u, _, _), certificate = gl.svd_lowrank_ex(form, 2)
        assert certificate.reasons == ["the matrix holds NaN or inf"]
        assert u.isnan().all()
        with pytest.raises(ConvergenceError, match="NaN"):
            gl.svd_lowrank(form, 2)
    with pytest.raises(InputError, match="to_dense"):
        gl.svd_lowrank(Map(a), 2, method="svd")
    with pytest.raises(InputError, match="integer rank"):
        gl.svd_lowrank(Map(a), N + 1)
    for shape in ((0, 3), (4, 2)):
        u, s, v = gl.svd_lowrank(Map(torch.ones(shape)), 0)
        assert (u.shape, s.shape, v.shape) == ((shape[0], 0), (0,), (shape[1], 0))
