"""Causes where another rule looked alike: in multiples of a loss, small weights behind norms, and later batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.remedies.performing import Setting
from gramian.remedies.proposals import proposals

REGRESS = gm.Objective.regression()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def found(model: nn.Module, batches: Any, objective: Any, **options: Any) -> dict[str, gm.report.Finding]:
    """The errors and warnings, by code."""
    return {f.code: f for f in gm.inspect(model, batches, objective, **options).findings if f.severity != "info"}


def curves(num: int = 8) -> list[tuple[Tensor, Tensor]]:
    x = draw(num, 16, 12)
    return [(one, one.cumsum(1).sin()) for one in x]


def net(*, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 32), nn.LayerNorm(32), nn.ReLU()]
    kept = [layer for layer in layers if norm or not isinstance(layer, nn.LayerNorm)]
    return nn.Sequential(*kept, nn.Linear(32, 12))


def test_a_multiple_of_the_loss_that_an_optimizer_has_seen_is_no_high_rate() -> None:
    """Trained on the mean over outputs, looked at with their sum: Adam's second moments are those of the mean."""
    model, batches = net(), curves()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        for x, y in batches:
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
    assert "rate-too-high" not in found(
        model, batches, lambda m, b: 300 * F.mse_loss(m(b[0]), b[1]), optimizer=optimizer
    )
    for group in optimizer.param_groups:
        group["lr"] = 3.0
    assert "rate-too-high" in found(model, batches, REGRESS, optimizer=optimizer)


@pytest.mark.parametrize(("factor", "told"), [(0.03, True), (0.3, False)])
def test_small_weights_behind_norms_are_told_before_the_rate(factor: float, told: bool) -> None:
    model = net(norm=True)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(factor)
    told_codes = found(model, curves(), REGRESS, optimizer=torch.optim.Adam(model.parameters(), 1e-2))
    assert list(told_codes) == (["gain-below-one"] if told else [])


@pytest.mark.parametrize(("eps", "told"), [(10.0, True), (1e-3, False)])
def test_an_epsilon_above_the_usual_gradient_is_told_though_the_loss_falls(eps: float, told: bool) -> None:
    """One entry of a gradient may be as large as it."""
    model, scale = net(), torch.ones(12)
    scale[0] = 30.0
    optimizer = torch.optim.Adam(model.parameters(), 3e-3, eps=eps)
    assert ("rate-too-low" in found(model, [(x, y * scale) for x, y in curves()], REGRESS, optimizer=optimizer)) == told


@pytest.mark.parametrize("at", [2, 7])
def test_values_that_are_not_finite_in_a_later_batch(at: int) -> None:
    batches = curves()
    batches[at][0][3, 5] = float("nan")
    finding = found(net(), batches, REGRESS)["input-non-finite"]
    assert finding.where == "data"
    assert ("batch 7" in finding.evidence) == (at == 7)


def test_an_input_that_is_restored_gets_no_hook_and_its_loss_does_not_collapse() -> None:
    """A hook would change the input and not the target; exponentials hide the slope of what is restored."""

    class Coder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.mean, self.log = nn.Linear(12, 32), nn.Linear(32, 4), nn.Linear(32, 4)
            self.last = nn.Linear(4, 12)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            h = F.elu(self.first(x))
            mean, log = self.mean(h), self.log(h)
            return self.last(mean + (0.5 * log).exp() * torch.randn_like(mean) * self.training), mean, log

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out, mean, log = model(x)
        return (out - x).square().sum(1).mean() + 0.1 * (mean.square() + log.exp() - log - 1).sum(1).mean()

    batches = [60 + 50 * x.sin() for x in draw(4, 32, 12)]
    model = Coder()
    told = found(model, batches, loss, verify=True, optimizer=torch.optim.Adam(model.parameters(), 1e-3))
    assert "loss-collapses" not in told
    assert told["input-scale"].action is None
    of_numbers = Setting(net(), [(x, x.cumsum(1)) for x in batches], REGRESS)
    assert [action.name for action in proposals(told["input-scale"], of_numbers)] == ["standardize"]
    batches[0][1, 2] = float("nan")
    lost = gm.report.Finding("input-non-finite", "error", "", where="data")
    assert [action.name for action in proposals(lost, of_numbers)] == ["replace_non_finite"]
