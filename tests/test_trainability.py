"""What a plain network loses on its way: by hand, on networks that lose nothing, and said only where it is defined."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gramian as gm
from gramian.inspection.trainability import DECADES_LOST, decades_lost
from gramian.report import Report

WIDTH = 16


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(0))
    return x, x[:, :4].argmax(1)


def plain(depth: int, factors: list[float] | None = None) -> nn.Sequential:
    """Orthogonal layers without activations; one of them scales the first directions by these factors."""
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(depth)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, generator=generator)
    if factors:
        with torch.no_grad():
            layers[0].weight.copy_(torch.diag(torch.tensor(factors + [factors[-1]] * (WIDTH - len(factors)))))
    return nn.Sequential(*layers, nn.Linear(WIDTH, 4))


def inspected(model: nn.Module) -> Report:
    return gm.inspect(model, [batch()], gm.Objective.classification(), quick=True)


def variation(model: nn.Sequential) -> float:
    h = model[:-1](batch()[0]).detach()
    return float((h.var(0, correction=0).mean() / h.square().mean()).sqrt())


@pytest.mark.parametrize("factors", [[1.0], [1e3], [1.0, 1e-2, 1e-4], [1e-5]])
def test_decades_are_those_of_the_singular_values_and_of_the_variation(factors: list[float]) -> None:
    model = plain(6, factors)
    product = torch.linalg.multi_dot([layer.weight.detach().double() for layer in reversed(model[:-1])])
    logs = torch.linalg.svdvals(product)[:3].log10()
    # The first layer's own matrix is not a part of the Jacobian where that begins at its output.
    want = float(logs[0] - logs[2] + 0.5 * logs.mean().abs()) - 0.5 * math.log10(variation(model)) + 7 / 100
    found = decades_lost(inspected(model))
    assert found == pytest.approx(want, abs=0.02)


def test_a_deeper_network_and_a_collapsed_one_lose_more() -> None:
    def net(depth: int, scale: float) -> nn.Sequential:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
            nn.init.normal_(layers[-2].weight, std=scale / WIDTH**0.5)  # type: ignore[arg-type]
        return nn.Sequential(*layers, nn.Linear(WIDTH, 4))

    lost = [decades_lost(inspected(net(depth, scale))) for depth, scale in ((5, 1.0), (40, 1.0), (40, 0.5))]
    assert None not in lost
    assert lost == sorted(lost)  # type: ignore[type-var]
    assert lost[2] > lost[0] + 5  # type: ignore[operator]


def test_it_is_a_fact_of_plain_networks_alone() -> None:
    assert DECADES_LOST in inspected(plain(4)).facts
    for model in (
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4)),
        nn.Sequential(nn.Unflatten(1, (1, WIDTH)), nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(56, 4)),
    ):
        assert DECADES_LOST not in inspected(model).facts
    assert DECADES_LOST not in gm.inspect(plain(4)).facts
