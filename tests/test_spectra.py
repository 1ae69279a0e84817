"""The numbers of one matrix agree with a float64 SVD, at any scale, and nothing in a matrix makes them raise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gramian.errors import DtypeError, ShapeError
from gramian.inspection.weights import spectra
from gramian.inspection.weights.spectra import GRAM_FLOOR, Spectrum, describe

EPS = torch.finfo(torch.float64).eps


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def with_singular_values(sigma: Tensor, m: int, seed: int = 0) -> Tensor:
    n = len(sigma)
    u, v = torch.linalg.qr(normal(m, n, seed=seed)).Q, torch.linalg.qr(normal(n, n, seed=seed + 1)).Q
    return (u * sigma.double()) @ v.mT


def hilbert(n: int) -> Tensor:
    i = torch.arange(n, dtype=torch.float64)
    return 1 / (i[:, None] + i + 1)


def kahan(n: int) -> Tensor:
    s, c = math.sin(1.2), math.cos(1.2)
    return torch.diag(s ** torch.arange(n, dtype=torch.float64)) @ (
        torch.eye(n).double() - c * torch.ones(n, n).triu(1)
    )


MATRICES = {
    "gaussian": normal(60, 40),
    "wide": normal(40, 60),
    "square": normal(50, 50),
    "row": normal(1, 30),
    "column": normal(30, 1),
    "scalar": normal(1, 1),
    "identity": torch.eye(20).double(),
    "rank one": normal(30, 1) @ normal(1, 20, seed=1),
    "rank five": normal(80, 5) @ normal(5, 40, seed=1),
    "zero rows": torch.cat((normal(20, 30), torch.zeros(20, 30).double())),
    "one entry": torch.zeros(10, 7)
    .double()
    .index_put((torch.tensor([3]), torch.tensor([2])), torch.tensor(5.0).double()),
    "hilbert": hilbert(12),
    "kahan": kahan(40),
    "condition 1e3": with_singular_values(torch.logspace(0, -3, 40), 60),
    "condition 1e8": with_singular_values(torch.logspace(0, -8, 40), 60),
    "condition 1e16": with_singular_values(torch.logspace(0, -16, 40), 60),
    "spike": normal(60, 40) + 1e3 * normal(60, 1, seed=1) @ normal(1, 40, seed=2),
}


@pytest.fixture(params=MATRICES.values(), ids=list(MATRICES))
def matrix(request: pytest.FixtureRequest) -> Tensor:
    return request.param


def check_against_svd(w: Tensor, spectrum: Spectrum, scale: float = 1.0) -> None:
    exact = torch.linalg.svdvals(w.double())
    got = torch.tensor(spectrum.singular_values, dtype=torch.float64) / scale
    noise = 10 * max(w.shape) * EPS * float(exact[0])  # what a float64 SVD does not know either
    assert (got.diff() <= 0).all()
    assert ((got - exact).abs() <= 1e-6 * exact + noise).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_singular_values_are_those_of_a_float64_svd(matrix: Tensor, dtype: torch.dtype) -> None:
    w = matrix.to(dtype)
    check_against_svd(w, describe(w))


@pytest.mark.parametrize("exponent", [-1000, -300, -100, 100, 300, 900])
def test_scale_changes_nothing_but_the_norms(matrix: Tensor, exponent: int) -> None:
    scale = 2.0**exponent
    here, there = describe(matrix), describe(matrix * scale)
    # entries that fall out of range make another matrix: leave them out
    if ((matrix * scale) / scale).equal(matrix):
        check_against_svd(matrix, there, scale)
        for name in ("condition", "stable_rank", "effective_rank", "numerical_rank"):
            assert getattr(there, name) == getattr(here, name), name


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales_of_float32(scale: float) -> None:
    w = (normal(50, 40) * scale).float()
    check_against_svd(w.double() / scale, describe(w), scale)


@pytest.mark.parametrize("n", [32, 200])
def test_the_floor_of_the_gram_route_is_where_its_error_reaches_a_millionth(n: int) -> None:
    # the hardest case: many values at the top spread their rounding over one at the floor
    errors = []
    for seed in range(5):
        sigma = torch.ones(n, dtype=torch.float64)
        sigma[-n // 4 :] = 3 * GRAM_FLOOR
        sigma[-1] = 1.1 * GRAM_FLOOR
        w = with_singular_values(sigma, n, seed=seed)
        spectrum = describe(w)
        assert spectrum.method == "gram"
        exact = torch.linalg.svdvals(w)
        errors.append(float((torch.tensor(spectrum.singular_values).double() / exact - 1).abs().max()))
        below = describe(with_singular_values(sigma.index_fill(0, torch.tensor(n - 1), GRAM_FLOOR / 2), n))
        assert below.method == "gram+inverse"
    assert 1e-9 < max(errors) < 1e-6


@pytest.mark.parametrize("smallest", [1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize("m", [96, 300])
def test_a_few_small_values_are_found_by_inverse_iteration(m: int, smallest: float) -> None:
    sigma = torch.cat((torch.linspace(1, 0.1, 93, dtype=torch.float64), torch.tensor([9.0, 3.0, 1.0]) * smallest))
    w = with_singular_values(sigma, m)
    spectrum = describe(w)
    assert spectrum.method == "gram+inverse"
    check_against_svd(w, spectrum)


def test_slices_change_nothing(matrix: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = describe(matrix)
    monkeypatch.setattr(spectra, "SLICE", 100)
    parts = describe(matrix)
    check_against_svd(matrix, parts)
    assert (parts.num_zeros, parts.overflows, parts.underflows) == (whole.num_zeros, whole.overflows, whole.underflows)
    assert parts.numerical_rank == whole.numerical_rank


def test_layout_in_memory_changes_nothing(matrix: Tensor) -> None:
    strided = torch.empty(*matrix.mT.shape, 2, dtype=matrix.dtype)[..., 0].copy_(matrix.mT).mT
    check_against_svd(matrix, describe(strided))
    flipped = describe(matrix.mT)
    assert flipped.shape == (matrix.shape[1], matrix.shape[0])
    check_against_svd(matrix, flipped)


def test_a_tall_matrix_is_never_copied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float64:
                largest = max(largest, out.numel())
            return out

    monkeypatch.setattr(spectra, "SLICE", 1000)
    for rank, method in ((8, "gram"), (4, "qr")):
        w = (normal(5000, rank) @ normal(rank, 8, seed=1)).float()
        with Watch():
            assert describe(w).method == method
    assert largest <= 2000


# ---- what follows from the singular values -------------------------------------------------------------------------


def test_derived_numbers_are_their_definitions(matrix: Tensor) -> None:
    spectrum, sigma = describe(matrix), torch.linalg.svdvals(matrix)
    p = (sigma / sigma.norm()).square()
    entropy = -sum(float(x) * math.log(float(x)) for x in p if x > 0)
    assert spectrum.frobenius_norm == pytest.approx(float(matrix.norm()), rel=1e-12)
    assert spectrum.spectral_norm == pytest.approx(float(sigma[0]), rel=1e-12)
    assert spectrum.stable_rank == pytest.approx(float(matrix.norm() / sigma[0]) ** 2, rel=1e-9)
    assert spectrum.effective_rank == pytest.approx(math.exp(entropy), rel=1e-9)
    assert spectrum.numerical_rank == int(torch.linalg.matrix_rank(matrix))
    if spectrum.condition is None:
        assert sigma[-1] <= 2 * max(matrix.shape) * EPS * sigma[0]
        assert any("singular" in note for note in spectrum.notes)
    else:
        assert spectrum.condition == pytest.approx(float(sigma[0] / sigma[-1]), rel=1e-6, abs=float(EPS / p[-1]))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**20), st.floats(-30, 30))
@settings(max_examples=60, deadline=None)
def test_ranks_are_ordered(m: int, n: int, seed: int, log_scale: float) -> None:
    w = normal(m, n, seed=seed) * 10**log_scale
    s = describe(w)
    assert s.stable_rank is not None
    assert s.effective_rank is not None
    assert s.numerical_rank is not None
    slack = 1 + 1e-9
    assert (
        1 <= s.stable_rank * slack <= s.effective_rank * slack**2 <= s.numerical_rank * slack**3 <= min(m, n) * slack**3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 5, 40])
def test_rounding_is_not_rank(dtype: torch.dtype, rank: int) -> None:
    w = normal(300, rank) @ normal(rank, 200, seed=1) / rank**0.5
    assert describe(w.to(dtype)).numerical_rank == rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_wide_gaussian_keeps_its_rank(dtype: torch.dtype) -> None:
    assert describe(normal(300, 200).to(dtype)).numerical_rank == 200


# ---- what may be wrong with the entries ----------------------------------------------------------------------------

BROKEN = {
    "nan": [math.nan],
    "inf": [math.inf],
    "minus inf": [-math.inf],
    "all": [math.nan, math.inf, -math.inf, math.nan],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("values", BROKEN.values(), ids=list(BROKEN))
def test_entries_that_are_not_finite_leave_counts_only(values: list[float], dtype: torch.dtype) -> None:
    w = normal(8, 9).to(dtype)
    w.view(-1)[: len(values)] = torch.tensor(values).to(dtype)
    w[4, 4] = 0.0
    s = describe(w)
    assert (s.num_nonfinite, s.num_zeros) == (len(values), 1)
    assert s.singular_values == ()
    assert (s.frobenius_norm, s.spectral_norm, s.condition, s.stable_rank) == (None,) * 4
    assert (s.effective_rank, s.numerical_rank) == (None, None)
    assert "not finite" in s.notes[0]


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (1, 1), (0, 4), (4, 0), (0, 0)])
def test_zero_and_empty_matrices(shape: tuple[int, int]) -> None:
    s = describe(torch.zeros(shape))
    assert s.singular_values == (0.0,) * min(shape)
    assert (s.frobenius_norm, s.spectral_norm, s.numerical_rank) == (0.0, 0.0, 0)
    assert (s.condition, s.stable_rank, s.effective_rank) == (None, None, None)
    assert s.num_zeros == math.prod(shape)
    assert s.shape == shape
    assert s.notes


def test_entries_out_of_range_are_counted_as_casts_would_lose_them() -> None:
    w = torch.tensor([[1.0, 65504.0, 65519.0, 65520.0, -1e6], [3e-8, 2.0**-25, 1e-8, 0.0, -1e-30]])
    s = describe(w)
    assert s.overflows == {"float16": 2, "bfloat16": 0}
    assert s.underflows == {"float16": 3, "bfloat16": 0}
    s = describe(w.double() * 1e39)
    assert s.overflows["bfloat16"] == 5
    assert describe(torch.full((1, 2), torch.finfo(torch.float32).max)).overflows["bfloat16"] == 2


@given(st.lists(st.floats(width=64), min_size=6, max_size=6), st.booleans())
@settings(max_examples=150, deadline=None)
def test_nothing_in_a_matrix_raises_and_every_number_is_finite(entries: list[float], tall: bool) -> None:
    w = torch.from_numpy(np.array(entries).reshape((3, 2) if tall else (2, 3)))
    s = describe(w)
    numbers = (s.frobenius_norm, s.spectral_norm, s.condition, s.stable_rank, s.effective_rank, *s.singular_values)
    assert all(math.isfinite(x) for x in numbers if x is not None)
    assert s.num_nonfinite == sum(not math.isfinite(x) for x in entries)
    assert s.spectral_norm is not None or s.notes


def test_a_failure_of_lapack_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Tensor) -> Tensor:
        raise torch.linalg.LinAlgError("did not converge")  # pyright: ignore[reportPrivateImportUsage]

    monkeypatch.setattr(torch.linalg, "eigvalsh", fail)
    s = describe(torch.eye(3))
    assert s.singular_values == ()
    assert "did not converge" in s.notes[0]


def test_what_is_not_a_matrix_of_numbers_is_refused() -> None:
    for shape in ((), (3,), (2, 3, 4)):
        with pytest.raises((ShapeError, TypeError)):
            describe(torch.ones(shape))
    for dtype in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises((DtypeError, TypeError)):
            describe(torch.ones(3, 3).to(dtype))


def test_gradients_are_not_recorded() -> None:
    w = torch.nn.Parameter(torch.eye(3))
    assert describe(w).singular_values == (1.0, 1.0, 1.0)
    assert w.grad is None
