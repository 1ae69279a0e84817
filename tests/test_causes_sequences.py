"""Leaks of convolutions, masks of padding that its place shows, and patches whose order is nothing to the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm

B, T, D, VOCABULARY, SIDE = 32, 12, 16, 10, 8


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(seed))


def codes(model: nn.Module, batches, loss) -> list[str]:
    return [f.code for f in gm.inspect(model, batches, loss).findings if f.severity != "info"]


class Convolves(nn.Module):
    """Scores (B, V, T) of the next token, by convolutions that are padded on one side."""

    def __init__(self, *, right: bool = False, channels: int = D) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.right = right
        self.embed, self.head = nn.Embedding(VOCABULARY, channels), nn.Conv1d(channels, VOCABULARY, 1)
        self.layers = nn.ModuleList(nn.Conv1d(channels, channels, 2, dilation=d) for d in (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).transpose(1, 2)
        for layer in self.layers:
            d = layer.dilation[0]
            h = h + F.relu(layer(F.pad(h, (0, d) if self.right else (d, 0))))
        return self.head(h)


def channels_first(model: nn.Module, batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("channels", [D, T - 1])  # as many channels as positions too
def test_a_convolution_that_sees_what_follows(channels) -> None:
    x = tokens()
    batch = (x[:, :-1], x[:, 1:])
    assert "target-leak" in codes(Convolves(right=True, channels=channels), [batch], channels_first)
    assert "target-leak" not in codes(Convolves(channels=channels), [batch], channels_first)


def test_targets_that_are_the_inputs_of_a_causal_convolution() -> None:
    x = tokens()
    assert codes(Convolves(), [(x, x.clone())], channels_first) == ["target-leak"]


class Masked(nn.Module):
    def __init__(self, *, inverted: bool, pad: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inverted, self.pad = inverted, pad
        self.embed, self.places = nn.Embedding(VOCABULARY, D), nn.Parameter(torch.randn(T, D))
        self.layer, self.head = nn.TransformerEncoderLayer(D, 2, 32, 0.0, batch_first=True), nn.Linear(D, VOCABULARY)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        h = self.layer(self.embed(x) + self.places, src_key_padding_mask=~pad if self.inverted else pad)
        return self.head(h)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_mask_that_shows_the_padding_only(side) -> None:
    lengths = torch.arange(B)[:, None] % (T - 3) + 3
    pad = torch.arange(T) >= lengths
    pad = pad.flip(1) if side == "left" else pad
    batch = {"tokens": tokens().masked_fill(pad, 0), "pad": pad, "labels": tokens(1).masked_fill(pad, -100)}

    def loss(model: nn.Module, batch) -> Tensor:
        return F.cross_entropy(model(batch["tokens"], batch["pad"]).flatten(0, 1), batch["labels"].flatten())

    assert codes(Masked(inverted=True), [batch], loss)[0] == "attention-masked"
    assert "attention-masked" not in codes(Masked(inverted=False), [batch], loss)


class Patches(nn.Module):
    """Attention over patches, cut by a convolution or by hand, with positions or without."""

    def __init__(self, *, positions: bool, by_hand: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.by_hand = by_hand
        self.cut = nn.Linear(4, D) if by_hand else nn.Conv2d(1, D, 2, 2)
        self.places = nn.Parameter(torch.randn(SIDE * SIDE // 4, D)) if positions else None
        self.layer, self.head = nn.TransformerEncoderLayer(D, 2, 32, 0.0, batch_first=True), nn.Linear(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.by_hand:
            h = self.cut(F.unfold(x, 2, stride=2).transpose(1, 2))
        else:
            h = self.cut(x).flatten(2).transpose(1, 2)
        h = h if self.places is None else h + self.places
        return self.head(self.layer(h).mean(1))


def images(kind: str) -> list[tuple[Tensor, Tensor]]:
    """A bright patch, whose quadrant is the label, or whose brightness is."""
    g = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(4):
        y, place = torch.randint(4, (2, 64), generator=g)
        x = torch.randn(64, 1, SIDE, SIDE, generator=g) * 0.3
        rows, columns = (place if kind == "brightness" else y).div(2, rounding_mode="floor") * 4, place % 2 * 4
        columns = columns if kind == "brightness" else y % 2 * 4
        size = y + 1.0 if kind == "brightness" else torch.full((64,), 3.0)
        for i in range(64):
            x[i, 0, rows[i] : rows[i] + 2, columns[i] : columns[i] + 2] += size[i]
        batches.append((x, y))
    return batches


@pytest.mark.parametrize("by_hand", [False, True])
def test_patches_without_positions(by_hand) -> None:
    loss, model = gm.Objective.classification(), Patches(positions=False, by_hand=by_hand)
    assert "order-ignored" in codes(model, images("quadrant"), loss)
    found = {f.code: f.severity for f in gm.inspect(model, images("brightness"), loss).findings}
    assert found.get("order-ignored") == "info"  # true, and nothing to them
    assert "order-ignored" not in codes(Patches(positions=True, by_hand=by_hand), images("quadrant"), loss)


def test_vectors_of_a_sequence_without_positions() -> None:
    class Sequences(Patches):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.cut(x) if self.places is None else self.cut(x) + self.places).mean(1))

    batches = [(x.flatten(1).unflatten(1, (16, 4)), y) for x, y in images("quadrant")]
    loss = gm.Objective.classification()
    assert "order-ignored" in codes(Sequences(positions=False, by_hand=True), batches, loss)
    assert "order-ignored" not in codes(Sequences(positions=True, by_hand=True), batches, loss)


@pytest.mark.parametrize("kind", ["counted", "ignored", "masked", "tokens"])
def test_padding_that_is_labeled_as_a_class(kind: str) -> None:
    """Also where scores stand in the middle; not where the loss leaves it out, and a remark where it may end a text."""
    torch.manual_seed(0)
    x = tokens()
    x[torch.arange(T) >= torch.randint(5, T, (B, 1))] = 0
    classes = VOCABULARY if kind == "tokens" else 3
    y = torch.where(x > 0, x % 3, -100 if kind == "ignored" else 0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, D, padding_idx=0), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, classes))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        losses = F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none")
        return losses[batch[0] > 0].mean() if kind == "masked" else losses.mean()

    found = [f.severity for f in gm.inspect(model, [(x, y)], loss).findings if f.code == "padding-read"]
    assert found == {"counted": ["warning"], "tokens": ["info"]}.get(kind, [])
