"""What isometric_ leaves because norms and skips keep it in order, and what it sets all the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import seeded
from gramian.errors import GramianWarning, InputError
from gramian.init import isometric_

X = torch.randn(32, 16, generator=seeded(0))


def changed(model: nn.Module, sample: object = X) -> set[str]:
    """The weights that isometric_ set, without `.weight`."""
    before = {name: p.clone() for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GramianWarning)
        isometric_(model, sample)
    return {
        name.removesuffix(".weight")
        for name, p in model.named_parameters()
        if name.endswith("weight") and not torch.equal(before[name], p)
    }


class Net(nn.Module):
    """stem, then `step` with two matrices, then head."""

    def __init__(self, step: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem, self.up, self.down, self.head = (nn.Linear(16, 16) for _ in range(4))
            self.norm, self.batch, self.last = nn.LayerNorm(16), nn.BatchNorm1d(16), nn.LayerNorm(16)
        self.scale = nn.Parameter(torch.full((16,), 1e-6))
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.step(self, self.stem(x)))


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def divided(x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


STEPS: dict[str, tuple[Callable[[Net, Tensor], Tensor], set[str]]] = {
    "plain": (lambda m, x: m.down(torch.tanh(m.up(x))), {"stem", "up", "down", "head"}),
    "sum of two paths": (lambda m, x: m.down(x) + m.up(x), {"stem", "up", "down", "head"}),
    "gated": (lambda m, x: m.down(x) * torch.sigmoid(m.up(x)), {"stem", "up", "down", "head"}),
    "divided by a gate": (lambda m, x: m.down(x) / torch.sqrt(1 + m.up(x) ** 2), {"stem", "up", "down", "head"}),
    "skip": (lambda m, x: x + m.down(torch.tanh(m.up(x))), {"stem", "head"}),
    "skip, layer scale": (lambda m, x: x + m.scale * m.down(torch.tanh(m.up(x))), {"stem", "head"}),
    "skip, a view of it": (
        lambda m, x: (m.down(m.up(x)).view(4, 128) + x.view(4, 128)).view(32, 16),
        {"stem", "head"},
    ),
    "pre-norm": (lambda m, x: m.last(x + m.down(F.gelu(m.up(m.norm(x))))), {"head"}),
    "post-norm": (lambda m, x: m.last(x + m.down(F.gelu(m.up(x)))), {"stem", "head"}),  # up sees the stem's scale
    "batch norms": (lambda m, x: m.down(torch.relu(m.batch(m.up(x)))), {"stem", "down", "head"}),
    "norm behind the activation": (lambda m, x: m.down(m.norm(torch.relu(m.up(x)))), {"stem", "down", "head"}),
    "rms norm, written out": (lambda m, x: m.down(rms(m.up(x))), {"stem", "down", "head"}),
    "layer norm, written out": (lambda m, x: m.down(divided(m.up(x))), {"stem", "down", "head"}),
    "norm on one of two paths": (lambda m, x: m.down(m.norm(u := m.up(x)) + u), {"stem", "up", "down", "head"}),
}


@pytest.mark.parametrize("name", STEPS)
def test_what_norms_and_skips_keep(name: str) -> None:
    step, expected = STEPS[name]
    model = Net(step)
    scale = model.scale.clone()
    assert changed(model) == expected
    assert torch.equal(model.scale, scale)


def test_a_module_with_a_table_of_positions_around_a_layer_is_no_step() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(0.02 * torch.randn(4, 16, generator=seeded(1)))
            self.projection = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.projection(x) + self.position

    model = Net(STEPS["pre-norm"][0])
    model.stem = Patches()
    assert changed(model, torch.randn(8, 4, 16, generator=seeded(0))) == {"head"}


@pytest.mark.parametrize("factor", [1e-4, 1e4])
@pytest.mark.parametrize("name", ["skip", "batch norms"])
def test_an_unhealthy_size_is_mended(name: str, factor: float) -> None:
    model = Net(STEPS[name][0])
    with torch.no_grad():
        model.up.weight *= factor
        model.up.bias.zero_()
    assert "up" in changed(model)


def test_a_deep_chain_in_one_skip_is_a_plain_network() -> None:
    class Long(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(16, 16), nn.Tanh())))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layers(x)  # a skip from the input

    assert len(changed(Long(20))) == 20
    with pytest.warns(GramianWarning, match="a skip goes around them: "):
        isometric_(Long(2), X)


def test_frozen_parameters_and_gradients_are_as_before() -> None:
    model = Net(STEPS["pre-norm"][0])
    model.stem.requires_grad_(False)
    x = X.clone()
    assert changed(model, x) == {"head"}
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["stem.weight", "stem.bias"]
    assert all(p.grad is None for p in model.parameters())
    assert not x.requires_grad
    assert torch.equal(x, X)


def test_trained_weights_are_refused_also_where_they_would_be_left() -> None:
    model = Net(STEPS["pre-norm"][0])
    with torch.no_grad():
        model.up.weight += torch.outer(torch.ones(16), torch.linspace(1, 2, 16))
    with pytest.raises(InputError, match=r"look trained: up\.weight"):
        isometric_(model, X)


def test_families_of_transformers() -> None:
    """ConvNeXt's pointwise matrices and the convolution between its stages stay; the head is set."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextConfig(num_channels=1, num_stages=2, hidden_sizes=[16, 32], depths=[1, 1])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.ConvNextForImageClassification(config)
    assert changed(model, torch.randn(4, 1, 32, 32, generator=seeded(0))) == {"classifier"}


class WithExtraState(nn.Sequential):
    """State that is no tensor."""

    steps = 7

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def test_extra_state_stays() -> None:
    layers = [layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.Tanh())]
    model = WithExtraState(*layers, nn.Linear(16, 3))
    isometric_(model, X)
    assert model.steps == 7
