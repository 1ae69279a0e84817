"""Isometric initialization: orthogonal layers whose gain is one, whatever the activation and the units of the data."""

from __future__ import annotations

import math

import pytest
import scipy.integrate
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from cases import seeded
from gramian.errors import GramianWarning, InputError
from gramian.init import activation_gain, isometric_
from gramian.init.gains import point_of
from gramian.operators import layer_gains
from zoo import ZOO

CLASSIFY = gm.Objective.classification()


def digits(n: int = 64) -> tuple[Tensor, Tensor]:
    x, y = ZOO["mlp"].make_batches(0)[0]
    return x[:n], y[:n]


def stack(activation: nn.Module, width: int = 48, depth: int = 5) -> nn.Sequential:
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), activation)]
    return nn.Sequential(nn.Linear(64, width), activation, *layers, nn.Linear(width, 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9), (1, 5)], ids=str)
def test_linear_layers_are_orthogonal_to_their_dtype(shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer = nn.Linear(shape[1], shape[0], dtype=dtype)
    isometric_(layer)
    w = layer.weight.detach().double()
    gram = w @ w.T if shape[0] <= shape[1] else w.T @ w
    tolerance = 4 * torch.finfo(dtype).eps * max(shape) ** 0.5
    assert (gram - torch.eye(len(gram), dtype=torch.float64)).abs().max() < tolerance
    assert (layer.bias == 0).all()


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (9,)),
    "2d": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (5, 7)),
    "3d": (nn.Conv3d(4, 6, 3, padding=1, padding_mode="circular"), (3, 4, 5)),
    "5x5": (nn.Conv2d(4, 6, 5, padding=2, padding_mode="circular"), (6, 6)),
    "1x1": (nn.Conv2d(4, 4, 1), (5, 7)),
    "grouped": (nn.Conv2d(4, 8, 3, padding=1, groups=2, padding_mode="circular"), (5, 7)),
    "dilated": (nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="circular"), (5, 7)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_isometries_of_images(name: str) -> None:
    conv, size = CONVOLUTIONS[name]
    isometric_(conv)
    x = torch.randn(3, 4, *size, generator=seeded(0))
    y = torch.randn(3, 4, *size, generator=seeded(1))
    torch.testing.assert_close((conv(x) * conv(y)).flatten(1).sum(1), (x * y).flatten(1).sum(1), rtol=1e-4, atol=1e-4)


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


class Functional(nn.Module):
    def __init__(self, phi) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 48), *(nn.Linear(48, 48) for _ in range(5)), nn.Linear(48, 10)])
        self.phi = phi

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.phi(layer(x))
        return self.layers[-1](x)


MODELS = {
    "relu": lambda: stack(nn.ReLU()),  # one activation module for all layers
    "relu_in_place": lambda: stack(nn.ReLU(inplace=True)),
    "tanh": lambda: stack(nn.Tanh()),
    "leaky": lambda: stack(nn.LeakyReLU(0.2)),
    "linear": lambda: stack(nn.Identity()),
    "functional_relu": lambda: Functional(F.relu),
    "functional_tanh": lambda: Functional(torch.tanh),
}


@pytest.mark.parametrize("name", MODELS)
def test_hidden_gains_are_one(name: str) -> None:
    model = isometric_(MODELS[name](), digits())
    gains = list(layer_gains(model, digits(), CLASSIFY, num_probes=8).values())
    hidden = [g.chi for g in gains[1:-1]]
    # ReLU's is one on average over directions, tanh's just below at a finite variance; torch's own is 1/6 and 1/3. The
    # rows of [Q, −Q; −Q, Q] / 1.2 before a leaky ReLU make 1.04 / 1.44.
    assert min(hidden) > (0.7 if name == "leaky" else 0.75)
    assert max(hidden) < 1.25
    mirrored = {"leaky": 2 / 1.44}.get(name, 2 if "relu" in name else 1)
    assert gains[-1].chi == pytest.approx(0.01 * mirrored, rel=0.2)  # the head's scale


def test_the_default_initialization_fails_that_test() -> None:
    torch.manual_seed(0)
    gains = layer_gains(stack(nn.Tanh()), digits(), CLASSIFY)
    assert max(g.chi for g in list(gains.values())[1:-1]) < 0.5


@pytest.mark.parametrize("units", [1e-6, 1.0, 1e4])
def test_with_a_sample_the_units_of_the_data_do_not_matter(units: float) -> None:
    x, _ = digits()
    reference, model = isometric_(stack(nn.Tanh()), x), isometric_(stack(nn.Tanh()), units * x)
    assert model[0](units * x).square().mean().sqrt().item() == pytest.approx(0.5, rel=1e-4)
    torch.testing.assert_close(model(units * x), reference(x), rtol=1e-3, atol=1e-5)


def test_only_the_layer_that_the_data_enter_is_rescaled() -> None:
    case = ZOO["gru"]
    with pytest.warns(GramianWarning, match=r"rnn\.weight_ih_l0"):
        model = isometric_(case.make_model(0), case.make_batches(0)[0])
    w = model.head.weight.detach()
    torch.testing.assert_close(w @ w.T, torch.eye(10), rtol=0, atol=1e-5)


def test_the_same_generator_gives_the_same_weights_and_no_other_is_used() -> None:
    state = torch.get_rng_state()
    models = [isometric_(ZOO["mlp"].make_model(0), digits(), generator=seeded(seed)) for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    states = [m.state_dict() for m in models]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["0.weight"], states[2]["0.weight"])


# What isometric_ leaves as it is, by name.
LEFT = {
    "lstm": "rnn.weight_ih_l0",
    "gru": "rnn.weight_ih_l0",
    "transformer_classifier": "encoder.layers.0.self_attn.in_proj_weight",
    "transformer_lm": "encoder.layers.0.self_attn.in_proj_weight",
    "mixture_of_experts": "layers.0.mlp.up, layers.0.mlp.down",
}
# With a sample also the matrices that norms and skips keep in order.
KEPT = {
    "batchnorm_cnn": "a norm undoes any scale of what they compute: ",
    "residual_cnn": "a skip goes around them: ",
    "gpt2": "a skip goes around them: ",
    "grouped_query": "a skip goes around them: ",
}


@pytest.mark.parametrize("with_sample", [False, True], ids=["alone", "sample"])
@pytest.mark.parametrize("name", ZOO)
def test_zoo(name: str, with_sample: bool) -> None:
    case = ZOO[name]
    model, batch = case.make_model(0), case.make_batches(0)[0]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sample = batch if with_sample else None
    told = LEFT.get(name) or (KEPT.get(name) if with_sample else None)
    if told is None:
        isometric_(model, sample)
    else:
        with pytest.warns(GramianWarning) as caught:
            isometric_(model, sample)
        (message,) = [str(w.message) for w in caught if w.category is GramianWarning]
        assert told in message
        for left in message.rpartition(": ")[2].split(", "):
            assert torch.equal(before[left], model.state_dict()[left])
    # Each weight was set or named; nothing is silently left.
    untouched = {k for k, v in model.state_dict().items() if v.ndim > 1 and torch.equal(v, before[k])}
    embeddings = {n for b in gm.blocks(model).blocks if b.role == "embedding" for n in (b.name, *b.aliases)}
    assert not untouched - embeddings or told
    for k in untouched - embeddings:
        assert k in message
    assert math.isfinite(case.loss(model, batch).item())


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


def test_a_deep_network_learns_from_it() -> None:
    case = ZOO["deep_tanh_mlp"]

    def first_gradient(model: nn.Module) -> float:
        model.zero_grad()
        case.loss(model, digits()).backward()
        return model[0].weight.grad.norm().item() / model[-1].weight.grad.norm().item()

    model = case.make_model(0)
    before = first_gradient(model)
    after = first_gradient(isometric_(model, digits()))
    assert before < 1e-3
    assert after > 0.01


def test_a_sample_that_reaches_no_layer_is_told() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.layer.weight)

    with pytest.raises(InputError, match="the sample reaches none of 1"):
        isometric_(Apart(), torch.ones(2, 3))
