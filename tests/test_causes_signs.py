"""Causes in signs and dimensions of losses, and inputs that are changed or not used: each with its healthy twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm

N, WIDTH, CLASSES = 32, 12, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def found(model: nn.Module, batches: Any, loss: Callable) -> dict[str, str]:
    """The errors and warnings, by code."""
    report = gm.inspect(model, batches, loss)
    return {f.code: f.severity for f in report.findings if f.severity != "info"}


def images() -> tuple[Tensor, Tensor]:
    x = draw(N, CLASSES, 6, 6)
    return x, x.argmax(1)


def network(*last: nn.Module, outputs: int = CLASSES) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, outputs), *last)


@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
@pytest.mark.parametrize(("dim", "told"), [(1, False), (2, True), (3, True)])
def test_probabilities_over_a_dimension_that_is_not_that_of_the_classes(function: Any, dim: int, told: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(CLASSES, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, CLASSES, 1))
    likelihood = F.nll_loss if function is torch.log_softmax else F.cross_entropy
    codes = found(model, [images()], lambda m, b: likelihood(function(m(b[0]), dim), b[1]))
    assert ("loss-not-log-probabilities" in codes) == told


def labels(*, several: bool) -> tuple[Tensor, Tensor]:
    x = draw(N, WIDTH)
    y = x[:, :CLASSES]
    return x, (y > 0).float() if several else F.one_hot(y.argmax(1), CLASSES).float()


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("ends", [True, False])
def test_several_classes_of_a_sample_under_a_softmax(several: bool, ends: bool) -> None:
    model = network(nn.Softmax(-1)) if ends else network()
    function = F.binary_cross_entropy if ends else F.cross_entropy
    codes = found(model, [labels(several=several)], lambda m, b: function(m(b[0]), b[1]))
    assert ("loss-double-softmax" in codes) == several


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("other", [0.0, 1.0])
def test_a_loss_that_is_maximized(sign: int, other: float) -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        scores = model(batch[0])
        shares = sign * F.binary_cross_entropy_with_logits(scores, batch[1], reduction="none")
        return (scores.sigmoid() * shares).mean() + other * F.mse_loss(scores, batch[0][:, :CLASSES])

    told = found(network(), [labels(several=True)], loss).get("loss-unbounded")
    assert told == (None if sign > 0 else "warning" if other else "error")


def test_an_adversary_may_be_meant() -> None:
    """A generator's loss, with targets that it makes itself."""
    critic = network(outputs=1).requires_grad_(False)
    critic[0] = nn.Linear(CLASSES, 32)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(critic(model(batch)), torch.zeros(N, 1))

    assert "loss-unbounded" not in found(network(), [draw(N, WIDTH)], loss)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        return self.decoder(mean + (log_variance / 2).exp() * torch.randn_like(mean)), mean, log_variance


@pytest.mark.parametrize("sign", [1, -1])
def test_a_divergence_that_is_subtracted(sign: int) -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        made, mean, log_variance = model(batch)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        return F.mse_loss(made, batch) + sign * 0.1 * divergence

    assert found(Autoencoder(), [draw(N, WIDTH)], loss).get("loss-unbounded") == ("error" if sign < 0 else None)


@pytest.mark.parametrize("what", ["critic", "likelihood", "policy"])
def test_losses_without_a_minimum_that_are_meant(what: str) -> None:
    """They fall as fast as the outputs grow, and no faster."""

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        output = model(batch)
        if what == "critic":
            return -output.mean()
        if what == "likelihood":
            return (output.square() / 2).mean() - output[:, :1].mean()
        gain = batch[:, :1]
        return -(output.log_softmax(1) * gain).mean()

    assert "loss-unbounded" not in found(network(), [draw(N, WIDTH)], loss)


class Two(nn.Module):
    def __init__(self, use: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use, self.x, self.c = use, nn.Linear(WIDTH, 32), nn.Linear(3, 32)
        self.head = nn.Linear(32, 1)
        if use == "zero":
            nn.init.zeros_(self.c.weight)
            nn.init.zeros_(self.c.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        made = self.c(c)
        return self.head(torch.relu(self.x(x) + (0 if self.use == "dropped" else made)))


@pytest.mark.parametrize(("use", "told"), [("dropped", "warning"), ("used", None), ("zero", None)])
def test_an_input_that_is_not_used(use: str, told: str | None) -> None:
    batch = (draw(N, WIDTH), draw(N, 3, seed=1), draw(N, 1, seed=2))
    codes = found(Two(use), [batch], lambda m, b: F.mse_loss(m(b[0], b[1]), b[2]))
    assert codes.get("input-unused") == told


class Causal(nn.Module):
    """The mean of the tokens so far that a mask shows."""

    def __init__(self, *, masks: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.masks, self.embedding, self.head = masks, nn.Embedding(16, 32), nn.Linear(32, 16)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        shown = mask[..., None].float() if self.masks else torch.ones(*ids.shape, 1)
        return self.head(torch.tanh((self.embedding(ids) * shown).cumsum(1) / shown.cumsum(1).clamp(min=1)))


@pytest.mark.parametrize(("masks", "told"), [(True, None), (False, "warning")])
def test_a_mask_that_may_show_more_padding_is_used(masks: bool, told: str | None) -> None:
    lengths = 12 - 2 * torch.arange(N).clamp(max=4)  # each is as long as the next, or longer
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = torch.randint(1, 16, (N, 12), generator=torch.Generator().manual_seed(0)) * mask
    labels = ids.roll(-1, 1).masked_fill(mask.roll(-1, 1) == 0, -100)
    labels[:, -1] = -100

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0], batch[1]).flatten(0, 1), batch[2].flatten())

    assert found(Causal(masks=masks), [(ids, mask, labels)], loss).get("input-unused") == told


class Centered(nn.Module):
    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.inner, self.in_place = network(), in_place

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            x -= 0.5
            return self.inner(x)
        return self.inner(x - 0.5)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_pass_that_writes_into_its_batch(in_place: bool) -> None:
    x = draw(N, WIDTH)
    before = x.clone()
    codes = found(Centered(in_place=in_place), [(x, x[:, :4].argmax(1))], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    assert codes == ({"input-changed": "error"} if in_place else {})
    assert torch.equal(x, before)


@pytest.mark.parametrize("hidden", [True, False])
def test_words_that_a_masked_model_is_to_restore(hidden: bool) -> None:
    torch.manual_seed(0)
    words = torch.randint(2, 12, (N, 16), generator=torch.Generator().manual_seed(0))
    chosen = torch.rand(N, 16, generator=torch.Generator().manual_seed(1)) < 0.2
    given, wanted = words.masked_fill(chosen, 1) if hidden else words, words.masked_fill(~chosen, -100)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.Embedding(12, 16), layer, nn.Linear(16, 12))
    codes = found(model, [(given, wanted)], lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten()))
    assert ("target-leak" in codes) == (not hidden)
