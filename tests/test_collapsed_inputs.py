"""Samples that become the same at once: the place is named; and networks in which that is on purpose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gramian as gm

WIDTH, LENGTH = 16, 8
CLASSIFY = gm.Objective.classification()


class Rounded(nn.Module):
    """A straight-through estimator."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return x + ((x / self.step).round() * self.step - x).detach()


class Pooled(nn.Module):
    """A mean over all samples between two layers, or none."""

    def __init__(self, *, over_all: bool) -> None:
        super().__init__()
        self.body, self.head, self.over_all = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2), over_all

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).relu()
        return self.head(h.mean(0, keepdim=True).expand_as(h) if self.over_all else h)


class Asks(nn.Module):
    """Attention with a learned query, of rows that zeros fill up."""

    def __init__(self, *, inverted: bool) -> None:
        super().__init__()
        self.query, self.inverted = nn.Parameter(torch.randn(1, 1, WIDTH)), inverted
        self.to_query, self.body = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        padding, h = (x == 0).all(-1) ^ self.inverted, self.body(x)
        query = self.to_query(self.query.expand(len(x), -1, -1))
        return self.head(self.attention(query, h, h, key_padding_mask=padding, need_weights=False)[0][:, 0])


def told(model: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    y = (x.flatten(1)[:, 0] > 0).long()
    found = [f for f in gm.inspect(model, [(x, y)], CLASSIFY).findings if f.severity != "info"]
    assert all(f.action is None for f in found)
    return [(f.code, f.where) for f in found]


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(64, WIDTH)


@pytest.mark.parametrize(("step", "found"), [(0.05, []), (64.0, [("samples-indistinguishable", "2")])])
def test_activations_that_round_to_zero(x: Tensor, step: float, found: list) -> None:
    body = [nn.Linear(WIDTH, WIDTH), nn.ReLU(), Rounded(step), nn.Linear(WIDTH, WIDTH), nn.ReLU(), Rounded(step)]
    assert told(nn.Sequential(*body, nn.Linear(WIDTH, 2)), x) == found


def test_a_mean_over_all_samples(x: Tensor) -> None:
    assert told(Pooled(over_all=False), x) == []
    found = gm.inspect(Pooled(over_all=True), [(x, (x[:, 0] > 0).long())], CLASSIFY).findings
    assert {f.code: f.where for f in found}["samples-indistinguishable"] == "between body and head"


def test_a_mask_that_shows_vectors_of_zeros_alone(x: Tensor) -> None:
    rows = torch.randn(64, LENGTH, WIDTH)
    rows[torch.arange(LENGTH) >= torch.randint(3, LENGTH, (64, 1))] = 0
    assert told(Asks(inverted=False), rows) == []  # whose query is the same for all samples
    assert [code for code, _ in told(Asks(inverted=True), rows)] == ["attention-masked"]
