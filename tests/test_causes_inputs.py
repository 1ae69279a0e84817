"""Causes in any of the inputs, and those that a small change shows: each in the fault, and silent in its twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.inspection.causes.inputs import _spread


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, high: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def found(model: nn.Module, batches: Any, loss: Callable | gm.Objective, **options: Any) -> dict[str, str]:
    """Codes that are told, with their severities."""
    report = gm.inspect(model, batches, loss, **options)
    return {f.code: f.severity for f in report.findings if f.severity != "info"}


class Table(nn.Module):
    """Codes and numbers, side by side before the first layer that takes both."""

    def __init__(self, *, joined: bool) -> None:
        super().__init__()
        self.joined = joined
        self.embedding = nn.Embedding(6, 4)
        self.numbers = nn.Linear(3, 8)
        self.rest = nn.Sequential(nn.Linear(7 if joined else 12, 32), nn.Tanh(), nn.Linear(32, 2))

    def forward(self, codes: Tensor, numbers: Tensor) -> Tensor:
        e = self.embedding(codes)
        return self.rest(torch.cat((e, numbers if self.joined else self.numbers(numbers)), 1))


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_a_column_of_the_second_input_in_other_units(joined: bool, named: bool) -> None:
    def batches(scale: float) -> list[Any]:
        made = []
        for seed in range(3):
            codes, x = tokens(64, high=6, seed=seed), draw(64, 3, seed=seed)
            y = (x.sum(1) + codes / 3 > 1).long()
            x = x * torch.tensor([1.0, 1.0, scale])
            made.append({"codes": codes, "numbers": x, "labels": y} if named else ((codes, x), y))
        return made

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if named:
            return F.cross_entropy(model(batch["codes"], batch["numbers"]), batch["labels"])
        return F.cross_entropy(model(*batch[0]), batch[1])

    torch.manual_seed(0)
    told = gm.inspect(Table(joined=joined), batches(1e4), loss).findings
    (finding,) = [f for f in told if f.code == "input-dominated"]
    assert finding.severity == "error"
    assert finding.where == ("rest.0" if joined else "numbers")
    assert ('batch["numbers"]' if named else "batch[0][1]") in finding.title
    assert not found(Table(joined=joined), batches(1.0), loss)


class Timed(nn.Module):
    def __init__(self, *, raw: bool) -> None:
        super().__init__()
        self.raw = raw
        self.time = nn.Linear(1 if raw else 8, 16)
        self.first, self.last = nn.Linear(2, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * 10.0 ** -torch.arange(4)
        e = t[:, None].float() if self.raw else torch.cat((angles.sin(), angles.cos()), 1)
        return self.last(F.silu(self.first(x) + self.time(e)))


def diffusion(*, fresh: bool = False) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(x, t, noise), where `fresh` noise is not that of x."""
    made = []
    for seed in range(4):
        noise, t = draw(128, 2, seed=seed), tokens(128, high=1000, seed=seed)
        share = (t / 1000)[:, None]
        x = (1 - share).sqrt() * draw(128, 2, seed=seed + 10).sign() + share.sqrt() * noise
        made.append((x, t, draw(128, 2, seed=seed + 20) if fresh else noise))
    return made


def noise_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0], batch[1]), batch[2])


def test_a_time_of_up_to_1000_before_a_linear_layer() -> None:
    torch.manual_seed(0)
    assert found(Timed(raw=True), diffusion(), noise_loss) == {"input-scale": "warning"}
    assert not found(Timed(raw=False), diffusion(), noise_loss)


@pytest.mark.parametrize("is_picture", [True, False])
def test_sines_and_cosines_are_advised_for_no_picture(is_picture: bool) -> None:
    torch.manual_seed(0)

    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.code, self.last = nn.Embedding(4, 2), nn.Linear(2, 2)
            self.first = nn.Conv2d(1, 2, 3) if is_picture else nn.Linear(3, 2)

        def forward(self, code: Tensor, given: Tensor) -> Tensor:
            made = self.first(given)
            return self.last(self.code(code) + (made.mean((-1, -2)) if is_picture else made))

    x = 128 + 60 * (draw(64, 1, 4, 4) if is_picture else draw(64, 3))
    batches = [{"code": tokens(64, high=4), "given": x, "labels": tokens(64, high=2)}]
    report = gm.inspect(Stem(), batches, gm.Objective.classification())
    finding = next(f for f in report.findings if f.code == "input-scale")
    assert ("sines" in finding.remedy) != is_picture, finding.remedy
    assert report.not_looked_at["whether labels depend on inputs"] == "64 samples, and 100 or more are needed"


def test_lengths_that_stand_where_labels_are_read_are_told() -> None:
    x, lengths = tokens(32, 6, high=8), 1 + tokens(32, high=6)
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 3))
    batches = [(x, lengths, x % 3)]
    (finding,) = (
        f for f in gm.inspect(model, batches, gm.Objective.classification()).findings if f.severity == "error"
    )
    assert "looks like lengths" in finding.title
    assert "(inputs, labels, weights)" in finding.cause

    def own(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[2].flatten())

    assert "labels-out-of-range" not in found(model, batches, own)


def test_targets_that_depend_on_none_of_several_inputs() -> None:
    torch.manual_seed(0)
    assert found(Timed(raw=False), diffusion(fresh=True), noise_loss) == {"labels-independent": "warning"}


def test_targets_that_depend_on_a_product_of_two_inputs() -> None:
    """Neither a neighborhood nor a linear test sees it."""
    torch.manual_seed(0)
    batches = []
    for seed in range(4):
        a, b = draw(128, 4, seed=seed), draw(128, 4, seed=seed + 10)
        batches.append((a, b, torch.tanh((a * b).sum(1))))
    model = nn.Bilinear(4, 4, 1)
    assert "labels-independent" not in found(model, batches, lambda m, b: F.mse_loss(m(b[0], b[1])[:, 0], b[2]))


class Recurrent(nn.Module):
    def __init__(self, *, detach: bool) -> None:
        super().__init__()
        self.detach = detach
        self.embedding, self.cell, self.head = nn.Embedding(10, 8), nn.GRUCell(8, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 8)
        for e in self.embedding(x).unbind(1):
            h = self.cell(e, h.detach() if self.detach else h)
        return self.head(h)


def test_a_state_that_is_detached_between_steps() -> None:
    torch.manual_seed(0)
    x = tokens(32, 6)
    batches = [(x, x[:, 0].clone())]
    assert found(Recurrent(detach=True), batches, gm.Objective.classification()).get("graph-cut") == "error"
    assert "graph-cut" not in found(Recurrent(detach=False), batches, gm.Objective.classification())


class ByList(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.other = kind, nn.Linear(4, 8), nn.Linear(4, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        self.other(x)  # its result is dropped
        return self.last(torch.tensor(h.tolist()) if self.kind == "list" else h)


def test_a_graph_that_is_cut_by_a_list() -> None:
    torch.manual_seed(0)
    x = draw(32, 4)
    batches = [(x, (x[:, 0] > 0).long())]
    report = gm.inspect(ByList("list"), batches, gm.Objective.classification())
    told = {f.code: f for f in report.findings}
    assert "first.weight" in told["graph-cut"].evidence
    assert "other.weight" not in told["graph-cut"].evidence
    assert "other.weight" in told["parameter-unused"].evidence
    assert "graph-cut" not in found(ByList(""), batches, gm.Objective.classification())


@pytest.mark.parametrize("activation", [nn.Identity, nn.Tanh])
def test_layers_without_a_function_between(activation: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = draw(64, 3)
    model = nn.Sequential(nn.Linear(3, 16), activation(), nn.Linear(16, 2))
    told = found(model, [(x, (x[:, 0] > 0).long())], gm.Objective.classification())
    assert ("no-nonlinearity" in told) == (activation is nn.Identity)
    assert not found(nn.Linear(3, 2), [(x, (x[:, 0] > 0).long())], gm.Objective.classification())


@pytest.mark.parametrize("wrong", [False, True])
def test_a_quantile_loss_with_the_wrong_sign(wrong: bool) -> None:
    torch.manual_seed(0)
    x = draw(64, 3)
    q = torch.tensor([0.1, 0.9])

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        e = batch[1][:, None] - model(batch[0])
        return (torch.minimum if wrong else torch.maximum)(q * e, (q - 1) * e).mean()

    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    assert ("loss-unbounded" in found(model, [(x, x[:, 0].clone())], loss)) == wrong


@pytest.mark.parametrize(
    ("reduction", "rate", "told"), [("sum", 1.0, True), ("sum", 1e-4, False), ("mean", 0.1, False)]
)
def test_a_loss_that_is_summed(reduction: str, rate: float, told: bool) -> None:
    torch.manual_seed(0)
    x = draw(256, 8)
    batches = [(x, (x[:, 0] > 0).long())]
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.SGD(model.parameters(), rate)
    report = gm.inspect(
        model, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction=reduction), optimizer=optimizer
    )
    severities = {f.code: f.severity for f in report.findings}
    assert (severities.get("loss-summed") == "error") == told
    assert ("loss-summed" in severities) == (reduction == "sum")


class Decoder(nn.Module):
    def __init__(self, *, shift: bool, causal: bool = True) -> None:
        super().__init__()
        self.shift, self.causal = shift, causal
        self.embedding, self.head = nn.Embedding(11, 16), nn.Linear(16, 10)
        self.read = nn.GRU(16, 16, batch_first=True)
        self.write = nn.GRU(16, 8 if not causal else 16, batch_first=True, bidirectional=not causal)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None:
            return self.head(self.write(self.embedding(x))[0])
        if self.shift:
            y = torch.cat((torch.full_like(y[:, :1], 10), y[:, :-1]), 1)
        state = self.read(self.embedding(x))[1].transpose(0, 1)
        return self.head(self.write(self.embedding(y) + state)[0])


@pytest.mark.parametrize(("shift", "causal", "leaks"), [(True, True, False), (False, True, True), (True, False, True)])
def test_a_decoder_that_is_given_its_targets(shift: bool, causal: bool, leaks: bool) -> None:
    torch.manual_seed(0)
    batches = [(tokens(32, 6, seed=s), tokens(32, 6, seed=s).flip(1)) for s in range(2)]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(*batch).flatten(0, 1), batch[1].flatten())

    told = found(Decoder(shift=shift, causal=causal), batches, loss)
    assert ("target-leak" in told) == leaks


def test_next_tokens_that_are_the_tokens() -> None:
    """A model that sees both sides may restore its inputs, and is not told."""
    torch.manual_seed(0)
    x = tokens(32, 8)
    objective = gm.Objective.classification()
    assert "target-leak" in found(Decoder(shift=False), [(x, x.clone())], objective)
    assert "target-leak" not in found(Decoder(shift=False, causal=False), [(x, x.clone())], objective)
    assert "target-leak" not in found(Decoder(shift=False), [(x[:, :-1], x[:, 1:])], objective)


class Bag(nn.Module):
    def __init__(self, *, positions: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 16), nn.Linear(16, 4)
        self.positions = nn.Parameter(torch.randn(8, 16)) if positions else None

    def forward(self, x: Tensor) -> Tensor:
        e = self.embedding(x)
        return self.head(torch.relu(e if self.positions is None else e + self.positions).mean(1))


def test_an_order_that_the_model_does_not_see() -> None:
    """It is information where labels depend on how often tokens come."""
    torch.manual_seed(0)
    x = [tokens(128, 8, high=9, seed=s) for s in range(4)]
    for t in x:
        t[torch.arange(128), tokens(128, high=8, seed=len(t))] = 9
    by_place = [(t, (t == 9).long().argmax(1) // 2) for t in x]
    by_number = [(t, (t < 3).sum(1).clamp(max=3)) for t in x]
    objective = gm.Objective.classification()
    assert found(Bag(positions=False), by_place, objective).get("order-ignored") == "warning"
    assert "order-ignored" not in found(Bag(positions=True), by_place, objective)
    assert "order-ignored" not in found(Bag(positions=False), by_number, objective)


def test_what_a_network_has_learned_with_is_no_fault() -> None:
    """The same scores, saturated, before and after the labels fit them."""
    from gramian.inspection.causes.context import Context
    from gramian.inspection.passes.watched_steps import observe

    x = draw(64, 4)
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-9.0, 0, 0, 0], [9.0, 0, 0, 0]]))
        model.bias.zero_()
    for labels, learned in (((x[:, 0] > 0).long(), True), ((x[:, 1] > 0).long(), False)):
        batches = [(x, labels)]
        seen = observe(model, batches, gm.Objective.classification())
        assert Context(model, seen).has_learned == learned


def test_a_source_that_is_the_target_is_an_autoencoder() -> None:
    """Also where the decoder makes its inputs of the labels that it is given for its loss, padding apart (T5, BART)."""

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Decoder(shift=True)

        def forward(self, source: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
            known = labels.clamp(min=0)
            return F.cross_entropy(self.inner(source * mask, known).flatten(0, 1), labels.flatten())

    torch.manual_seed(0)
    x = tokens(32, 6)
    mask = torch.ones_like(x)
    mask[:, 5:] = 0
    batch = {"source": x, "labels": x.masked_fill(mask == 0, -100), "mask": mask}
    assert "target-leak" not in found(Autoencoder(), [batch], lambda m, b: m(**b))


@pytest.mark.parametrize(("size", "told"), [(1e-6, False), (1.0, True)])
def test_small_embeddings_before_a_norm_have_large_gradients(size: float, told: bool) -> None:
    """Without an explosion: with large matrices behind them, it is one."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh()) for _ in range(6)]
    model = nn.Sequential(nn.Embedding(11, 16), nn.LayerNorm(16, eps=0), *layers, nn.Linear(16, 11))
    with torch.no_grad():
        model[0].weight.mul_(size)
        for layer in layers:
            layer[0].weight.mul_(40 if told else 1)
    if told:
        for layer in layers:
            layer[1] = nn.Identity()
    report = gm.inspect(model, [(tokens(32, 8), tokens(32, 8, seed=1))], gm.Objective.classification())
    assert report.facts["gradient, first layer against last"] > 1e4
    assert ("gradient-explodes" in {f.code for f in report.findings}) == told


def test_equal_samples_vary_by_nothing() -> None:
    variance = _spread((0.1 * draw(7)).expand(301, 7).clone())[0]
    assert not variance.any()
    x = 1e3 + draw(301, 7)
    for found, wanted in zip(_spread(x.clone()), torch.var_mean(x.double(), 0, correction=0), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


def test_columns_of_categories_are_reversed_in_their_own_ranges() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(num, 4) for num in (12, 2, 30))
            self.out = nn.Linear(7, 2)

        def forward(self, x: Tensor, columns: Tensor) -> Tensor:
            unused = sum(table(columns[:, i]) for i, table in enumerate(self.tables))
            return self.out(torch.cat([x, 0 * unused], 1))

    torch.manual_seed(0)
    columns = torch.stack([torch.randint(num, (64,)) for num in (12, 2, 30)], 1)
    report = gm.inspect(
        Network(), [((torch.randn(64, 3), columns), torch.randint(2, (64,)))], gm.Objective.classification()
    )
    assert "whether each input has an effect" not in report.not_looked_at
    assert any(finding.code == "input-unused" for finding in report.findings)
