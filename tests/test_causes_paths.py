"""Paths that carry nothing, or too much: draws, experts, offsets of scores, heads, losses that are not finite."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm

N, D, CLASSES = 64, 8, 3
CLASSIFY = gm.Objective.classification()


def data() -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    return [(x, (x @ torch.randn(D, CLASSES, generator=torch.Generator().manual_seed(1))).argmax(1))]


def told(model: nn.Module, batches, loss) -> dict[str, tuple[str, str]]:
    findings = gm.inspect(model, batches, loss).findings
    return {f.code: (f.where, f.severity) for f in findings if f.severity != "info"}


class Draws(nn.Module):
    """An autoencoder whose code is drawn."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.encoder, self.decoder = nn.Linear(D, 8), nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, D))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log = self.encoder(x).chunk(2, 1)
        law = torch.distributions.Normal(mean, log.exp())
        if self.how == "by hand":
            with torch.no_grad():
                z = mean + log.exp() * torch.randn_like(mean)
        else:
            z = law.rsample() if self.how == "rsample" else law.sample()
        score = law.log_prob(z).sum(1) if self.how == "score" else x.new_zeros(len(x))
        return self.decoder(z), mean.square().sum(1) + log.square().sum(1), score


def elbo(model: nn.Module, batch) -> Tensor:
    x = batch[0]
    out, divergence, score = model(x)
    error = (out - x).square().sum(1)
    return (error + 0.1 * divergence + error.detach() * score).mean()


@pytest.mark.parametrize(("how", "is_told"), [("sample", 1), ("by hand", 1), ("rsample", 0), ("score", 0)])
def test_a_code_that_is_drawn_without_a_gradient(how, is_told) -> None:
    found = told(Draws(how), [(data()[0][0], data()[0][0])], elbo)
    assert ("graph-cut" in found) == bool(is_told)
    if is_told:
        assert found["graph-cut"][0] == "decoder.0"


def test_a_policy_that_draws_its_actions() -> None:
    def loss(model: nn.Module, batch) -> Tensor:
        law = torch.distributions.Normal(model(batch[0]), 1.0)
        action = law.sample()
        return -(law.log_prob(action) * -action.square()).mean()

    model = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, 2))
    assert "graph-cut" not in told(model, data(), loss)


class Experts(nn.Module):
    def __init__(self, bias: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.experts = nn.Linear(D, 4), nn.ModuleList(nn.Linear(D, CLASSES) for _ in range(4))
        with torch.no_grad():
            self.router.weight.mul_(scale)
            self.router.bias[1] = bias

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        return sum(weights[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


def test_experts_that_are_never_chosen() -> None:
    assert told(Experts(40.0), data(), CLASSIFY)["gate-shut"][0] == "router, experts.0, experts.2, experts.3"
    assert told(Experts(-40.0), data(), CLASSIFY)["gate-shut"] == ("router, experts.1", "warning")
    assert "gate-shut" not in told(Experts(), data(), CLASSIFY)
    assert "gate-shut" not in told(Experts(scale=30.0), data(), CLASSIFY)  # each is chosen by some
    few = [(x[:20], y[:20]) for x, y in data()]
    assert "gate-shut" not in told(Experts(-40.0), few, CLASSIFY)  # too few rows to say


class Detector(nn.Module):
    """Scores of rare classes at all places, and positions beside them."""

    def __init__(self, prior: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.scores, self.box = nn.Conv2d(1, 8, 3, 1, 1), nn.Conv2d(8, 5, 1), nn.Conv2d(8, 2, 1)
        nn.init.constant_(self.scores.bias, prior)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.body(x))
        return self.scores(h), self.box(h)


def detect(model: nn.Module, batch) -> Tensor:
    scores, box = model(batch["x"])
    loss = F.binary_cross_entropy_with_logits(scores, batch["heat"], reduction="none")
    return (loss * (1 - torch.exp(-loss)).square()).mean() + box.square().mean() + scores.sigmoid().mean()


@pytest.mark.parametrize(("prior", "is_told"), [(12.0, True), (4.6, True), (-4.6, False), (0.0, False)])
def test_the_prior_of_rare_classes(prior, is_told) -> None:
    g = torch.Generator().manual_seed(0)
    heat = (torch.rand(N, 5, 6, 6, generator=g) < 0.01).float()
    found = told(Detector(prior), [{"x": torch.randn(N, 1, 6, 6, generator=g), "heat": heat}], detect)
    assert ("head-offset" in found) == is_told
    if is_told:
        assert found["head-offset"] == ("scores", "error")
        assert "saturated-units" not in found


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.one, self.other = nn.Linear(16, CLASSES), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.one(h), self.other(h)


@pytest.mark.parametrize("weight", [1.0, 1e6])
def test_a_head_whose_loss_weighs_more_is_no_explosion(weight) -> None:
    def loss(model: nn.Module, batch) -> Tensor:
        scores, value = model(batch[0])
        return weight * F.cross_entropy(scores, batch[1]) + value.square().mean()

    assert "gradient-explodes" not in told(TwoHeads(), data(), loss)


def test_a_loss_that_is_not_finite_is_told_before_units_that_do_not_act() -> None:
    model = nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    nn.init.constant_(model[0].bias, -100.0)

    def loss(model: nn.Module, batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) + (model[0](batch[0]) * 10).neg().exp().mean()

    findings = gm.inspect(model, data(), loss).findings
    assert (findings[0].code, findings[0].severity) == ("loss-non-finite", "error")
    assert all(f.severity == "info" for f in findings if f.code in ("non-finite-input", "non-finite-gradient"))
