"""Rules for causes: each planted fault is named first and in its place, and its healthy control gives no trouble."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gramian as gm

CLASSIFY = gm.Objective.classification()
N, D, C = 128, 16, 3


def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    return x, x[:, :C].argmax(1)


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(D, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, C))


def zeroed(m: nn.Sequential) -> nn.Module:
    nn.init.zeros_(m[2].weight)
    return m


def constant(m: nn.Sequential) -> nn.Module:
    nn.init.constant_(m[2].weight, 0.1)
    return m


def with_nan(m: nn.Sequential) -> nn.Module:
    m[2].weight.data[0, 0] = math.nan
    return m


def dead(m: nn.Sequential) -> nn.Module:
    nn.init.constant_(m[2].bias, -50.0)
    return m


def frozen(m: nn.Sequential) -> nn.Module:
    m[2].requires_grad_(False)
    return m


def ended(last: nn.Module) -> Callable:
    return lambda m: nn.Sequential(*m, last)


MODELS = [
    ("zero-weights", "2.weight", zeroed),
    ("parameter-constant", "2.weight", constant),
    ("non-finite-weights", "2.weight", with_nan),
    ("dead-units", "2", dead),
    ("parameter-frozen", "2", frozen),
    ("loss-double-softmax", "loss", ended(nn.Softmax(-1))),
    ("loss-rectified", "loss", ended(nn.ReLU())),
    ("dropout-rate", "5", ended(nn.Dropout(0.95))),
]
DATA = [
    ("input-offset", "data", lambda x, y: (x + 100, y)),
    ("input-scale", "data", lambda x, y: (x * 1000, y)),
    ("input-constant", "data", lambda x, y: (x[:1].expand(N, -1).clone(), y)),
    ("input-dominated", "data", lambda x, y: (x * torch.tensor([100.0] + [1.0] * (D - 1)), y)),
    ("input-non-finite", "data", lambda x, y: (x.masked_fill(torch.arange(N)[:, None] == 3, math.nan), y)),
    ("labels-constant", "labels", lambda x, y: (x, torch.zeros_like(y))),
    ("labels-out-of-range", "labels", lambda x, y: (x, y + 1)),
]


def troubles(report: gm.Report) -> list[str]:
    return [f.code for f in report.findings if f.severity != "info"]


def first_is(report: gm.Report, code: str, where: str) -> None:
    assert report.findings, code
    assert (report.findings[0].code, report.findings[0].where) == (code, where)


@pytest.fixture(scope="module")
def control() -> gm.Report:
    return gm.inspect(mlp(), [data()], CLASSIFY)


def test_the_healthy_control_has_no_trouble(control) -> None:
    assert troubles(control) == []


@pytest.mark.parametrize(("code", "where", "plant"), MODELS, ids=[m[0] for m in MODELS])
def test_a_fault_of_the_model_is_named_first(control, code, where, plant) -> None:
    first_is(gm.inspect(plant(mlp()), [data()], CLASSIFY), code, where)
    assert code not in troubles(control)


@pytest.mark.parametrize(("code", "where", "plant"), DATA, ids=[m[0] for m in DATA])
def test_a_fault_of_the_data_is_named_first(control, code, where, plant) -> None:
    first_is(gm.inspect(mlp(), [plant(*data())], CLASSIFY), code, where)
    assert code not in troubles(control)


def test_batches_in_the_order_of_their_classes(control) -> None:
    x, y = data()
    order = y.argsort()
    batches = [(x[part], y[part]) for part in order.chunk(4)]
    first_is(gm.inspect(mlp(), batches, CLASSIFY), "labels-sorted", "labels")
    first_is(gm.inspect(mlp(), [(x, y) for x, y in reversed(batches)][:1], CLASSIFY), "labels-constant", "labels")
    within = [(x[part], y[part]) for part in (half[y[half].argsort()] for half in torch.arange(N).chunk(2))]
    assert "labels-sorted" not in {f.code for f in gm.inspect(mlp(), within, CLASSIFY).findings}


class WithBias(nn.Module):
    """One number for each sample, to which a table that starts at zero is added last."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table = nn.Linear(D, 1), nn.Embedding(7, 1)
        nn.init.zeros_(self.table.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) + self.table(torch.arange(len(x)) % 7))[:, 0]


def test_what_starts_at_zero_does_not_block_the_input() -> None:
    x, _ = data()
    report = gm.inspect(WithBias(), [(x, x[:, 0])], gm.Objective.regression())
    assert "zero-weights" not in troubles(report)


def test_optimizers() -> None:
    model = mlp()
    good = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert troubles(gm.inspect(model, [data()], CLASSIFY, optimizer=good)) == []
    for code, bad in (
        ("parameter-not-stepped", torch.optim.SGD(model[0].parameters(), lr=0.1)),
        ("momentum-too-high", torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.999)),
        ("rate-too-high", torch.optim.AdamW(model.parameters(), lr=10.0)),
        ("rate-too-low", torch.optim.AdamW(model.parameters(), lr=1e-9)),
    ):
        before = copy.deepcopy(model.state_dict())
        assert gm.inspect(model, [data()], CLASSIFY, optimizer=bad).findings[0].code == code
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Uncopied(torch.optim.SGD):
    def __deepcopy__(self, memo):
        raise TypeError("not copied")


def test_an_optimizer_that_cannot_be_copied_is_a_note() -> None:
    model = mlp()
    report = gm.inspect(model, [data()], CLASSIFY, optimizer=Uncopied(model.parameters(), lr=0.1))
    assert "optimizer's steps" in report.not_looked_at
    assert "Not looked at: optimizer's steps (" in report.verdict


class Tuple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x), x


def plain(m, b):
    out = m(b[0])
    return F.cross_entropy((out[0] if isinstance(out, tuple) else out).float(), b[1])


HOSTILE = {
    "frozen": (lambda: mlp().requires_grad_(False), data, plain),
    "evaluation": (lambda: mlp().eval(), data, plain),
    "one sample": (mlp, lambda: tuple(t[:1] for t in data()), plain),
    "double": (lambda: mlp().double(), lambda: (data()[0].double(), data()[1]), plain),
    "bfloat16": (lambda: mlp().bfloat16(), lambda: (data()[0].bfloat16(), data()[1]), plain),
    "tuple": (Tuple, data, plain),
    "dict": (mlp, lambda: {"x": data()[0], "labels": data()[1]}, lambda m, b: F.cross_entropy(m(b["x"]), b["labels"])),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_unusual_models_do_not_crash(name) -> None:
    make, batch, loss = HOSTILE[name]
    assert gm.inspect(make(), [batch()], loss).verdict
