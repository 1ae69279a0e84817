"""Random matrices have the distribution they claim, from the caller's generator and no other."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, stats

from cases import seeded, untyped
from gramian import random
from gramian.errors import DtypeError, InputError, ShapeError

MAKERS = {
    "uniform": lambda *s, **k: random.uniform(*s, **k),
    "normal": lambda *s, **k: random.normal(*s, **k),
    "orthogonal": lambda *s, **k: random.orthogonal(*s, **k),
    "with_spectrum": lambda *s, **k: random.with_spectrum(*s, spectrum=torch.ones(min(s[-2:])), **k),
    "wishart": lambda *s, **k: random.wishart(*s, samples=3, **k),
}


PVALUE = 1e-6
"""The seeds are fixed: that chance fails a test is as good as ruled out, that a wrong law passes too."""


@pytest.mark.parametrize("name", MAKERS)
def test_only_the_callers_generator_is_drawn_from(name):
    state = torch.get_rng_state()
    first = MAKERS[name](2, 4, 4, generator=seeded(1))
    assert torch.equal(first, MAKERS[name](2, 4, 4, generator=seeded(1)))
    assert not torch.equal(first, MAKERS[name](2, 4, 4, generator=seeded(2)))
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(InputError, match=f"{name}: expected generator"):
        MAKERS[name](4, 4)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(3, 3), (2, 0, 4, 4), (0, 0), (1, 1)], ids=str)
def test_shape_and_dtype(name, dtype, shape):
    if name == "uniform" and dtype.is_complex:
        with pytest.raises(DtypeError, match="real floating"):
            MAKERS[name](*shape, generator=seeded(0), dtype=dtype)
        return
    x = MAKERS[name](*shape, generator=seeded(0), dtype=dtype)
    assert (x.shape, x.dtype) == (shape, dtype)


@untyped()
def test_wrong_arguments_say_what_to_do():
    g = seeded(0)
    with pytest.raises(ShapeError, match=r"uniform\(2, 3\), not"):
        random.uniform((2, 3), generator=g)  # type: ignore[arg-type]
    with pytest.raises(DtypeError, match="floating"):
        random.normal(2, generator=g, dtype=torch.int64)
    for call in (
        lambda: random.orthogonal(3, generator=g),
        lambda: random.with_spectrum(3, 2, spectrum=torch.ones(3), generator=g),
        lambda: random.with_spectrum(3, 2, spectrum=torch.ones(2), symmetric=True, generator=g),
        lambda: random.with_spectrum(4, 3, 2, spectrum=torch.ones(3, 2), generator=g),
        lambda: random.wishart(3, 2, samples=4, generator=g),
    ):
        with pytest.raises(ShapeError):
            call()
    with pytest.raises(InputError, match="samples"):
        random.wishart(2, 2, samples=0, generator=g)


def test_entries_follow_their_law():
    u = random.uniform(40, 500, low=-1, high=3, generator=seeded(3), dtype=torch.float64).flatten().numpy()
    assert stats.kstest(u, stats.uniform(-1, 4).cdf).pvalue > PVALUE
    x = random.normal(40, 500, mean=2, std=0.5, generator=seeded(4), dtype=torch.float64).flatten().numpy()
    assert stats.kstest(x, stats.norm(2, 0.5).cdf).pvalue > PVALUE


@pytest.mark.parametrize("shape", [(50, 5, 5), (50, 7, 3), (50, 3, 7)], ids=str)
def test_orthogonal_is_orthonormal_on_the_smaller_side(shape):
    q = random.orthogonal(*shape, generator=seeded(5), dtype=torch.float64)
    small = q if shape[-2] <= shape[-1] else q.mT
    eye = torch.eye(min(shape[1:]), dtype=torch.float64)
    assert (small @ small.mT - eye).abs().max() < 1e-14


@pytest.mark.parametrize("shape", [(20000, 4, 4), (20000, 5, 2), (20000, 2, 5)], ids=str)
def test_orthogonal_has_the_moments_and_marginals_of_haar(shape):
    q = random.orthogonal(*shape, generator=seeded(6), dtype=torch.float64)
    n = max(shape[1:])
    # Each entry squared is Beta(1/2, (n − 1)/2), and its sign is fair.
    entry = q[:, -1, -1]
    assert stats.kstest((entry**2).numpy(), stats.beta(0.5, (n - 1) / 2).cdf).pvalue > PVALUE
    assert abs(entry.mean()) < 4 / math.sqrt(n * 20000)
    assert abs((q**4).mean() - 3 / (n * (n + 2))) < 0.01
    if shape[1] == shape[2]:
        # Without the sign fix the trace is not of mean 0 and variance 1 (Diaconis and Shahshahani).
        trace = q.diagonal(dim1=-2, dim2=-1).sum(-1)
        assert abs(trace.mean()) < 0.03
        assert abs(trace.var() - 1) < 0.05
        assert abs(torch.linalg.det(q).mean()) < 0.03


def test_with_spectrum_has_it():
    s = torch.tensor([[3.0, 2.0, 0.5], [1.0, 1e-3, 0.0]], dtype=torch.float64)
    a = random.with_spectrum(2, 5, 3, spectrum=s, generator=seeded(7), dtype=torch.float64)
    assert (torch.linalg.svdvals(a) - s).abs().max() < 1e-14
    m = random.with_spectrum(2, 3, 3, spectrum=-s, symmetric=True, generator=seeded(7), dtype=torch.float64)
    assert torch.equal(m, m.mT)
    assert (torch.linalg.eigvalsh(m) + s).abs().max() < 1e-14


def test_columns_and_singular_vectors_are_uniform_on_the_sphere():
    # Archimedes: a coordinate of a uniform point on the sphere in three dimensions is uniform on [-1, 1]. So is that of
    # the point turned by any fixed rotation, which is what Haar means.
    q = random.orthogonal(20000, 3, 3, generator=seeded(10), dtype=torch.float64)
    turn = random.orthogonal(3, 3, generator=seeded(11), dtype=torch.float64)
    for sample in (q[:, 0, 0], q[:, 2, 1], (turn @ q)[:, 1, 2], (q @ turn)[:, 2, 0]):
        assert stats.kstest(sample.numpy(), stats.uniform(-1, 2).cdf).pvalue > PVALUE
    one = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    a = random.with_spectrum(20000, 3, 3, spectrum=one, generator=seeded(12), dtype=torch.float64)
    # a = u vᵀ: the norms of a column and of a row are |v₁| and |u₁|, uniform on [0, 1], and independent.
    left, right = a[:, 1, :].norm(dim=-1), a[:, :, 2].norm(dim=-1)
    for sample in (left, right):
        assert stats.kstest(sample.numpy(), stats.uniform(0, 1).cdf).pvalue > PVALUE
    assert abs(torch.corrcoef(torch.stack([left, right]))[0, 1]) < 5 / math.sqrt(20000)


def test_planar_rotations_have_uniform_angles():
    q = random.orthogonal(20000, 2, 2, generator=seeded(13), dtype=torch.float64)
    proper = torch.linalg.det(q) > 0
    assert abs(proper.double().mean() - 0.5) < 5 * 0.5 / math.sqrt(20000)
    for part in (q[proper], q[~proper]):
        angle = torch.atan2(part[:, 1, 0], part[:, 0, 0])
        assert stats.kstest(angle.numpy(), stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > PVALUE


@pytest.mark.parametrize("scale", [1.0, 1.03])
@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_wishart_eigenvalues_follow_marchenko_pastur(ratio, scale):
    d = 400
    m = random.wishart(d, d, samples=int(d / ratio), generator=seeded(8), dtype=torch.float64) * scale
    assert torch.equal(m, m.mT)
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2

    def density(x: float) -> float:
        return math.sqrt(max((high - x) * (x - low), 0)) / (2 * math.pi * ratio * x)

    def below(edge: float) -> float:
        # Substituting x = t² tames the 1/√x edge at ratio 1.
        edge = min(max(edge, low), high)
        return integrate.quad(lambda t: 2 * t * density(t * t) if t else 0.0, math.sqrt(low), math.sqrt(edge))[0]

    w = torch.linalg.eigvalsh(m).tolist()
    distance = max(abs(below(x) - (i + 0.5) / d) for i, x in enumerate(w))
    # Eigenvalues repel each other: their Kolmogorov distance is of the order of log(d)/d, not 1/√d, so that a scale
    # that is 3 % off shows.
    assert (distance < 2 * math.log(d) / (math.pi * d)) == (scale == 1.0)


def test_wishart_of_few_samples_is_deficient():
    m = random.wishart(3, 6, 6, samples=2, generator=seeded(9), dtype=torch.float64)
    assert torch.linalg.matrix_rank(m).tolist() == [2, 2, 2]


def test_uniform_entries_of_narrow_types_stay_below_the_upper_end():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for low, high in ((0, 1), (-1, 0), (-3, -2), (0, 0.1)):
            x = random.uniform(20000, low=low, high=high, generator=seeded(0), dtype=dtype).double()
            assert float(x.max()) < high
            assert float(x.mean()) == pytest.approx((low + high) / 2, abs=0.02)


@pytest.mark.parametrize("shape", [(20000, 3, 3), (20000, 4, 2), (20000, 2, 4)], ids=str)
def test_unitary_matrices_have_the_marginals_of_haar(shape):
    q = random.orthogonal(*shape, generator=seeded(20), dtype=torch.complex128)
    small = q if shape[-2] <= shape[-1] else q.mH
    n = max(shape[1:])
    assert (small @ small.mH - torch.eye(min(shape[1:]))).abs().max() < 1e-14
    # |entry|² is Beta(1, n − 1), its phase uniform and independent of it; also of the last column, which LAPACK's QR
    # leaves real.
    for entry in (q[:, 0, 0], q[:, -1, -1]):
        assert stats.kstest(entry.abs().square().numpy(), stats.beta(1, n - 1).cdf).pvalue > PVALUE
        assert stats.kstest(entry.angle().numpy(), stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > PVALUE
        assert abs(torch.corrcoef(torch.stack([entry.abs(), entry.angle().abs()]))[0, 1]) < 5 / math.sqrt(20000)


def test_the_eigenvalues_of_a_unitary_matrix_have_uniform_phases_that_repel():
    q = random.orthogonal(10000, 2, 2, generator=seeded(21), dtype=torch.complex128)
    phases = torch.linalg.eigvals(q).angle()
    first = phases.gather(-1, torch.randint(2, (10000, 1), generator=seeded(22)))[:, 0]
    assert stats.kstest(first.numpy(), stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > PVALUE
    # Weyl: the density of their difference θ is (1 − cos θ) / 2π.
    gap = (phases[:, 0] - phases[:, 1]).remainder(2 * math.pi)
    assert stats.kstest(gap.numpy(), lambda t: (t - torch.tensor(t).sin().numpy()) / (2 * math.pi)).pvalue > PVALUE


def test_complex_entries_are_circular():
    z = random.normal(40, 500, mean=1 + 0, std=2.0, generator=seeded(23), dtype=torch.complex128).flatten() - 1
    for part in (z.real, z.imag):
        assert stats.kstest(part.numpy(), stats.norm(0, math.sqrt(2)).cdf).pvalue > PVALUE
    assert stats.kstest(z.angle().numpy(), stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > PVALUE


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_the_eigenvalue_gap_of_two_by_two_normal_matrices_is_that_of_wigner(dtype):
    x = random.normal(20000, 2, 2, generator=seeded(24), dtype=dtype)
    gap = torch.linalg.eigvalsh((x + x.mH) / math.sqrt(2)).diff(dim=-1)[:, 0]
    # Exact for n = 2: GOE gaps are Rayleigh, the norm of two normal numbers, GUE gaps Maxwell, that of three.
    law = stats.maxwell if dtype.is_complex else stats.rayleigh
    scale = math.sqrt(2) if dtype.is_complex else 2.0
    assert stats.kstest(gap.numpy(), law(scale=scale).cdf).pvalue > PVALUE


TRACY_WIDOM = {1: (-1.2065335745820, 1.607781034581), 2: (-1.771086807411, 0.8131947928329)}
"""Mean and variance. Bornemann, Markov Processes Relat. Fields 16 (2010), table 9."""


@pytest.mark.parametrize(("beta", "dtype"), [(1, torch.float64), (2, torch.complex128)])
def test_the_largest_eigenvalue_of_wishart_matrices_follows_tracy_and_widom(beta, dtype):
    n, d, count = 60, 45, 1000
    w = torch.linalg.eigvalsh(random.wishart(count, d, d, samples=n, generator=seeded(25), dtype=dtype))[:, -1] * n
    shift = 1 if beta == 1 else 0
    root_n, root_d = (math.sqrt(k - shift / 2) for k in (n, d))  # Johnstone; Ma: their error is O(n^-⅔)
    center, width = (root_n + root_d) ** 2, (root_n + root_d) * (1 / root_n + 1 / root_d) ** (1 / 3)
    edge = (w - center) / width
    mean, variance = TRACY_WIDOM[beta]
    assert abs(edge.mean() - mean) < 5 * math.sqrt(variance / count) + 0.03
    assert abs(edge.var() / variance - 1) < 0.2
    # The law is close to a shifted Gamma of the same three moments (Chiani, J. Multivariate Anal. 129 (2014)).
    skew = {1: 0.29346452408, 2: 0.224084203610}[beta]
    k = 4 / skew**2
    theta = math.sqrt(variance) * skew / 2
    law = stats.gamma(k, loc=mean - k * theta, scale=theta)
    assert stats.kstest((edge - edge.mean() + mean).numpy(), law.cdf).pvalue > 1e-4


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_complex_wishart_matrices_have_the_moments_of_marchenko_and_pastur(ratio):
    d = 200
    w = torch.linalg.eigvalsh(
        random.wishart(d, d, samples=int(d / ratio), generator=seeded(26), dtype=torch.complex128)
    )
    for power, moment in ((1, 1), (2, 1 + ratio), (3, 1 + 3 * ratio + ratio**2)):
        assert abs((w**power).mean() / moment - 1) < 20 / d
