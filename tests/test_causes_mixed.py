"""Operations over the samples of a batch are named, with a label for each or without; those over positions are not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.inspection.causes import ordered
from gramian.inspection.passes.padding import padding_of
from gramian.report import Action, Finding

B, T, D, VOCABULARY = 12, 9, 8, 15


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (B, T), generator=torch.Generator().manual_seed(seed))


def mixed(model: nn.Module, batch, loss) -> list[tuple[str, str, str]]:
    torch.manual_seed(0)
    findings = gm.inspect(model, [batch], loss).findings
    return [(f.code, f.where, f.severity) for f in findings if f.code == "samples-mixed"]


class Attends(nn.Module):
    """A decoder that looks at a source by a softmax of its own; `dim` 2 is over the keys."""

    def __init__(self, dim: int, *, first: str = "samples") -> None:
        super().__init__()
        self.dim, self.first = dim, first
        self.embed, self.query, self.head = nn.Embedding(VOCABULARY, D), nn.Linear(D, D), nn.Linear(D, VOCABULARY)
        self.places = nn.Parameter(draw(T, D))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        if self.first == "positions":  # given (T, B)
            return self.forward_samples(source.T, target.T).transpose(0, 1)
        return self.forward_samples(source, target)

    def forward_samples(self, source: Tensor, target: Tensor) -> Tensor:
        keys = self.embed(source) + self.places
        weights = (self.query(self.embed(target)) @ keys.mT / D**0.5).softmax(self.dim)
        return self.head(self.embed(target) + weights @ keys)


def translate(model: nn.Module, batch) -> Tensor:
    return F.cross_entropy(model(batch["source"], batch["target"]).flatten(0, 1), batch["labels"].flatten())


@pytest.mark.parametrize(("dim", "first", "count"), [(0, "samples", 1), (2, "samples", 0), (2, "positions", 0)])
def test_a_softmax_over_the_samples_of_sequences(dim, first, count) -> None:
    batch = {"source": tokens(), "target": tokens(1), "labels": tokens(2)}
    if first == "positions":
        batch = {key: value.T.contiguous() for key, value in batch.items()}
    found = mixed(Attends(dim, first=first), batch, translate)
    assert len(found) == count
    if found:
        assert found[0] == ("samples-mixed", "embed, head", "error")  # positions mix too


class Reads(nn.Module):
    """A label for each token, by a recurrence over the first dimension, or the second."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(8, D), nn.GRU(D, 16, batch_first=batch_first)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0])


def chain(rows: int, length: int) -> Tensor:
    """Tokens of which each is the one before plus one, or drawn."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(8, (rows, length), generator=generator)
    for t in range(1, length):
        x[:, t] = torch.where(x[:, t] < 4, (x[:, t - 1] + 1) % 8, x[:, t])
    return x


@pytest.mark.parametrize(("batch_first", "first", "count"), [(False, "rows", 1), (True, "rows", 0), (False, "time", 0)])
def test_sequences_are_told_from_samples_by_the_order_of_their_tokens(batch_first, first, count) -> None:
    x = chain(24, 16)
    batch = (x, x.roll(-1, 1)) if first == "rows" else (x.T.contiguous(), x.T.roll(-1, 0).contiguous())
    loss = lambda model, batch: F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())  # noqa: E731
    assert len(mixed(Reads(batch_first=batch_first), batch, loss)) == count


@pytest.mark.parametrize(("first", "count"), [("rows", 1), ("time", 0)])
def test_sequences_are_told_from_samples_by_their_padding(first, count) -> None:
    x = torch.randint(1, 8, (B, T), generator=torch.Generator().manual_seed(0))
    x[torch.arange(T) >= 3 + torch.arange(B)[:, None] % 6] = 0
    x = x if first == "rows" else x.T.contiguous()
    loss = lambda model, batch: F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())  # noqa: E731
    assert len(mixed(Reads(batch_first=False), (x, x.flip(0)), loss)) == count


class Embeds(nn.Module):
    def __init__(self, end) -> None:
        super().__init__()
        self.net, self.end = nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, 6)), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.net(x))


def contrast(model: nn.Module, batch) -> Tensor:
    left, right = (F.normalize(model(batch[key]), dim=1) for key in ("left", "right"))
    return F.cross_entropy(left @ right.T / 0.1, torch.arange(len(left)))


ENDS = {
    "normalize over samples": (lambda z: F.normalize(z, dim=0), True),
    "mean over samples": (lambda z: z - z.mean(0), True),
    "normalize": (lambda z: F.normalize(z, dim=1), False),
    "softmax": (lambda z: z.softmax(1), False),
    "noise": (lambda z: z + torch.randn(len(z), 1), False),
}


@pytest.mark.parametrize("name", ENDS)
def test_ends_of_an_embedding_without_labels(name) -> None:
    end, mixes = ENDS[name]
    found = mixed(Embeds(end), {"left": draw(B, D), "right": draw(B, D, seed=1)}, contrast)
    assert bool(found) == mixes


def encoder(*, batch_first: bool, first: str = "samples") -> nn.Module:
    class Classifier(nn.Module):
        """The first position is the same for all samples, as that of a class token is."""

        def __init__(self) -> None:
            super().__init__()
            self.into, self.token = nn.Linear(D, D), nn.Parameter(draw(1, 1, D))
            self.layer = nn.TransformerEncoderLayer(D, 2, 16, 0.0, batch_first=batch_first)
            self.head = nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat((self.token.expand(len(x), -1, -1), self.into(x)), 1)
            x = self.layer(x.transpose(0, 1)).transpose(0, 1) if first == "positions" else self.layer(x)
            return self.head(x[:, 0])

    return Classifier()


def test_attention_over_the_samples_behind_which_all_outputs_are_the_same() -> None:
    batch, loss = (draw(B, T, D), torch.arange(B) % 3), gm.Objective.classification()
    torch.manual_seed(0)
    findings = gm.inspect(encoder(batch_first=False), [batch], loss).findings
    assert findings[0].code == "samples-mixed"
    assert [f.code for f in findings if f.severity != "info"] == ["samples-mixed"]
    assert not mixed(encoder(batch_first=True), batch, loss)
    assert not mixed(encoder(batch_first=False, first="positions"), batch, loss)


class Tags(nn.Module):
    """A label for each position, of sequences whose positions come first."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, D), nn.Linear(D, VOCABULARY)
        self.net = nn.GRU(D, D) if kind == "GRU" else nn.TransformerEncoderLayer(D, 2, 16, 0.0)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(self.embed(x))
        return self.head(h[0] if self.kind == "GRU" else h)


@pytest.mark.parametrize("kind", ["GRU", "attention"])
def test_positions_that_come_first_are_no_samples(kind) -> None:
    def loss(model: nn.Module, batch) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    assert not mixed(Tags(kind), (tokens().T.contiguous(), tokens(1).T.contiguous()), loss)


def test_samples_that_are_mixed_do_not_hide_a_gain() -> None:
    mixing = Finding("samples-mixed", "error", "The output depends on other samples", where="net")
    gain = Finding("gain-above-one", "error", "Gain 3 per layer", where="all layers", action=Action("isometric_"))
    local = Finding("gain-below-one", "warning", "Gain 0.1", where="net.3")
    same = Finding("samples-indistinguishable", "error", "All samples look the same")
    found = {f.code: f for f in ordered([mixing, gain, local, same])}
    assert found["gain-above-one"] == gain
    assert found["samples-indistinguishable"].follows == "samples-mixed"
    assert found["gain-below-one"].follows != "samples-mixed"


LABELS = {
    "a class": torch.arange(B) % 3,
    "a class of as many as there are rows that are looked at": torch.arange(B) % 7,
    "a number": draw(B),
    "a column": draw(B, 1),
    "two numbers": draw(B, 2),
    "three numbers": draw(B, 3),
}
KINDS = ["GRU", "LSTM", "RNN", "encoder", "encoder, norm first"]


class Sequences(nn.Module):
    """A recurrence or an encoder over sequences, whose samples come first, and a head."""

    def __init__(self, kind: str, outputs: int, width: int, *, batch_first: bool) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(width, D), nn.Linear(D, outputs)
        if kind.startswith("encoder"):
            layer = nn.TransformerEncoderLayer(
                D, 2, 16, 0.0, batch_first=batch_first, norm_first=kind.endswith("norm first")
            )
            self.net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        else:
            self.net = getattr(nn, kind)(D, D, batch_first=batch_first)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(self.into(x))
        return self.head(h.mean(1) if self.kind.startswith("encoder") else h[0][:, -1])


def predict(model: nn.Module, batch) -> Tensor:
    x, y = batch
    return F.mse_loss(model(x).view(y.shape), y) if y.is_floating_point() else F.cross_entropy(model(x), y)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("kind", KINDS)
def test_batch_first_is_forgotten(kind, labels) -> None:
    y = LABELS[labels]
    outputs = (y.shape[1] if y.ndim == 2 else 1) if y.is_floating_point() else int(y.max()) + 1
    for batch_first in (False, True):
        torch.manual_seed(0)
        model = Sequences(kind, outputs, D, batch_first=batch_first)
        assert [severity for _, _, severity in mixed(model, (draw(B, T, D), y), predict)] == ["error"] * (
            not batch_first
        )


def test_channels_that_are_as_many_as_numbers_to_predict() -> None:
    class Waves(nn.Module):
        def __init__(self, *, batch_first: bool) -> None:
            super().__init__()
            self.front, self.net = nn.Conv1d(2, D, 3), Sequences("GRU", 2, D, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.front(x).transpose(1, 2))

    batch = draw(B, 2, 16), draw(B, 2)
    assert mixed(Waves(batch_first=False), batch, predict)[0][2] == "error"
    assert not mixed(Waves(batch_first=True), batch, predict)


@pytest.mark.parametrize("targets", [(), (1,), (2,)])
def test_numbers_for_each_position_of_sequences_whose_positions_come_first(targets) -> None:
    class Forecast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = nn.GRU(D, D), nn.Linear(D, targets[0] if targets else 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.net(x)[0])

    assert not mixed(Forecast(), (draw(T, B, D), draw(T, B, *targets)), predict)


@pytest.mark.parametrize("given", ["attribute", "buffer", "batch", "code"])
@pytest.mark.parametrize("targets", [(), (3,)])
def test_rows_that_are_nodes_of_a_graph(given, targets) -> None:
    known = adjacency = torch.eye(B) + torch.eye(B).roll(1, 0)

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(D, 16), nn.Linear(16, 3)
            if given == "buffer":
                self.register_buffer("adjacency", adjacency)
            elif given != "code":
                self.adjacency = adjacency

        def forward(self, x: Tensor, adjacency: Tensor | None = None) -> Tensor:
            a = getattr(self, "adjacency", known) if adjacency is None else adjacency
            return self.last(a @ self.first(a @ x).relu())

    def loss(model: nn.Module, batch) -> Tensor:
        made = model(batch["x"], batch["a"]) if "a" in batch else model(batch["x"])
        return F.mse_loss(made, batch["y"]) if targets else F.cross_entropy(made, batch["y"])

    batch = {"x": draw(B, D), "y": draw(B, *targets) if targets else torch.arange(B) % 3}
    assert not mixed(Graph(), batch | ({"a": adjacency} if given == "batch" else {}), loss)


@pytest.mark.parametrize("mixes", [False, True])
def test_as_many_features_as_samples(mixes) -> None:
    model = Embeds((lambda z: z - z.mean(0)) if mixes else (lambda z: z))
    assert bool(mixed(model, (draw(D, D), torch.arange(D) % 6), predict)) == mixes


@pytest.mark.parametrize("targets", [(), (1,), (4,)])
def test_batch_statistics_in_training_are_meant(targets) -> None:
    net = nn.Sequential(nn.Linear(D, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, targets[0] if targets else 3))
    assert not mixed(net, (draw(B, D), draw(B, *targets) if targets else torch.arange(B) % 3), predict)


def test_a_batch_of_all_data_comes_again_and_again() -> None:
    batch = (draw(40, D), torch.arange(40) % 3)
    model = nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, 3))
    for batches, is_told in (([batch] * 4, False), ([tuple(t.clone() for t in batch) for _ in range(4)], True)):
        codes = {f.code for f in gm.inspect(model, batches, predict_class).findings}
        assert ("input-duplicates" in codes) == is_told


def predict_class(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_a_mask_of_choices_has_no_padding_of_its_own() -> None:
    """Ones fill the beginnings of all rows, as a token that pads in front would."""
    valid = torch.ones(64, 7, dtype=torch.bool)
    valid[::2, -1] = False
    model = nn.Embedding(3, 4)
    assert padding_of(model, {"x": valid}, valid, is_main=False) is None
    assert padding_of(model, {"x": valid.long()}, valid.long(), is_main=False) is None
