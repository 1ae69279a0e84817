"""Depth: the critical point of activations, and what isometric_ reaches over many layers or puts back."""

from __future__ import annotations

import math

import pytest
import scipy.integrate
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import seeded
from gramian.errors import GramianWarning
from gramian.init import activation_gain, isometric_
from gramian.init.gains import point_of
from test_init import Functional, digits, stack

ACTIVATIONS = [
    nn.ReLU(), nn.LeakyReLU(0.2), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.ELU(), nn.SELU(), nn.CELU(2.0),
    nn.Softplus(), nn.Sigmoid(), nn.Hardsigmoid(), nn.Hardswish(), nn.LogSigmoid(), nn.ReLU6(), nn.Hardshrink(),
    nn.Softshrink(), nn.Threshold(0.3, 0.0), nn.Tanhshrink(), nn.PReLU(), nn.PReLU(3, init=0.5),
]  # fmt: skip


def float64_value(activation: nn.Module, z: float) -> float:
    channels = getattr(activation, "num_parameters", 1)
    return activation.double()(torch.full((1, channels), z, dtype=torch.float64))[0, 0].item()


def quadrature(function, q: float) -> float:
    """E[f(z)] for z ~ N(0, q) by scipy's adaptive quadrature."""
    kinks = [x / math.sqrt(q) for x in (-3, -0.5, 0, 0.3, 0.5, 3, 6) if abs(x) < 9 * math.sqrt(q)]
    mean, _ = scipy.integrate.quad(
        lambda t: function(math.sqrt(q) * t) * scipy.stats.norm.pdf(t), -9, 9, points=kinks, limit=400, epsrel=1e-6
    )
    return mean


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_the_critical_point_is_that_of_the_quadrature(activation: nn.Module) -> None:
    """σ² E[φ'(z)²] = 1 and, where q is fixed, σ² E[φ(z)²] + σ_b² = q, for z ~ N(0, q)."""

    def value(z: float) -> float:
        return float64_value(activation, z)

    def squared_slope(z: float) -> float:
        slope = (value(z + 1e-5) - value(z - 1e-5)) / 2e-5
        return 0.0 if abs(slope) > 1e3 else slope**2  # a jump has no derivative

    point = point_of(activation)
    assert activation_gain(activation) == point.weight
    assert point.weight**2 * quadrature(squared_slope, point.square or 1.0) == pytest.approx(1.0, rel=2e-3)
    if point.square is not None:
        after = point.weight**2 * quadrature(lambda z: value(z) ** 2, point.square) + point.bias**2
        assert after == pytest.approx(point.square, rel=1e-3)


SMOOTH = [nn.GELU(), nn.SiLU(), nn.Mish(), nn.ELU(), nn.SELU(), nn.Hardswish()]


@pytest.mark.parametrize("activation", SMOOTH, ids=str)
def test_smooth_activations_have_a_stable_critical_point(activation: nn.Module) -> None:
    """From both sides q returns to its fixed point, and no other q with χ = 1 is more stable by much."""
    point = point_of(activation)
    assert point.stable
    assert point.square is not None

    def step(q: float, weight: float, bias: float) -> float:
        return weight**2 * quadrature(lambda z: float64_value(activation, z) ** 2, q) + bias**2

    h = 0.01 * point.square
    above, below = (step(point.square + d, point.weight, point.bias) for d in (h, -h))
    slope = (above - below) / (2 * h)
    assert slope < 0.99
    assert below > point.square - h
    assert above < point.square + h


def test_gelu_is_half_stable_where_its_bias_variance_is_least_for_that() -> None:
    """At q = 3.56 (σ² = 1.983, σ_b² = 0.173) the slope of q's map is one: an outside quadrature's point, not taken."""
    q, weight, bias = 3.56, 1.983, 0.173

    def step(q: float) -> float:
        return weight * quadrature(lambda z: float64_value(nn.GELU(), z) ** 2, q) + bias

    assert step(q) == pytest.approx(q, rel=1e-3)
    assert (step(q + 0.01) - step(q - 0.01)) / 0.02 == pytest.approx(1.0, abs=1e-3)
    assert (point_of(nn.GELU()).square or 0) > q


@pytest.mark.parametrize("activation", [nn.Softplus(), nn.Sigmoid(), nn.Tanhshrink(), nn.ReLU6()], ids=str)
def test_others_have_none_and_say_so(activation: nn.Module) -> None:
    point = point_of(activation)
    assert not point.stable
    assert point.bias == 0


@pytest.mark.parametrize(
    ("activation", "slope"),
    [(nn.Tanh(), 1), (nn.Identity(), 1), (nn.Softsign(), 1), (nn.Hardtanh(), 1)],
    ids=lambda x: str(x),
)
def test_linear_at_the_origin_has_the_inverse_slope(activation: nn.Module, slope: float) -> None:
    assert activation_gain(activation) == pytest.approx(1 / slope, rel=1e-4)


def test_gain_leaves_the_activation_alone() -> None:
    state = torch.get_rng_state()
    for activation in (nn.ReLU(inplace=True), nn.RReLU(), nn.PReLU()):
        first = activation_gain(activation)
        assert activation_gain(activation) == first
        assert activation.training
        assert all(p.dtype == torch.float32 and p.grad is None for p in activation.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def gradient_ratio(model: nn.Module) -> float:
    """Of the second layer to the last but one."""
    model.zero_grad()
    x, y = digits()
    F.cross_entropy(model(x), y).backward()
    weights = [p.grad.norm().item() for p in model.parameters() if p.ndim == 2 and p.grad is not None]
    return weights[1] / weights[-2] if weights[-2] else 0.0


DEEP = {
    "relu": lambda: stack(nn.ReLU(), 48, 100),
    "leaky": lambda: stack(nn.LeakyReLU(0.2), 48, 100),
    "softplus": lambda: stack(nn.Softplus(), 48, 100),
    "gelu": lambda: stack(nn.GELU(), 48, 100),
    "silu": lambda: stack(nn.SiLU(), 48, 100),
    "mish": lambda: stack(nn.Mish(), 48, 100),
    "elu": lambda: stack(nn.ELU(), 48, 100),
    "selu": lambda: stack(nn.SELU(), 48, 100),
    "gelu, odd width": lambda: stack(nn.GELU(), 49, 100),
}


@pytest.mark.parametrize("with_sample", [False, True], ids=["alone", "sample"])
@pytest.mark.parametrize("name", DEEP)
def test_gradients_cross_100_layers(name: str, with_sample: bool) -> None:
    torch.manual_seed(0)
    model = DEEP[name]()
    assert gradient_ratio(model) < 1e-6
    isometric_(model, digits(256) if with_sample else None)
    assert 0.02 < gradient_ratio(model) < 50
    if name in (
        "relu",
        "leaky",
        "softplus",
        "gelu",
        "silu",
    ):  # linear at first
        assert gradient_ratio(model) == pytest.approx(1.0, rel=0.05)
        x, _ = digits(8)
        torch.testing.assert_close(model(x) - model(0 * x), 2 * (model(x / 2) - model(0 * x)), rtol=1e-3, atol=1e-4)


def test_a_function_in_place_of_a_module_is_measured() -> None:
    for phi, module in ((F.gelu, nn.GELU()), (F.silu, nn.SiLU()), (F.mish, nn.Mish()), (F.elu, nn.ELU())):
        by_function = isometric_(Functional(phi), digits(256))
        by_module = isometric_(stack(module), digits(256))
        for layer, other in zip(by_function.layers, [m for m in by_module if isinstance(m, nn.Linear)], strict=True):
            torch.testing.assert_close(layer.weight, other.weight, rtol=2e-2, atol=1e-3)
            torch.testing.assert_close(layer.bias, other.bias, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(("activation", "width"), [(nn.Softplus(), 49), (nn.Sigmoid(), 48)], ids=str)
def test_what_initialization_does_not_reach_is_told(activation: nn.Module, width: int) -> None:
    for sample in (digits(), None):
        with pytest.warns(GramianWarning, match=r"beyond initialization.*without a stable critical point; a norm or"):
            isometric_(stack(activation, width, 60), sample)


class Block(nn.Module):
    """x + W₂ relu(W₁ x), by He's initialization; a norm first, if any."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm, nn.Linear(32, 32), nn.Linear(32, 32)
        for layer in (self.up, self.down):
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.LayerNorm(32), lambda: nn.BatchNorm1d(32)])
def test_branches_are_scaled_only_where_the_stream_is_seen_to_grow(norm) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), *(Block(norm()) for _ in range(40)), nn.Linear(32, 10))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    grows = norm is nn.Identity
    with pytest.warns(GramianWarning, match="scaled the last layers of 40" if grows else "a skip goes around them"):
        isometric_(model, digits())
    changed = {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    changed -= {f"{k}.{part}" for k in (0, 41) for part in ("weight", "bias")}  # the stem and the head are set
    assert changed == ({f"{k}.down.{part}" for k in range(1, 41) for part in ("weight", "bias")} if grows else set())
    stream = model[0](digits()[0]).square().mean()
    assert model[:-1](digits()[0]).square().mean() < (16 if grows else 1e4) * stream


def test_what_a_norm_or_a_skip_makes_free_is_left() -> None:
    """The oracle: scaling a left layer's output changes nothing behind the norm; the plain run in the model is set."""
    plain = [m for _ in range(4) for m in (nn.Linear(32, 32), nn.Tanh())]
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.BatchNorm1d(32), *plain, nn.Linear(32, 10))
    before = model[0].weight.clone()
    with pytest.warns(GramianWarning, match="a norm undoes any scale of what they compute: 0.weight"):
        isometric_(model, digits())
    assert torch.equal(model[0].weight, before)
    w = model[5].weight.detach()
    torch.testing.assert_close(w @ w.T, torch.eye(32), rtol=0, atol=1e-5)
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    assert torch.equal(buffers[0], torch.zeros(32))  # measuring leaves the statistics alone


class Siren(nn.Module):
    """sin(30 W x) with the initialization of Sitzmann et al. (2006.09661), on coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 64), *(nn.Linear(64, 64) for _ in range(5)), nn.Linear(64, 1)])
        for layer in self.layers:
            size = 1 / 2 if layer.in_features == 2 else math.sqrt(6 / 64) / 30
            nn.init.uniform_(layer.weight, -size, size)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.sin(30 * layer(x))
        return self.layers[-1](x)


def test_what_is_set_well_already_is_put_back() -> None:
    """An isometry with σ = 1/30 would make a SIREN nearly linear: its signals shrink thirtyfold, and it learns less."""
    torch.manual_seed(0)
    model = Siren()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.warns(GramianWarning, match=r"left all as it was, since isometries are worse: across 6 layers"):
        isometric_(model, 2 * torch.rand(256, 2, generator=seeded(0)) - 1)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Maxout(nn.Module):
    """A layer of twice the width, of whose pairs the larger is taken."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 2)).amax(-1)


class Gated(nn.Module):
    """W (silu(U x) · V x), without a norm or a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


UNUSUAL = {
    "snake": lambda: Functional(lambda y: y + torch.sin(y) ** 2, 20),
    "maxout": lambda: nn.Sequential(
        nn.Linear(64, 96), Maxout(), *(m for _ in range(20) for m in (nn.Linear(48, 96), Maxout())), nn.Linear(48, 10)
    ),
    "bumps": lambda: Functional(lambda y: torch.exp(-2 * y**2), 20),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_activations_are_measured(name: str) -> None:
    """Snake and bumps element by element; of a maxout the gains, as of pooling."""
    torch.manual_seed(0)
    model = UNUSUAL[name]()
    assert gradient_ratio(model) < 1e-2
    assert 0.02 < gradient_ratio(isometric_(model, digits())) < 50


def test_gates_without_norms_are_beyond_initialization() -> None:
    """A product of two is no activation of one; its signals are squared from layer to layer."""
    model = nn.Sequential(nn.Linear(64, 48), *(Gated() for _ in range(12)), nn.Linear(48, 10))
    with pytest.warns(GramianWarning, match=r"beyond initialization.* a norm or a skip in each block"):
        isometric_(model, digits())
