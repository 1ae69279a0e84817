"""Set-ups that train, beside the faults that they are taken for: queues, graphs, sure labels, several optimizers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.recording.kept_state import Kept
from gramian.recording.own_state import steady

D = 12


def net(inside: int = 32, out: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, inside), nn.ReLU(), nn.Linear(inside, out))


def codes(report: gm.Report) -> set[str]:
    return {f.code for f in report.findings if f.severity != "info"}


def views(num: int = 128) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(8, D)[torch.randint(8, (num,))] + 0.3 * torch.randn(num, D)
    a, b = (x * (0.8 + 0.4 * torch.rand(num, 1)) + 0.2 * torch.randn(num, D) for _ in range(2))
    return [{"a": u, "b": v} for u, v in zip(a.split(32), b.split(32), strict=True)]


class Queue(nn.Module):
    """Momentum contrast: each pass renews the second encoder, and writes its keys into a queue of whole batches."""

    def __init__(self) -> None:
        super().__init__()
        self.query = net()
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.register_buffer("keys", F.normalize(torch.randn(96, 16), dim=1))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        query = F.normalize(self.query(a), dim=1)
        with torch.no_grad():
            for p, q in zip(self.key.parameters(), self.query.parameters(), strict=True):
                p.data.lerp_(q.data, 0.1)
            key = F.normalize(self.key(b), dim=1)
        scores = torch.cat(((query * key).sum(1, keepdim=True), query @ self.keys.T.clone()), 1)
        start = int(self.place)
        self.keys[start : start + len(key)] = key  # fails where the end of the queue is in the middle
        self.place[0] = (start + len(key)) % len(self.keys)
        return scores / 0.2


def contrast(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    scores = model(batch["a"], batch["b"])
    return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))


def test_a_queue_is_what_it_was_at_each_evaluation() -> None:
    model, batches = Queue(), views()
    kept = Kept(model)
    objective = steady(model, gm.Objective(*_pair(contrast)), batches[0], kept)
    losses = []
    for _ in range(3):
        losses.append(float(objective.loss(model, batches[0])[0].detach()))
    assert losses[0] == losses[1] == losses[2]
    report = gm.inspect(Queue(), batches, contrast)
    assert not codes(report)
    assert "signal and gradients by layer" not in report.not_looked_at


def _pair(loss):
    return (lambda model, batch: (model, batch)), (lambda output, batch: (loss(*output) * len(batch["a"]), 32))


@pytest.mark.parametrize("draws", ["nothing", "NumPy's", "a center beside the model"])
def test_what_a_loss_draws_and_holds_is_the_same_at_each_evaluation(draws: str) -> None:
    center, model, batch = torch.zeros(16), net(), views()[0]

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        out = model(batch["a"])
        share = np.random.beta(0.4, 0.4) if draws == "NumPy's" else 0.5  # noqa: NPY002
        if draws.startswith("a center"):
            center.lerp_(out.detach().mean(0), 0.5)
        return (out - share - center).square().mean()

    given = gm.Objective(*_pair(loss))
    objective = steady(model, given, batch, Kept(model))
    first, second = (float(objective.loss(model, batch)[0].detach()) for _ in range(2))
    assert first == second
    assert (objective is given) == (draws == "nothing")


@pytest.mark.parametrize("is_frozen", [True, False])
def test_of_equal_layers_one_that_is_frozen_follows_the_other(is_frozen: bool) -> None:
    model = nn.ModuleDict({"online": net(), "target": net().requires_grad_(not is_frozen), "head": nn.Linear(16, 2)})
    found = {f.code: f.severity for f in gm.inspect(model).findings}
    assert found["repeated-weights"] == ("info" if is_frozen else "warning")


def graphs(*, nodes: str) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    found = []
    for _ in range(4):
        graph = torch.arange(32).repeat_interleave(6)
        edges = torch.randint(6, (2, 400)) + 6 * torch.randint(32, (400,))
        x = torch.ones(192, 4) if nodes == "ones" else F.one_hot(torch.randint(4, (192,)), 4).float()
        sums = torch.zeros(192).index_add(0, edges[1], x[edges[0], 0])
        value = sums if nodes == "ones" else torch.zeros(32).index_add(0, graph, sums)
        found.append({"x": x, "edges": edges, "value": value} | ({} if nodes == "ones" else {"graph": graph}))
    return found


class Messages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(4, 32), nn.Linear(32, 32), nn.Linear(32, 1)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor | None = None) -> Tensor:
        h = self.first(x).relu()
        h = self.second(h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])).relu()
        return self.last(h if graph is None else torch.zeros(32, 32).index_add(0, graph, h)).squeeze(1)


@pytest.mark.parametrize("nodes", ["kinds", "ones"])
def test_nodes_of_graphs_may_be_alike(nodes: str) -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.smooth_l1_loss(model(batch["x"], batch["edges"], batch.get("graph")) / 10, batch["value"] / 10)

    assert not codes(gm.inspect(Messages(), graphs(nodes=nodes), loss)) & {"input-duplicates", "input-constant"}


@pytest.mark.parametrize(("num_groups", "is_told"), [(10, False), (600, True)])
def test_kinds_beside_numbers_repeat_where_there_are_few_of_both(num_groups: int, is_told: bool) -> None:
    """Of four kinds, marked, there are four, and not the sixteen of four columns."""
    torch.manual_seed(0)
    kind, group = torch.randint(4, (60,)), torch.randint(num_groups, (60,))
    again = torch.arange(60).repeat(4)  # each sample four times
    batch = {"kind": F.one_hot(kind[again], 4).float(), "group": group[again], "labels": kind[again] % 2}

    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(600, 8), nn.Linear(12, 2)

        def forward(self, kind: Tensor, group: Tensor) -> Tensor:
            return self.layer(torch.cat((kind, self.table(group)), 1))

    found = codes(gm.inspect(Kinds(), [batch], gm.Objective.classification()))
    assert ("input-duplicates" in found) == is_told


@pytest.mark.parametrize("is_added", [True, False])
def test_labels_of_its_own_that_no_sample_is_sure_enough_for(is_added: bool) -> None:
    """At first nothing counts of what is not labeled; where the term is forgotten, nothing ever does."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            share, label = model(batch["weak"]).softmax(1).max(1)
        own = F.cross_entropy(model(batch["strong"]), label, reduction="none") * (share > 0.95)
        return F.cross_entropy(model(batch["x"]), batch["y"]) + (own.mean() if is_added else 0.0)

    torch.manual_seed(0)
    x = torch.randn(4, 48, D)
    batches = [
        {"x": one[:16], "y": one[:16, :3].argmax(1), "weak": one[16:], "strong": one[16:] + 0.3 * torch.randn(32, D)}
        for one in x
    ]
    assert ("input-unused" in codes(gm.inspect(net(out=3), batches, loss))) == (not is_added)


def test_a_softmax_over_classes_is_no_attention() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(1, 5, 3, padding=1)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([30.0, 0, 0, 0, 0]))  # surely the background
        model.weight[1:, 0, 1, 1] = torch.arange(1.0, 5.0)
    masks = [(torch.rand(4, 8, 8) > 0.9).long() for _ in range(4)]
    batches = [(mask[:, None].float() + 0.1 * torch.randn(4, 1, 8, 8), mask) for mask in masks]

    def overlap(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        p, own = model(batch[0]).softmax(1), F.one_hot(batch[1], 5).movedim(-1, 1).float()
        return 1 - ((2 * (p * own).sum((0, 2, 3)) + 1) / ((p + own).sum((0, 2, 3)) + 1)).mean()

    assert "attention-saturated" not in {f.code for f in gm.inspect(model, batches, overlap).findings}


class Restorer(nn.Module):
    """Sees the tokens on both sides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = nn.Embedding(20, 16), nn.GRU(16, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.table(tokens))[0])


@pytest.mark.parametrize("hides", ["padding", "words"])
def test_padding_is_no_mask(hides: str) -> None:
    """An autoencoder of sequences is given its targets; a masked language model is not to be."""
    torch.manual_seed(0)
    batches = []
    for _ in range(4):
        tokens = torch.randint(2, 20, (32, 10))
        lengths = torch.randint(7, 11, (32, 1))
        hidden = torch.arange(10) >= lengths if hides == "padding" else torch.rand(32, 10) < 0.2
        given = tokens.masked_fill(hidden, 0 if hides == "padding" else 1)
        batches.append({"tokens": given, "labels": tokens.masked_fill(hidden, -100)})

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())

    assert ("target-leak" in codes(gm.inspect(Restorer(), batches, loss))) == (hides == "words")


@pytest.mark.parametrize(("rest", "is_told"), [(0.12, False), (0.0, True)])
def test_what_some_steps_from_zero_have_made_is_not_of_rank_one(rest: float, is_told: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    one, other = (torch.outer(F.normalize(torch.randn(32), dim=0), F.normalize(torch.randn(32), dim=0)) for _ in "ab")
    with torch.no_grad():
        model[2].weight.copy_(3 * (one + rest * other))
    x = torch.randn(4, 32, D)
    batches = [(u, u[:, :3].argmax(1)) for u in x]
    found = codes(gm.inspect(model, batches, gm.Objective.classification()))
    assert ("parameter-rank-one" in found) == is_told


def test_nothing_is_said_of_the_lengths_that_a_search_finds() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)), torch.linspace(-1, 1, 64)[:, None]
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - torch.sin(6 * x)).square().mean()
        loss.backward()
        return loss

    with gm.watch(model, optimizer, every=5, share=None) as watching:
        for _ in range(40):
            optimizer.step(closure)
    assert float(closure().detach()) < 1e-4
    assert not [f.code for f in watching.findings if f.severity != "info"]
