"""Batch norms whose momentum never lets the data in are told before training; slow ones that have settled are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gramian as gm

CLASSIFY = gm.Objective.classification()
N, D, CLASSES = 64, 8, 3


def batches() -> list[tuple[Tensor, Tensor]]:
    y = torch.arange(N) % CLASSES
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    x[:, 0] += 2 * y
    return [(x, y)]


def net(momentum: float | None, *, shift: float = 5.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 16), nn.BatchNorm1d(16, momentum=momentum), nn.ReLU(), nn.Linear(16, CLASSES))
    nn.init.constant_(model[0].bias, shift)
    return model


def told(model: nn.Module, **options) -> list[str]:
    findings = gm.inspect(model, batches(), CLASSIFY, **options).findings
    return [f.where for f in findings if f.code == "norm-statistics" and f.severity != "info"]


@pytest.mark.parametrize("momentum", [1e-4, 1e-6])
def test_a_momentum_that_keeps_the_initial_statistics(momentum) -> None:
    assert told(net(momentum)) == ["1"]
    model = net(momentum)
    for x, _ in batches() * 20:
        model(x)
    assert told(model) == ["1"]
    model.eval()
    assert told(model) == []  # nobody trains it


@pytest.mark.parametrize("momentum", [0.1, 0.01, 1e-3, None])
def test_usual_momenta(momentum) -> None:
    assert told(net(momentum)) == []


def test_a_slow_momentum_where_the_statistics_are_the_datas() -> None:
    model = net(3e-4)
    model[1].momentum = None
    for x, _ in batches() * 5:
        model(x)
    model[1].momentum = 3e-4  # as in models that were trained for long, and whose count was not kept
    model[1].num_batches_tracked.zero_()
    assert told(model) == []
    model = net(3e-4, shift=0.0)  # what comes in has the initial statistics already
    with torch.no_grad():
        h = model[0](batches()[0][0])
        model[0].weight.div_(h.std(0)[:, None])
        model[0].bias.copy_(-model[0](batches()[0][0]).mean(0))
    assert told(model) == []
