"""What isometric_ sets and what it leaves: frozen, trained, zero, tied, parametrized, adapted, narrow."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import gramian as gm
from cases import seeded
from gramian.errors import GramianWarning, InputError
from gramian.init import isometric_, signs_of_training
from zoo import ZOO


def is_isometry(w: Tensor, size: float = 1.0) -> bool:
    w = w.detach().flatten(1).double()
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    return bool((gram - size**2 * torch.eye(len(gram), dtype=torch.float64)).abs().max() < 1e-4)


def left_by(model: nn.Module, sample: object = None) -> str:
    """The warning of isometric_."""
    with pytest.warns(GramianWarning) as caught:
        isometric_(model, sample)
    return str(caught[-1].message)


def chain(*sizes: int) -> nn.Sequential:
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


# ---- trained weights -----------------------------------------------------------------------------------------------

FRESH: dict[str, Callable[[Tensor], object]] = {
    "torch": lambda w: None,
    "normal": lambda w: nn.init.normal_(w, std=0.02),
    "truncated": lambda w: nn.init.trunc_normal_(w, std=0.02, a=-0.04, b=0.04),
    "one entry far out": lambda w: nn.init.normal_(w, std=0.02)[0, 0].data.fill_(-2.0),
    "xavier": nn.init.xavier_uniform_,
    "kaiming": nn.init.kaiming_normal_,
    "orthogonal": nn.init.orthogonal_,
    "identity": nn.init.eye_,
    "constant": lambda w: nn.init.constant_(w, 0.1),
    "zero": nn.init.zeros_,
    "bfloat16": lambda w: w.data.copy_(w.data.bfloat16()),
}


@pytest.mark.parametrize("name", FRESH)
def test_no_fresh_weight_looks_trained(name: str) -> None:
    with torch.random.fork_rng():
        for seed in range(3):
            torch.manual_seed(seed)
            model = nn.Sequential(*(nn.Linear(*s) for s in ((64, 48), (10, 96), (300, 3), (700, 33), (64, 64), (4, 4))))
            with torch.no_grad():
                for layer in model:
                    FRESH[name](layer.weight)
            assert signs_of_training(model) == []


@pytest.mark.parametrize("name", ZOO)
def test_no_fresh_model_looks_trained(name: str) -> None:
    model, batch = ZOO[name].make_model(0), ZOO[name].make_batches(0)[0]
    model.train()
    ZOO[name].loss(model, batch)  # a pass that moves the statistics of batch norms is no training
    assert signs_of_training(model) == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GramianWarning)
        assert signs_of_training(isometric_(model, batch)) == []  # nor is an isometry


@pytest.mark.parametrize("name", ["mlp", "batchnorm_cnn", "gpt2", "grouped_query"])
def test_trained_models_are_not_overwritten(name: str) -> None:
    case = ZOO[name]
    model, batches = case.make_model(0), case.make_batches(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        optimizer.zero_grad()
        case.loss(model, batches[step % len(batches)]).backward()
        optimizer.step()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"look trained: .* Pass overwrite=True"):
        isometric_(model, batches[0])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.warns(GramianWarning) as caught:
        isometric_(model, batches[0], overwrite=True)
    text = str(caught[-1].message)
    weights = {sign.name for sign in signs_of_training(model) if model.get_parameter(sign.name).ndim > 1}
    assert all(name in text for name in weights)  # left, since a norm or a skip makes them free
    assert name != "mlp" or ("what they had learned is lost" in text and not weights)


def test_a_trained_backbone_that_is_frozen_does_not_hinder_a_fresh_head() -> None:
    model = chain(32, 32, 10)
    with torch.no_grad():
        model[0].weight += torch.outer(torch.ones(32), torch.ones(32))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    assert "since frozen: 0.weight" in left_by(model)
    assert torch.equal(model[0].weight, before)
    assert is_isometry(model[2].weight)  # alone, it is no head to be made small


# ---- what is left --------------------------------------------------------------------------------------------------


def test_a_model_that_is_frozen_is_refused() -> None:
    with pytest.raises(InputError, match=r"since frozen: 0\.weight, 2\.weight"):
        isometric_(chain(4, 4, 2).requires_grad_(False))


class Residual(nn.Module):
    """x + W₂ tanh(W₁ x), W₂ zero at first; a gain of zero, as ReZero has it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.head = (nn.Linear(16, 16) for _ in range(4))
        self.gain = nn.Parameter(torch.zeros(1))
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down(torch.tanh(self.up(x)))
        return self.head(x + self.gain * torch.tanh(x))


@pytest.mark.parametrize("with_sample", [False, True])
def test_zero_branches_are_kept(with_sample: bool) -> None:
    model, sample = Residual(), torch.randn(8, 16, generator=seeded(0))
    assert "left zero, as residual branches" in (text := left_by(model, sample if with_sample else None))
    assert "not): down.weight" in text
    assert not model.down.weight.any()
    assert not model.gain.any()
    assert with_sample or is_isometry(model.up.weight)


def test_a_zero_layer_that_nothing_goes_around_is_set() -> None:
    model = chain(16, 16, 16, 16, 4)
    for layer in (model[2], model[4]):
        nn.init.zeros_(layer.weight)
    isometric_(model, torch.randn(8, 16, generator=seeded(0)))
    assert is_isometry(model[2].weight)
    assert is_isometry(model[4].weight)


def test_a_model_of_zeros_is_set() -> None:
    model = chain(8, 8, 2)
    for p in model.parameters():
        nn.init.zeros_(p)
    isometric_(model)
    assert is_isometry(model[0].weight)


def test_a_zero_head_is_kept_and_no_other_layer_becomes_the_head() -> None:
    model = chain(8, 8, 2)
    nn.init.zeros_(model[2].weight)
    told = left_by(model, torch.randn(8, 8, generator=seeded(0)))
    assert told.endswith(": 2.weight; set: 0.weight")
    assert not model[2].weight.any()


def test_depthwise_kernels_and_biases_by_design_are_left() -> None:
    layer = nn.Linear(16, 32)
    with torch.no_grad():
        layer.bias.copy_(torch.linspace(-7, -2, 32))  # as in Mamba: the time scales, behind a softplus
    model = nn.Sequential(nn.Conv1d(16, 16, 4, padding=3, groups=16), nn.Linear(16, 16), layer, nn.Linear(32, 2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    text = left_by(model)
    assert "act on each channel alone: 0.weight" in text
    assert "as if by design: 2.weight" in text
    assert all(torch.equal(before[key], model.state_dict()[key]) for key in ("0.weight", "2.weight", "2.bias"))


def test_tied_weights_and_shared_modules_are_set_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    model[2].weight = model[0].weight
    isometric_(model, torch.ones(3, 8))
    assert is_isometry(model[2].weight / model[2].weight.norm() * 8**0.5)
    assert is_isometry(model[4].weight, 0.1)
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(8, 8), shared, shared, nn.Linear(8, 2))
    isometric_(model)
    assert is_isometry(shared.weight)


def test_a_table_that_is_the_head_too_is_left() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.hidden, self.embed = nn.Linear(8, 20, bias=False), nn.Linear(8, 8), nn.Embedding(20, 8)
            self.embed.weight = self.head.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.hidden(self.embed(x))))

    model = Tied()
    before = model.embed.weight.clone()
    isometric_(model, torch.arange(6)[None])
    assert torch.equal(model.embed.weight, before)


def test_adapters_are_left() -> None:
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    text = left_by(model)
    assert "parts of an adapter: " in text
    assert "lora_A.default.weight" in text
    changed = {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    assert all("modules_to_save" in key for key in changed)
    assert changed


# ---- parametrized weights ------------------------------------------------------------------------------------------

PARAMETRIZED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": weight_norm,
    "old spectral_norm": spectral_norm,
}


@pytest.mark.parametrize("name", PARAMETRIZED)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_weight_that_is_applied_is_the_isometry(name: str) -> None:
    model = nn.Sequential(PARAMETRIZED[name](nn.Linear(16, 24)), nn.Tanh(), PARAMETRIZED[name](nn.Linear(24, 12)))
    model = nn.Sequential(*model, nn.Tanh(), nn.Linear(12, 2))
    x = torch.randn(5, 16, generator=seeded(0))
    isometric_(model, head_scale=1.0)
    for training in (False, True):
        model.train(training)
        y = model[0](x) - model[0].bias
        torch.testing.assert_close(y.square().sum(1), x.square().sum(1), rtol=1e-4, atol=1e-4)
        assert is_isometry(model[2].weight)


def test_a_parametrization_without_an_inverse_is_named() -> None:
    class Doubled(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w + 1.0

    model = chain(8, 8, 2)
    nn.utils.parametrize.register_parametrization(model[0], "weight", Doubled())
    before = model[0].weight.clone()
    assert "parametrization takes no such weight: 0.parametrizations.weight.original" in left_by(model)
    assert torch.equal(model[0].weight, before)


# ---- values, dtypes, forwards --------------------------------------------------------------------------------------


def test_weights_without_values_or_precision_are_refused() -> None:
    with pytest.raises(InputError, match=r"0\.weight has no values.*to_empty"):
        isometric_(chain(4, 4, 2).to("meta"))
    model = chain(4, 4, 2)
    model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.float8_e4m3fn))
    with pytest.raises(InputError, match=r"0\.weight is of torch\.float8_e4m3fn.*float32 or bfloat16"):
        isometric_(model)
    lazy = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(2))
    with pytest.raises(InputError, match=r"0\.weight has no shape yet"):
        isometric_(lazy)
    isometric_(lazy, torch.ones(3, 8))
    assert is_isometry(lazy[2].weight, 0.1)


def test_outputs_and_forwards_of_any_form() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, *, pixels: Tensor, labels: Tensor | None = None) -> dict[str, object]:
            hidden = F.relu(self.up(pixels))
            return {"loss": None, "logits": self.down(hidden), "hidden": (hidden,)}

    sample = {"pixels": torch.randn(16, 8, generator=seeded(0))}
    model = isometric_(Named(), sample, predict=lambda model, batch: model(**batch))
    assert is_isometry(model.down.weight, 0.1)
    assert is_isometry(model.up.weight, float(model.up.weight.detach().norm()) / 8**0.5)


def test_train_does_not_replace_weights_that_look_trained() -> None:
    def trained() -> nn.Module:
        model = chain(8, 32, 32, 2)
        with torch.no_grad():
            model[2].weight += 0.5 * torch.outer(torch.ones(32), torch.ones(32))
        return model

    x, y = torch.randn(32, 8, generator=seeded(0)), torch.zeros(32, dtype=torch.long)
    task = gm.Task(trained, gm.Objective.classification(), lambda epoch, generator: [(x, y)], lambda model: {"n": 0.0})
    with pytest.raises(InputError, match=r"2\.weight .*Pass overwrite=True"):
        gm.train(task, init="isometric", steps=1)


def test_complex_layers_are_named_and_a_weight_norm_that_was_set_is_not() -> None:
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.cfloat), nn.Linear(8, 4))
    with pytest.warns(GramianWarning, match=r"0\.weight"):
        gm.init.isometric_(model)
    for norm in (nn.utils.parametrizations.weight_norm, nn.utils.weight_norm):
        with warnings.catch_warnings():
            warnings.simplefilter("error", GramianWarning)
            gm.init.isometric_(nn.Sequential(norm(nn.Conv1d(4, 4, 3, padding=1)), nn.Tanh(), nn.Conv1d(4, 4, 1)))
