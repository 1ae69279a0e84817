"""What a few products say of a matrix is within its stated error, and the operator norms of convolutions are theirs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from gramian.bench.healthy import score_alarms, score_quick, score_spikes
from gramian.errors import InputError, ShapeError
from gramian.inspection import describe, describe_quickly
from gramian.inspection.weights.convolution import conv_norm, conv_norm_circular
from gramian.inspection.weights.quadrature import sample_spectrum


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_quick_numbers_are_within_their_errors():
    """On seeds of neither range that benchmarks/inspect_calibration.py uses."""
    for score in score_quick(range(7_000, 7_040)).values():
        assert score.count == score.cases, score.which


@pytest.mark.slow
def test_alarms_are_rare_and_spikes_are_found():
    scores = score_alarms(range(7_000, 7_120))
    assert scores["alarms"].count <= 1, scores["alarms"].which
    assert scores["structure"].count <= 1, scores["structure"].which
    spikes = score_spikes(range(7_000, 7_060))
    assert spikes.count == spikes.cases, spikes.which


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(700, 300), (300, 700)])
def test_dtypes_and_orientations(dtype, shape):
    w = normal(*shape).to(dtype)
    quick, full = describe_quickly(w), describe(w)
    assert quick.shape == shape
    assert abs(quick.spectral_norm - full.spectral_norm) <= quick.spectral_norm_error
    assert quick.frobenius_norm == pytest.approx(full.frobenius_norm, rel=1e-6)
    assert quick.entries == full.entries
    assert quick.condition is None
    assert quick.noise is None


@pytest.mark.parametrize("exponent", [-120, 120])
def test_scale_changes_nothing_but_the_norms(exponent):
    w = normal(400, 300)
    here, there = describe_quickly(w), describe_quickly(w * 2.0**exponent)
    assert there.spectral_norm == pytest.approx(here.spectral_norm * 2.0**exponent, rel=1e-5)
    for a, b in zip(there.energy_ranks, here.energy_ranks, strict=True):
        assert a == pytest.approx(b, abs=2)


def test_small_matrices_are_exact_and_bad_ones_described():
    assert describe_quickly(normal(300, 256)).method == "gram"
    assert describe_quickly(torch.zeros(400, 300)).spectral_norm == 0.0
    w = normal(400, 300)
    w[3, 4] = math.nan
    assert describe_quickly(w).num_nonfinite == 1
    rank_one = describe_quickly(torch.ones(400, 300))
    assert rank_one.spectral_norm == pytest.approx(math.sqrt(120_000), rel=5e-6)
    assert rank_one.energy_ranks[0][0] == 1
    assert rank_one.energy_ranks[1][1] <= 2


def test_lanczos_is_exact_once_it_fills_the_space():
    w = normal(40, 30).double()
    sampled = sample_spectrum(w, 16, 10)
    exact = torch.linalg.svdvals(w).square()
    torch.testing.assert_close(sampled.values, exact)
    start = torch.randn(30, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(sampled.weights.sum(0), start.square().sum(0))


# ---- convolutions --------------------------------------------------------------------------------------------------

CASES = [
    ({}, (3, 3), 1),
    ({"stride": 2, "padding": 1}, (3, 3), 1),
    ({"padding": 2, "dilation": 2}, (3, 3), 1),
    ({"groups": 2}, (3, 3), 2),
    ({"padding": 0}, (2, 3), 1),
    ({"padding": "valid"}, (1, 1), 1),
]


@pytest.mark.parametrize(("options", "kernel", "groups"), CASES)
def test_the_norm_is_that_of_the_dense_operator(options, kernel, groups):
    weight = normal(6, 4 // groups, *kernel)
    images = torch.eye(4 * 56).view(-1, 4, 7, 8)
    dense = functional.conv2d(images, weight, **({"padding": "same"} | options)).flatten(1)
    value, error = conv_norm(weight, (7, 8), **options)
    exact = float(torch.linalg.matrix_norm(dense.double(), 2))
    assert value == pytest.approx(exact, rel=1e-2)
    assert value <= exact * (1 + 1e-5)
    assert exact <= (value + error) * (1 + 1e-5)


@pytest.mark.parametrize("groups", [1, 4])
def test_the_norm_of_a_convolution_of_a_few_places(groups):
    weight, images = normal(8, 4 // groups, 3, 3), torch.eye(4 * 6).view(-1, 4, 2, 3)
    dense = functional.conv2d(images, weight, padding=1, groups=groups).flatten(1)
    value, error = conv_norm(weight, (2, 3), padding=1, groups=groups)
    exact = float(torch.linalg.matrix_norm(dense.double(), 2))
    assert value * (1 - 1e-5) <= exact <= (value + error) * (1 + 1e-5)


def test_circular_padding_is_the_transform():
    conv = nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular", bias=False)
    images = torch.eye(3 * 48).view(-1, 3, 6, 8)
    dense = conv(images).detach().flatten(1)
    exact = float(torch.linalg.matrix_norm(dense.double(), 2))
    assert conv_norm_circular(conv.weight.detach(), (6, 8)) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales(scale):
    weight = normal(4, 4, 3, 3)
    assert conv_norm(weight * scale, (6, 6))[0] == pytest.approx(conv_norm(weight, (6, 6))[0] * scale, rel=1e-5)


def test_bad_kernels():
    assert conv_norm(torch.zeros(2, 2, 3, 3), (5, 5)) == (0.0, 0.0)
    with pytest.raises((ShapeError, TypeError)):
        conv_norm(torch.ones(3, 3), (5, 5))
    with pytest.raises(ShapeError):
        conv_norm(torch.ones(2, 2, 9, 9), (5, 5), padding=0)
    with pytest.raises(InputError):
        conv_norm(torch.ones(2, 2, 3, 3), (5, 5), stride=2)
