"""Isometric initialization: orthogonal layers whose gain is one, whatever the activation and the units of the data."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from cases import seeded
from gramian.errors import GramianWarning, InputError
from gramian.init import isometric_
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


class Functional(nn.Module):
    def __init__(self, phi, depth: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 48), *(nn.Linear(48, 48) for _ in range(depth)), nn.Linear(48, 10)])
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
    "mixture_of_experts": "layers.0.mlp.up, layers.0.mlp.down",
}
# With a sample also the matrices that norms and skips keep in order.
KEPT = {
    "batchnorm_cnn": "a norm undoes any scale of what they compute: ",
    "residual_cnn": "a skip goes around them: ",
    "transformer_classifier": "encoder.layers.0.self_attn.in_proj_weight",
    "transformer_lm": "encoder.layers.0.self_attn.in_proj_weight",
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
        for left in message.partition("; set: ")[0].rpartition(": ")[2].split(", "):
            assert torch.equal(before[left], model.state_dict()[left])
    # Each weight was set or named; nothing is silently left.
    untouched = {k for k, v in model.state_dict().items() if v.ndim > 1 and torch.equal(v, before[k])}
    embeddings = {n for b in gm.blocks(model).blocks if b.role == "embedding" for n in (b.name, *b.aliases)}
    assert not untouched - embeddings or told
    for k in untouched - embeddings:
        assert k in message
    assert math.isfinite(case.loss(model, batch).item())


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
