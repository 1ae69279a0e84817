"""Causes of networks that did not train as people reported them, and networks like them that do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm

CLASSIFY = gm.Objective.classification()
FEATURES, CLASSES = 16, 10


def batches(num: int = 128) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(num, FEATURES, generator=torch.Generator().manual_seed(0))
    return list(zip(x.split(32), x[:, :CLASSES].argmax(1).split(32), strict=True))


def net(num_outputs: int, *end: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, num_outputs), *end)


def look(model: nn.Module, data: list, loss: Any, rate: float = 0.0) -> list[gm.Finding]:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate) if rate else None
    return gm.inspect(model, data, loss, optimizer=optimizer).findings


def loud(found: list[gm.Finding]) -> dict[str, str]:
    """The places of errors and warnings by their codes, in their order."""
    return {f.code: f.where for f in found if f.severity != "info"}


def test_a_relu_of_the_loss_has_no_units():
    def hinge(model: nn.Module, batch: Any) -> Tensor:
        lengths = model(batch[0]).tanh()
        wanted = F.one_hot(batch[1], CLASSES)
        return (wanted * F.relu(0.9 - lengths) + (1 - wanted) * F.relu(lengths - 5.0)).sum(1).mean()

    assert "dead-units" not in {f.code for f in look(net(CLASSES), batches(), hinge)}


class Raw(nn.Module):
    """Three characters that predict the next one, by parameters of its own."""

    def __init__(self, scale: float, *, is_tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(27, 8 * 3 if is_tied else 8)
        self.inner = nn.Parameter(torch.randn(24, 24) * 24**-0.5)
        self.outer = None if is_tied else nn.Parameter(torch.randn(24, 27) * scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.outer is None:
            h = self.table(x).mean(1)
            return F.layer_norm(h + torch.tanh(h @ self.inner), (24,)) @ self.table.weight.T
        return torch.tanh(self.table(x).flatten(1) @ self.inner) @ self.outer


def words(num: int = 128) -> list[tuple[Tensor, Tensor]]:
    """Contexts of which a few are frequent, as at the beginnings of words, and many come once."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(27, (num, 3), generator=generator)
    x[: num // 2] = x[torch.randint(3, (num // 2,), generator=generator)]
    order = torch.randperm(num, generator=generator)
    y = torch.randint(27, (num,), generator=generator)
    return list(zip(x[order].split(32), y[order].split(32), strict=True))


@pytest.mark.parametrize(
    ("model", "code", "place"),
    [
        (Raw(3.0), "head-scale", "outer"),
        (Raw(0.1), "", ""),
        (Raw(0.0, is_tied=True), "embedding-scale", "table.weight"),
    ],
)
def test_a_loss_far_above_guessing_names_the_head(model: Raw, code: str, place: str):
    found = look(model, words(), CLASSIFY)
    assert "input-duplicates" not in {f.code for f in found}  # words repeat
    assert loud(found).get(code) == (place or None)


def test_few_sentences_that_are_drawn_again_are_told():
    x = torch.randint(27, (20, 3), generator=torch.Generator().manual_seed(0))[torch.arange(128) % 20]
    assert "input-duplicates" in loud(look(Raw(0.1), [(x, x[:, 0])], CLASSIFY))


def test_cosines_with_a_margin_start_above_guessing_on_purpose():
    class Margin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.classes = net(24), nn.Parameter(torch.randn(CLASSES, 24))

    def loss(model: Any, batch: Any) -> Tensor:
        cosines = F.normalize(model.body(batch[0])) @ F.normalize(model.classes).T
        inside = torch.where(F.one_hot(batch[1], CLASSES) > 0, torch.cos(torch.acos(cosines * 0.999) + 0.5), cosines)
        return F.cross_entropy(64 * inside, batch[1])

    assert "head-scale" not in {f.code for f in look(Margin(), batches(), loss)}


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell, self.end = nn.Embedding(8, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.cell(self.table(x))[0]).mT


@pytest.mark.parametrize("is_reversed", [True, False])
def test_a_sequence_that_is_reversed_is_a_task(is_reversed: bool):
    x = torch.randint(8, (128, 12), generator=torch.Generator().manual_seed(0))
    found = look(Tagger(), [(x, x.flip(1) if is_reversed else x.roll(3, 1))], CLASSIFY)
    assert ("labels-independent" in loud(found)) != is_reversed


def test_gradients_that_are_infinite_are_not_equal_ones():
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))

    def angle(model: nn.Module, batch: Any) -> Tensor:
        return F.cosine_similarity(model(batch[0]), batch[1]).clamp(-1, 1).acos().mean()

    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3))
        model.bias.zero_()
    assert list(loud(look(model, [(x, 2 * x)], angle))) == ["gradient-overflow"]


class Schedule(nn.Module):
    def __init__(self, largest: float) -> None:
        super().__init__()
        self.body = net(FEATURES)
        self.a: Tensor
        self.register_buffer("a", (1 - torch.linspace(0, largest, 10)).cumprod(0).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.a[torch.arange(len(x)) % 10, None]


def test_a_buffer_is_not_repaired_by_a_rate():
    found = look(Schedule(2.0), batches(), lambda m, b: F.mse_loss(m(b[0]), b[0]))
    assert loud(found) == {"non-finite-weights": "a"}
    assert "line that makes a" in found[0].advice


def roots(model: nn.Module, batch: Any) -> Tensor:
    z = model(batch[0])
    return torch.where(z > 0, z.sqrt(), z).square().mean()


def logarithms(model: nn.Module, batch: Any) -> Tensor:
    return -(F.one_hot(batch[1], CLASSES) * model(100 * batch[0]).softmax(1).log()).sum(1).mean()


def later_roots(model: nn.Module, batch: Any) -> Tensor:
    z = model(batch[0])
    return F.cross_entropy(z, batch[1]) + (F.relu(z.mean() + 0.02) + 0 * z.mean()).sqrt()


@pytest.mark.parametrize(
    ("loss", "rate", "code", "operation"),
    [(roots, 0.1, "gradient-overflow", "sqrt"), (logarithms, 0.1, "loss-non-finite", "log"),
     (later_roots, 0.5, "gradient-overflow", "sqrt")],
)  # fmt: skip
def test_lost_weights_lead_to_what_lost_them(loss: Callable, rate: float, code: str, operation: str):
    model = net(CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model, batches()[0]).backward()
        optimizer.step()
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert any(p.isnan().any() for p in kept.values())
    found = look(model, batches(), loss, rate)
    origin = next(f for f in found if f.code == code)
    assert code in loud(found)
    assert operation in origin.title
    assert next(f for f in found if f.code == "non-finite-weights").follows == next(iter(loud(found)))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), kept[name], rtol=0, atol=0, equal_nan=True)


class Attention(nn.Module):
    """Attention written by hand, with a mask of padding along the queries or the keys."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.three, self.end, self.dim = nn.Embedding(12, 8, 0), nn.Linear(8, 24), nn.Linear(8, 3), dim

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.three(self.table(x)).chunk(3, -1)
        scores = (q @ k.mT).masked_fill((x == 0).unsqueeze(self.dim), -math.inf)
        return self.end((scores.softmax(-1) @ v)[:, 0])


@pytest.mark.parametrize(("dim", "expected"), [(2, ["attention-masked"]), (1, [])])
def test_a_mask_of_queries_loses_the_gradient(dim: int, expected: list[str]):
    x = torch.randint(1, 12, (64, 6), generator=torch.Generator().manual_seed(0))
    x[:, 4:] = 0
    found = loud(look(Attention(dim), [(x, x[:, 0] % 3)], CLASSIFY))
    assert [code for code in found if code in ("attention-masked", "gradient-overflow", "loss-non-finite")] == expected


@pytest.mark.parametrize("end", [nn.Sigmoid(), nn.Tanh(), nn.Softmax(1)])
@pytest.mark.parametrize("between", [nn.Identity(), nn.ReLU()])
def test_a_function_at_the_end_hides_no_affine_map(end: nn.Module, between: nn.Module):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 8), between, nn.Linear(8, CLASSES), end)
    found = look(model, batches(), lambda m, b: (m(b[0]) - F.one_hot(b[1], CLASSES)).square().mean())
    assert ("no-nonlinearity" in loud(found)) == isinstance(between, nn.Identity)


@pytest.mark.parametrize(("factor", "is_told"), [(1.0, True), (4.0, False)])
def test_a_range_goes_through_a_factor(factor: float, is_told: bool):
    class Actor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net(2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.body(x)) * factor

    data = [(x, 3 * torch.sin(2 * x[:, :2])) for x, _ in batches()]
    found = look(Actor(), data, lambda m, b: F.mse_loss(m(b[0]), b[1]))
    assert ("output-range" in loud(found)) == is_told


@pytest.mark.parametrize(("divisor", "is_told"), [(1, True), (9, False)])
def test_classes_are_no_probabilities(divisor: int, is_told: bool):
    def entropy(model: nn.Module, batch: Any) -> Tensor:
        p, t = model(batch[0])[:, 0], batch[1].float() / divisor
        return -(t * (p + 1e-7).log() + (1 - t) * (1 - p + 1e-7).log()).mean()

    assert ("output-range" in loud(look(net(1, nn.Sigmoid()), batches(), entropy))) == is_told


@pytest.mark.parametrize(
    ("factor", "severity"), [(lambda e: 1e-4 * 0.95**e, "warning"), (lambda e: (e + 1) / 2e3, "info")]
)
def test_a_rate_is_no_factor(factor: Callable[[int], float], severity: str):
    model = net(CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    found = gm.inspect(model, batches(), CLASSIFY, optimizer=optimizer).findings
    assert [f.severity for f in found if f.code == "rate-too-low"] == [severity]


def test_a_rare_class_is_information():
    x = torch.randn(200, FEATURES, generator=torch.Generator().manual_seed(0))
    found = look(net(2), [(x, (x[:, 0] > 2.2).long())], CLASSIFY)
    assert [f.severity for f in found if f.code == "labels-imbalanced"] == ["info"]
