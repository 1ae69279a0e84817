"""Causes that hide others, and relations that simple tests do not see: each in the fault, and silent in its twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.errors import InputError
from gramian.inspection.causes.dependence import labels_depend


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def told(report: Any) -> dict[str, str]:
    return {f.code: f.severity for f in report.findings if f.severity != "info"}


def test_labels_that_tell_whether_two_inputs_point_one_way() -> None:
    """The power against linear labels is high, and says nothing of products: no alarm, and a line that says so."""
    one, other = draw(256, 60, seed=1), draw(256, 60, seed=2)
    y = ((one * other).sum(1) > 0).long()
    test = labels_depend([[one, other]], [y])
    assert test is not None
    assert test.p_value > test.level
    assert not test.are_independent
    model = nn.Sequential(nn.Bilinear(60, 60, 16), nn.ReLU(), nn.Linear(16, 2))
    model.forward = lambda a, b: model[2](model[1](model[0](a, b)))  # type: ignore[method-assign]
    report = gm.inspect(model, [((one, other), y)], lambda m, b: F.cross_entropy(m(*b[0]), b[1]))
    assert "labels-independent" not in told(report)
    assert "whether labels depend on inputs" in report.not_looked_at


def test_shuffled_labels_of_few_features_are_told() -> None:
    x = draw(256, 3)
    y = (x @ draw(3, 4, seed=1)).argmax(1)
    for labels, independent in ((y, False), (y[torch.randperm(256, generator=torch.Generator().manual_seed(2))], True)):
        test = labels_depend([[x]], [labels])
        assert test is not None
        assert test.are_independent is independent


class Difference(nn.Module):
    """What two inputs differ by after one encoder; the first is taken for both, or not."""

    def __init__(self, *, twice: bool) -> None:
        super().__init__()
        self.twice = twice
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.head = nn.Linear(16, 1)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        a, b = self.encoder(one), self.encoder(one if self.twice else other)
        return self.head((a - b).square()).squeeze(1)


@pytest.mark.parametrize("twice", [False, True])
def test_an_input_that_another_takes_the_place_of(twice: bool) -> None:
    torch.manual_seed(0)
    one, other = draw(64, 6, seed=1), draw(64, 6, seed=2)
    y = ((one - other).square().sum(1) > 12).float()
    report = gm.inspect(
        Difference(twice=twice),
        [((one, other), y)],
        lambda m, b: F.binary_cross_entropy_with_logits(m(*b[0]), b[1]),
    )
    assert told(report).get("input-unused") == ("error" if twice else None)
    if twice:  # what follows from it is information
        assert list(told(report)) == ["input-unused"]
        assert "batch[0][1]" in report.findings[0].title


class Tagged(nn.Module):
    """A vector of its own is added to the features: a parameter, a buffer, or a tensor that nothing registers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        if kind == "parameter":
            self.tag = nn.Parameter(torch.zeros(8))
        elif kind == "buffer":
            self.register_buffer("tag", torch.zeros(8))
        else:
            self.tag = torch.zeros(8, requires_grad=kind == "leaf")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x) + self.tag))


@pytest.mark.parametrize("kind", ["parameter", "buffer", "constant", "leaf"])
def test_a_tensor_with_a_gradient_that_is_no_parameter(kind: str) -> None:
    torch.manual_seed(0)
    x = draw(32, 5)
    y = (x @ draw(5, 3, seed=1)).argmax(1)
    report = gm.inspect(Tagged(kind), [(x, y)], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    assert told(report).get("parameter-unregistered") == ("error" if kind == "leaf" else None)


class Derived(nn.Module):
    """The derivative of a scalar by the input, which is kept: a leaf with a gradient, and no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            self.x = x.detach().requires_grad_()
            return torch.autograd.grad(self.net(self.x).sum(), self.x, create_graph=True)[0]


def test_an_input_that_the_model_keeps_is_no_parameter() -> None:
    torch.manual_seed(0)
    model, x = Derived(), draw(64, 2)
    model(x)
    report = gm.inspect(model, [(x, x.flip(1))] * 2, lambda m, b: F.mse_loss(m(b[0]), b[1]))
    assert "parameter-unregistered" not in told(report)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(12, 8, padding_idx=0), nn.GRU(8, 16, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[1][-1])


def test_what_long_padding_makes_follows_from_reading_it() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 12, (64, 60), generator=generator)
    lengths = torch.randint(3, 8, (64,), generator=generator)
    tokens[torch.arange(60) >= lengths[:, None]] = 0
    y = tokens[:, 0] % 2
    report = gm.inspect(Reader(), [(tokens, y)], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    assert next(iter(told(report))) == "padding-read"
    assert "padding-read" in {f.follows for f in report.findings}


def test_a_batch_of_ignored_labels_is_told_as_such() -> None:
    batch = (draw(8, 4), torch.full((8,), -100))
    with pytest.raises(InputError, match="at least one unit, as a label"):
        gm.inspect(nn.Linear(4, 3), [batch], gm.Objective.classification())
