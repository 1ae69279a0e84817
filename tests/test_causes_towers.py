"""Encoders that are called twice, losses of normalized outputs, several heads, recurrent weights, and hidden scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.inspection.causes.dependence import POWER, labels_depend
from gramian.report import Finding

Loss = Callable[[nn.Module, Any], Tensor]
CLASSIFY = gm.Objective.classification()


def told(model: nn.Module, batches: list[Any], loss: Loss | gm.Objective, **options: Any) -> list[Finding]:
    report = gm.inspect(model, batches, loss, **options)
    assert not any("failed" in why or "a fault of" in why for why in report.not_looked_at.values())
    return [f for f in report.findings if f.severity != "info"]


def codes(*args: Any, **options: Any) -> list[str]:
    return [f.code for f in told(*args, **options)]


class Encoder(nn.Module):
    """Embeddings with a norm, and dropout behind it."""

    def __init__(self, norm: nn.Module | None = None, *, unit: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm, self.unit = nn.Linear(12, 16), norm or nn.Identity(), unit
        self.drop, self.outer = nn.Dropout(0.1), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        z = self.outer(self.drop(F.silu(self.norm(self.inner(x)))))
        return F.normalize(z, dim=-1) if self.unit else z


def pairs() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    drawn = [torch.randn(3, 32, 12, generator=g) for _ in range(3)]
    return [{"left": x[0] + 0.2 * x[1], "right": x[0] + 0.2 * x[2]} for x in drawn]


def of_both(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    return lambda model, batch: loss(model(batch["left"]), model(batch["right"]))


def contrast(left: Tensor, right: Tensor) -> Tensor:
    return F.cross_entropy(left @ right.T / 0.1, torch.arange(len(left)))


def cosine(left: Tensor, right: Tensor) -> Tensor:
    return (1 - (left * right).sum(-1)).mean()


def squares(left: Tensor, right: Tensor) -> Tensor:
    return (left - right).square().sum(-1).mean()


@pytest.mark.parametrize("norm", [nn.GroupNorm(4, 16), nn.BatchNorm1d(16), nn.LayerNorm(16)])
def test_a_norm_of_zero_in_an_encoder_that_is_called_twice(norm: nn.Module) -> None:
    nn.init.zeros_(norm.weight)
    found = told(Encoder(norm), pairs(), of_both(contrast))
    assert [(f.code, f.where) for f in found] == [("norm-zero-gain", "norm")]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (cosine, ["loss-collapses"]),
        (squares, ["loss-collapses"]),
        (contrast, []),
        (lambda left, right: squares(left, right) + (-2 * torch.pdist(left).square()).exp().mean().log(), []),
    ],
)
def test_losses_of_normalized_embeddings(loss: Callable[[Tensor, Tensor], Tensor], expected: list[str]) -> None:
    assert codes(Encoder(), pairs(), of_both(loss)) == expected


def test_products_of_free_embeddings_do_not_collapse() -> None:
    assert "loss-collapses" not in codes(Encoder(unit=False), pairs(), of_both(cosine))  # they grow instead


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.kind, self.place = nn.Linear(6, 32), nn.Linear(32, 3), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x).relu()
        return {"kind": self.kind(h), "place": self.place(h)}


def with_heads(shuffled: str = "") -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(480, 6, generator=g)
    data = {"x": x, "kind": x[:, :3].argmax(1), "place": 2 * x[:, :2] - x[:, 2:4]}
    if shuffled:
        data[shuffled] = data[shuffled][torch.randperm(len(x), generator=g)]
    return [{name: t[i : i + 40] for name, t in data.items()} for i in range(0, len(x), 40)]


def of_heads(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    made = model(batch["x"])
    return F.cross_entropy(made["kind"], batch["kind"]) + F.mse_loss(made["place"], batch["place"])


@pytest.mark.parametrize("shuffled", ["", "kind", "place"])
def test_labels_of_one_of_two_heads_that_were_shuffled(shuffled: str) -> None:
    found = told(Heads(), with_heads(shuffled), of_heads)
    assert [f.code for f in found] == ["labels-independent"] * bool(shuffled)
    assert all(f'batch["{shuffled}"]' in f.title for f in found)


@pytest.mark.parametrize(
    ("end", "expected"),
    [(torch.relu, "loss-rectified"), (torch.tanh, "loss-double-softmax"), (nn.Sigmoid(), "loss-double-softmax")],
)
def test_scores_of_one_of_two_heads_behind_an_activation(end: Callable[[Tensor], Tensor], expected: str) -> None:
    """The other head is the last to use a parameter, so that the order of operations tells nothing."""
    model = Heads()
    model.kind = nn.Sequential(model.kind, Function(end))
    assert codes(model, with_heads(), of_heads) == [expected]


@pytest.mark.parametrize(("num_ids", "is_seen"), [(6, True), (150, False)])
def test_ratings_depend_on_who_rates_what(num_ids: int, is_seen: bool) -> None:
    """Labels shuffled apart from two columns of codes, and whether the tests would see products of the two."""
    g = torch.Generator().manual_seed(0)
    users, items = torch.randint(num_ids, (2, 1024), generator=g)
    test = labels_depend([[users, items]], [torch.randint(2, (1024,), generator=g)])
    assert test is not None
    assert test.linear_power >= POWER
    assert test.are_independent is is_seen
    likes = torch.randn(2, num_ids, generator=g)
    tested = labels_depend([[users, items]], [(likes[0][users] * likes[1][items] > 0).long()])
    assert tested is not None
    assert (tested.p_value < tested.level) is is_seen


def test_choices_whose_outcome_weighs_their_loss_are_no_labels() -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        each = F.cross_entropy(model(batch["x"])["kind"], batch["kind"], reduction="none")
        return (each * batch["place"][:, 0]).mean()

    assert "labels-independent" not in codes(Heads(), with_heads("kind"), loss)


@pytest.mark.parametrize("by_bias", [False, True])
def test_an_offset_of_scores_is_due_to_that_of_the_inputs_or_to_the_bias(by_bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(128, 6, generator=g)
    batch = x if by_bias else x - 400, (x[:, :1] > 0).float()
    if by_bias:
        nn.init.constant_(model[2].bias, 40.0)
    report = gm.inspect(model, [batch], lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[1]))
    found = {f.code: f for f in report.findings}
    assert report.findings[0].code == ("head-offset" if by_bias else "input-offset")
    assert report.findings[0].severity == "error"
    assert by_bias or found["head-input-offset"].follows == "input-offset"


class Recurrent(nn.Module):
    def __init__(self, kind: str, inputs: int = 10, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = getattr(nn, kind)(inputs, 16, batch_first=True, **options)
        self.head = nn.Sequential(nn.Linear(32 if self.rnn.bidirectional else 16, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].mean(1))


@pytest.mark.parametrize(
    ("kind", "part"), [("RNN", "weight_ih"), ("GRU", "weight_ih_l0_reverse"), ("LSTM", "weight_hh"), ("GRU", "")]
)
def test_weights_that_saturate_a_recurrent_cell(kind: str, part: str) -> None:
    model = Recurrent(kind, num_layers=2, bidirectional=True)
    large = [n for n, _ in model.rnn.named_parameters() if part and n.startswith(part)]
    with torch.no_grad():
        for name in large:
            getattr(model.rnn, name).mul_(200)
    g = torch.Generator().manual_seed(0)
    found = told(model, [(torch.randn(16, 6, 10, generator=g), torch.arange(16) % 3)], CLASSIFY)
    assert [f.code for f in found] == ["parameter-scale-large"] * bool(large)
    assert all(f.where == ", ".join(f"rnn.{name}" for name in large) for f in found)


def test_many_inputs_of_which_most_are_zero_saturate_no_cell() -> None:
    x = F.one_hot(torch.randint(4000, (16, 6), generator=torch.Generator().manual_seed(0)), 4000).float()
    assert "parameter-scale-large" not in codes(Recurrent("GRU", 4000), [(x, torch.arange(16) % 3)], CLASSIFY)


class Relative(torch.optim.Optimizer):
    """Steps of a share of each parameter's size."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad * (0.01 * p.norm() / p.grad.norm().clamp(min=1e-12)))


@pytest.mark.parametrize(
    ("norm", "optimizer", "is_told"),
    [
        (nn.GroupNorm(4, 16), torch.optim.SGD, True),
        (nn.BatchNorm2d(16), torch.optim.Adam, True),
        (nn.GroupNorm(4, 16), Relative, False),
    ],
)
def test_weights_that_a_norm_hides(norm: nn.Module, optimizer: type[torch.optim.Optimizer], is_told: bool) -> None:
    torch.manual_seed(0)
    last = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)]
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), norm, *last)
    with torch.no_grad():
        model[2].weight.mul_(200)
    batch = torch.randn(16, 1, 8, 8), torch.arange(16) % 3
    found = told(model, [batch], CLASSIFY, optimizer=optimizer(model.parameters()))
    found = [f for f in found if f.code != "rate-too-low"]  # of SGD's rate for the others
    assert [(f.code, f.where) for f in found] == [("parameter-scale-large", "2.weight")] * is_told


@pytest.mark.parametrize(
    ("size", "norm", "expected"), [(1, nn.BatchNorm2d, ["norm-few-values"]), (2, nn.BatchNorm2d, [])]
)
def test_batch_norms_of_one_image(size: int, norm: type[nn.Module], expected: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), norm(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))
    batches = [(torch.randn(size, 1, 8, 8), torch.arange(size) + i) for i in range(2)]
    assert codes(model, batches, CLASSIFY) == expected


def test_why_there_is_no_jacobian() -> None:
    torch.manual_seed(0)
    norm = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    reason = gm.inspect(norm, [(torch.randn(16, 6), torch.arange(16) % 3)], CLASSIFY).not_looked_at
    assert reason["end-to-end Jacobian"].endswith(
        "batch norms, 1 first, use the statistics of the batch, as they do in training"
    )
