"""Every function agrees with a higher-precision oracle within its own certificate, tightly and without false alarms."""

from __future__ import annotations

import math
import statistics

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gramian.linalg as gl
from cases import (
    ALL,
    FUNCTIONS,
    HALF,
    SPECTRAL,
    SQUARE,
    WIDE,
    gallery_for,
    hostile,
    hostile_for,
    indefinite,
    lapack_error,
    mp,
    mp_error,
    oracle,
    score,
    score_large,
    score_lowrank,
    seeded,
)
from gramian import random
from gramian.linalg.certificate import RTOL
from gramian.linalg.engine.function import FUNCTIONS as REGISTRY
from gramian.linalg.engine.function import examples


@pytest.mark.parametrize("dtype", [*WIDE, *HALF], ids=str)
@pytest.mark.parametrize("name", [*FUNCTIONS, "spectral_norm", "cond"])
@pytest.mark.parametrize("n", [1, 4, 7])
def test_gallery_in_one_batch_is_within_its_bounds(name, n, dtype):
    function, exact_of, _, needs = ALL[name]
    matrices = gallery_for(needs, n, dtype)
    value, certificate = function(torch.stack([*matrices.values()]))
    assert value.dtype == dtype
    bounds, converged = certificate.error_bound.tolist(), certificate.converged.tolist()
    for (label, a), x, bound, ok in zip(matrices.items(), value, bounds, converged, strict=True):
        exact = exact_of(a) if bool(a.isfinite().all()) else None
        error = mp_error(x, exact)
        assert error <= bound * (1 + 1e-12), label
        if ok:
            assert bound <= RTOL[dtype], label
        if lapack_error(name, a, exact) <= RTOL[dtype] / 100:
            assert ok, label


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_random_hostile_matrices_score(name, dtype):
    silent, ratios, flagged, met = score(name, 31, 24, dtype, RTOL[dtype])
    assert not silent
    if "/" in name:
        return  # a method by name: honest, but neither as tight as auto nor with its reach
    # The ratios spread over five decades, and the median of fifty is 29 to 145 by the kernel's rounding (inv_root_4 in
    # float64): four times as many decide, whatever the first fifty say.
    for seed in (131, 231, 331):
        also_silent, more, *_ = score(name, seed, 24, dtype, RTOL[dtype])
        assert not also_silent
        ratios += more
    assert statistics.median(ratios) <= 100
    # One in a hundred over all the functions; a few dozen matrices of one function allow three.
    assert flagged <= max(3, 0.01 * met)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_no_silent_failure_and_one_false_alarm_in_a_hundred_over_all(dtype):
    scores = [score(name, 52_000, 60, dtype, RTOL[dtype]) for name in FUNCTIONS]
    assert not [s for silent, *_ in scores for s in silent]
    assert all(statistics.median(ratios) <= 100 for _, ratios, _, _ in scores)
    assert sum(flagged for *_, flagged, _ in scores) <= 0.01 * sum(met for *_, met in scores)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(10**6, 2**40),
    name=st.sampled_from(sorted(FUNCTIONS)),
    dtype=st.sampled_from([*WIDE, *HALF]),
    n=st.integers(1, 6),
)
def test_any_hostile_batch_is_within_its_bounds(seed, name, dtype, n):
    function, exact, _, needs = FUNCTIONS[name]
    a = hostile_for(needs, seed, 3, n, n, dtype)
    value, certificate = function(a)
    for x, y, bound in zip(a, value, certificate.error_bound.tolist(), strict=True):
        assert mp_error(y, exact(x) if bool(x.isfinite().all()) else None) <= bound * (1 + 1e-12)


@pytest.mark.parametrize("method", [m for m in REGISTRY["polar"].methods if m != "newton_schulz"])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_every_polar_method_is_within_its_bounds(method, dtype):
    _, exact, *_ = FUNCTIONS["polar"]
    a = hostile(8, 20, 7, 3, dtype, psd=False)
    value, certificate = gl.polar_ex(a, method=method)
    assert set(certificate.method_names) == {method}
    for x, y, bound in zip(a, value, certificate.error_bound.tolist(), strict=True):
        assert mp_error(y, exact(x) if bool(x.isfinite().all()) else None) <= bound * (1 + 1e-12)


DAMPED = [(name, options) for _, name, options in examples() if REGISTRY[name].damped]


@pytest.mark.parametrize(("name", "options"), [*DAMPED, ("inv_root", lambda a: {"p": 1})])
@pytest.mark.parametrize("damping", [1e-12, 1e-3, 1e5])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_damping_is_absolute_and_certified(name, options, damping, dtype):
    m = hostile(21, 12, 5, 5, dtype, psd=True)
    value, certificate = getattr(gl, f"{name}_ex")(m, damping=damping, **options(m))
    for a, x, bound in zip(m, value, certificate.error_bound.tolist(), strict=True):
        exact = oracle(name, a, damping, **options(a)) if bool(a.isfinite().all()) else None
        assert mp_error(x, exact) <= bound * (1 + 1e-12)


def test_damping_may_differ_by_matrix():
    value = gl.inv(torch.ones(2, 1, 1), damping=torch.tensor([1.0, 3.0]))
    assert value.flatten().tolist() == [0.5, 0.25]


@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_inverse_roots_of_any_order(p, dtype):
    spectrum = torch.logspace(0, -6, 6, dtype=torch.float64)
    m = random.with_spectrum(3, 6, 6, spectrum=spectrum, symmetric=True, generator=seeded(3), dtype=dtype)
    value, certificate = gl.inv_root_ex(m, p)
    assert certificate.converged.all()
    for a, x, bound in zip(m, value, certificate.error_bound.tolist(), strict=True):
        assert mp_error(x, oracle("inv_root", a, p=p)) <= bound


@pytest.mark.parametrize("dtype", [*WIDE, *HALF], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 3, 5])
def test_svd_lowrank_excess_is_within_its_bound(rank, dtype):
    a = hostile(77, 12, 7, 5, dtype, psd=False)
    (u, s, v), certificate = gl.svd_lowrank_ex(a, rank)
    assert (u.shape, s.shape, v.shape) == ((12, 7, rank), (12, rank), (12, 5, rank))
    for i, x in enumerate(a):
        if not bool(x.isfinite().all()):
            assert not certificate.converged[i]
            continue
        y = mp(x)
        part = mp(u[i]) * mpmath.diag(mp(s[i, :, None])) * mp(v[i]).T if rank else y * 0
        sigma = FUNCTIONS["svdvals"][1](x)
        optimum = mpmath.sqrt(sum((sigma[j] ** 2 for j in range(rank, 5)), mpmath.mpf(0)))
        size = mpmath.norm(y)
        excess = float((mpmath.norm(y - part) - optimum) / size) if size else 0.0
        assert excess <= certificate.error_bound[i].item() * (1 + 1e-12)
        # float16 holds no singular value near 1e±30.
        assert certificate.converged[i] or dtype == torch.float16


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("shape", [(160, 160), (300, 140), (130, 260)], ids=str)
def test_larger_hostile_matrices_score(shape, dtype):
    for name in SPECTRAL:
        silent, _, flagged, met = score_large(name, 32, 5, shape, dtype, RTOL[dtype])
        assert not silent, name
        assert flagged <= 1 or "/" in name, (name, met)
    for method in ("auto", *gl.lowrank.SVD_LOWRANK):
        silent, _, flagged, met = score_lowrank(32, 5, shape, dtype, RTOL[dtype], method=method)
        assert not silent, method
        assert flagged <= 1 or method == "block_krylov", (method, met)


def test_indefinite_matrices_are_symmetric_and_have_eigenvalues_of_both_signs():
    a = hostile_for("symmetric", 5, 40, 4, 4, torch.float64)
    a = a[a.isfinite().flatten(1).all(1)]
    assert torch.equal(a, a.mT)
    w = torch.linalg.eigvalsh(a)
    negative = w[:, 0] < -1e-3 * w[:, -1]
    assert len(a) / 3 < negative.sum() < 2 * len(a) / 3
    assert torch.allclose(
        torch.linalg.eigvalsh(indefinite(torch.diag(torch.tensor([1.0, 2.0])))), torch.tensor([-2.0, 1.0])
    )
    spoiled = torch.full((2, 2), math.nan)
    assert indefinite(spoiled).isnan().all()


DO_NOT_EXIST = {
    "inverse of a singular matrix": (gl.inv_ex, "rank_deficient"),
    "solution of a singular system": (lambda m: gl.solve_ex(m, torch.ones_like(m)), "rank_deficient"),
    "inverse root of a rank-deficient matrix": (lambda m: gl.inv_root_ex(m @ m.mT, 4), "rank_deficient"),
    "inverse root of an indefinite matrix": (lambda m: gl.inv_root_ex(m - 1.5 * torch.eye(6), 2), "repeated"),
    "root of an indefinite matrix": (lambda m: gl.sqrtm_ex(m - 1.5 * torch.eye(6)), "repeated"),
    "root of an asymmetric matrix": (gl.sqrtm_ex, "kahan"),
    "inverse root of an asymmetric matrix": (lambda m: gl.inv_root_ex(m, 2), "kahan"),
    "polar factor of a rank-deficient matrix": (gl.polar_ex, "rank_deficient"),
    "polar factor of zero": (gl.polar_ex, "zero"),
    "anything of NaN": (gl.polar_ex, "nan"),
}


@pytest.mark.parametrize("what", DO_NOT_EXIST)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_what_does_not_exist_never_converges(what, dtype):
    function, matrix = DO_NOT_EXIST[what]
    _, certificate = function(SQUARE[matrix](6).to(dtype))
    assert not certificate.converged
    assert certificate.error_bound == math.inf
    assert certificate.reasons[0] not in ("none", "the error bound is above rtol")


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_gram_of_few_samples_is_normal_input_to_the_root(dtype):
    x = random.normal(100, 256, generator=seeded(0), dtype=dtype)
    m = gl.syrk(x)
    root = gl.sqrtm(m)
    assert torch.linalg.norm(root @ root - m) <= 1e-6 * torch.linalg.norm(m)
    assert not gl.inv_root_ex(m, 2)[1].converged


def test_partial_isometry_on_the_range():
    a = torch.diag(torch.tensor([2.0, 3.0, 0.0]))
    for method in ("auto", "svd", "svd_refined"):
        assert torch.equal(gl.polar_ex(a, method=method)[0], torch.diag(torch.tensor([1.0, 1.0, 0.0])))


@pytest.mark.parametrize("name", ["polar", "inv_root_2", "inv_root_4", "sqrtm"])
def test_a_small_float64_answer_is_bounded_by_its_next_correction_near_its_error(name):
    silent, ratios, _, met = score(name, 2_370_000, 12, torch.float64, RTOL[torch.float64])
    assert not silent
    assert met > 10
    assert statistics.median(ratios) < 4


@pytest.mark.parametrize("exponent", [-1072, -1020, 0, 900])
def test_a_large_answer_is_scaled_back_within_its_bound(exponent):
    """Without a look at each entry: what overflows is refused, and what becomes subnormal is counted."""
    m = random.normal(256, 256, generator=seeded(3), dtype=torch.float64) + 40 * torch.eye(256, dtype=torch.float64)
    exact, own = gl.inv_ex(m, rtol=1e-13)
    value, certificate = gl.inv_ex(m * 2.0**exponent)
    if exponent == -1072:
        assert not certificate.converged
        return
    wide = value * 2.0 ** min(exponent, 500) * 2.0 ** max(exponent - 500, 0)
    error = torch.linalg.norm(wide - exact) / torch.linalg.norm(exact)
    assert certificate.converged
    assert error <= certificate.error_bound + own.error_bound
