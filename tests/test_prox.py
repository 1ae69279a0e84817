"""Every proximal map is the minimizer that defines it; zeros, ranks and bounds come out exact."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from cases import DEVICES, seeded, untyped
from gramian import prox, random
from gramian.errors import GramianError

PENALTIES = {
    "l1": prox.L1(0.7),
    "l2": prox.L2(0.7),
    "elastic_net": prox.ElasticNet(0.4, 0.6),
    "nuclear": prox.Nuclear(0.7),
    "spectral_norm": prox.SpectralNorm(1.1),
    "orthogonal": prox.Orthogonal(0.7),
}
STEPS = (0.0, 0.1, 1.0, 5.0)


def matrices(*shape: int, seed: int = 0) -> Tensor:
    return random.normal(*shape, generator=seeded(seed), dtype=torch.float64)


def objective(penalty: prox.Penalty, x: Tensor, w: Tensor, step: float) -> Tensor:
    value = 0.5 * (x - w).square().sum()
    # A constraint holds whatever the step; 0 · ∞ is no number.
    weight = 1.0 if isinstance(penalty, prox.SpectralNorm) else step
    return value + weight * penalty.penalty(x)


def test_the_table_is_the_family() -> None:
    assert set(PENALTIES) == set(prox.PROX)
    assert all(type(PENALTIES[name]) is prox.PROX[name] for name in PENALTIES)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", PENALTIES)
def test_nothing_near_or_far_is_lower(name: str, step: float, device: str) -> None:
    """The definition: no x has a lower step·penalty(x) + ½‖x − w‖², among thousands, close by and at random."""
    penalty, w = PENALTIES[name], matrices(4, 3).to(device)
    best = penalty.prox(w, step)
    lowest = objective(penalty, best, w, step)
    assert lowest.isfinite()
    for size, seed in itertools.product((1e-6, 1e-4, 1e-2, 1.0), range(200)):
        x = best + size * matrices(4, 3, seed=seed + 1).to(device)
        assert objective(penalty, x, w, step) >= lowest - 1e-12


@pytest.mark.parametrize("step", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("name", ["l2", "orthogonal"])
def test_the_smooth_ones_agree_with_a_numerical_minimizer(name: str, step: float) -> None:
    penalty, w = PENALTIES[name], matrices(4, 3)

    def value_and_gradient(flat):
        x = torch.tensor(flat, dtype=torch.float64).reshape(4, 3).requires_grad_()
        value = objective(penalty, x, w, step)
        return value.item(), torch.autograd.grad(value, x)[0].flatten().numpy()

    found = minimize(value_and_gradient, w.flatten().numpy(), jac=True, method="BFGS", options={"gtol": 1e-11})
    torch.testing.assert_close(penalty.prox(w, step).flatten(), torch.tensor(found.x), atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", ["l1", "elastic_net", "nuclear", "spectral_norm"])
def test_the_convex_ones_meet_their_optimality_conditions(name: str) -> None:
    """(w − x)/step is a subgradient of the penalty at x."""
    penalty, w, step = PENALTIES[name], 2 * matrices(6, 4), 0.9
    x = penalty.prox(w, step)
    g = (w - x) / step
    if name in ("l1", "elastic_net"):
        strength, ridge = (penalty.strength, 0.0) if name == "l1" else (penalty.l1, penalty.l2)
        zero = x == 0
        assert 0 < zero.sum() < zero.numel()
        assert ((g - ridge * x)[zero].abs() <= strength).all()
        torch.testing.assert_close((g - ridge * x)[~zero], strength * x[~zero].sign())
    elif name == "nuclear":  # ⟨g, x⟩ = λ‖x‖_* and ‖g‖₂ ≤ λ
        torch.testing.assert_close((g * x).sum(), penalty.penalty(x))
        assert torch.linalg.matrix_norm(g, 2) <= penalty.strength * (1 + 1e-12)
    else:  # normal cone: ⟨g, x⟩ = bound · ‖g‖_*
        torch.testing.assert_close((g * x).sum(), penalty.bound * torch.linalg.matrix_norm(g, "nuc"))
        assert penalty.penalty(x) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ranks_are_exact(dtype: torch.dtype) -> None:
    spectrum = torch.tensor([5.0, 3.0, 1.0, 0.4, 0.2, 0.0], dtype=torch.float64)
    w = random.with_spectrum(9, 6, spectrum=spectrum, generator=seeded(0), dtype=dtype)
    for strength, rank in ((0.1, 5), (0.3, 4), (2.0, 2), (6.0, 0)):
        x = prox.Nuclear(strength).prox(w, 1.0)
        assert torch.linalg.matrix_rank(x) == rank
        expected = (spectrum - strength).clamp_min(0).to(dtype)
        torch.testing.assert_close(torch.linalg.svdvals(x), expected, atol=8 * torch.finfo(dtype).eps * 5, rtol=0)


def test_orthogonal_tends_to_the_polar_factor() -> None:
    w = matrices(7, 4)
    u, _, vt = torch.linalg.svd(w, full_matrices=False)
    torch.testing.assert_close(prox.Orthogonal(1.0).prox(w, 1e9), u @ vt, atol=1e-8, rtol=0)
    flat = prox.Orthogonal(1.0).prox(torch.zeros(3, 3, dtype=torch.float64), 1.0)  # the cubic's triple root
    assert flat.abs().max() < 1e-15


@pytest.mark.parametrize("name", PENALTIES)
def test_leading_dimensions_are_a_batch(name: str) -> None:
    penalty, w = PENALTIES[name], matrices(2, 3, 5, 4)
    together = penalty.prox(w, 0.5)
    for i, j in itertools.product(range(2), range(3)):
        torch.testing.assert_close(together[i, j], penalty.prox(w[i, j], 0.5), atol=1e-13, rtol=0)
    values = penalty.penalty(w)
    assert values.shape == ((2, 3) if penalty.of_matrix else ())


@pytest.mark.parametrize("name", PENALTIES)
def test_hostile_input(name: str) -> None:
    """NaN stays NaN and harms no neighbor; empty and tiny and huge are themselves."""
    penalty, w = PENALTIES[name], matrices(3, 4, 4)
    clean = penalty.prox(w, 0.5)
    w[1, 2, 2] = torch.nan
    mixed = penalty.prox(w, 0.5)
    assert mixed[1].isnan().any()
    torch.testing.assert_close(mixed[[0, 2]], clean[[0, 2]], atol=1e-13, rtol=0)
    assert penalty.prox(torch.zeros(2, 0, 3), 0.5).shape == (2, 0, 3)
    for scale in (1e-30, 1e30):
        assert penalty.prox(clean * scale, 0.5).isfinite().all()
    assert penalty.prox(clean.to(torch.bfloat16), 0.5).dtype == torch.bfloat16
    assert penalty.prox(w[0], 0.0).sub(w[0]).abs().max() < 1e-14 or name == "spectral_norm"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: prox.L1(-1.0), "strength ≥ 0"),
        (lambda: prox.ElasticNet(1.0, float("nan")), "l2 ≥ 0"),
        (lambda: prox.SpectralNorm(-1.0), "bound ≥ 0"),
        (lambda: prox.L2(1.0, form="both"), "'decoupled' or 'coupled'"),
        (lambda: prox.L1(1.0).prox(torch.ones(2), -1.0), "step ≥ 0"),
        (lambda: prox.L1(1.0).prox(torch.ones(2, dtype=torch.int64), 1.0), "floating dtype"),
        (lambda: prox.Nuclear(1.0).prox(torch.ones(2), 1.0), "expected matrices"),
        (lambda: prox.Orthogonal(1.0).penalty(torch.ones(2)), "expected matrices"),
    ],
)
def test_refusals_say_why(call, says: str) -> None:
    with untyped(), pytest.raises(GramianError, match=says):
        call()


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (3, 3), (2, 4, 3)])
@pytest.mark.parametrize("name", PENALTIES)
def test_proximal_maps_have_derivatives(name: str, shape: tuple[int, ...]) -> None:
    """Those of a spectrum returned a value without a graph: an unrolled proximal method did not learn."""
    penalty, w = PENALTIES[name], matrices(*shape).requires_grad_()
    for step in (0.3, 3.0):
        assert torch.autograd.gradcheck(lambda x, t=step: penalty.prox(x, t), (w,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: penalty.prox(x, 0.3), (w,))


def test_derivatives_of_proximal_maps_at_ties_and_where_there_is_none() -> None:
    for name in ("nuclear", "spectral_norm", "orthogonal"):
        equal = (2 * torch.eye(3, dtype=torch.float64)).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, name=name: PENALTIES[name].prox(x, 0.3), (equal,))
    zero = torch.zeros(3, 3, requires_grad=True)
    with pytest.raises(GramianError, match="no derivative where a singular value is zero"):
        torch.autograd.grad(PENALTIES["orthogonal"].prox(zero, 5.0).sum(), zero)
