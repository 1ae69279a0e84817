"""What inputs, positions, axes and classes do to a loss is asked by changing them; healthy twins stay silent."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.inspection.experiments.mixing_reshapes import moved_axis

B, T, D, V = 32, 8, 12, 9


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def words(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(seed))


def found(model: nn.Module, batch, loss) -> dict[str, str]:
    """The codes of errors and warnings, with their places and evidence."""
    findings = gm.inspect(model, [batch], loss).findings
    return {f.code: f"{f.where} {f.title} {f.evidence}" for f in findings if f.severity != "info"}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("before", "after", "length"),
    [
        ((7, 16, 32), (7, 4, 16, 8), 16),  # heads without a transpose
        ((7, 4, 16, 8), (7, 16, 32), 16),
        ((7, 24, 6, 6), (7, 36, 24), 24),  # channels last by a view
        ((7, 3, 4, 4), (7, 16, 3), 3),
        ((2, 7, 16), (7, 32), 7),  # the last states of two layers
        ((7, 16, 32), (7, 16, 4, 8), 0),
        ((7, 16, 4, 8), (7, 16, 32), 0),
        ((7, 3, 8, 8), (7, 192), 0),
        ((7, 6, 5), (7, 5, 6), 0),  # a relative shift
        ((7, 16, 8), (7, 8, 16), 0),  # pairs of neighbors, stacked
        ((7, 1, 16, 16), (7, 16, 16), 0),
    ],
)
def test_an_axis_that_a_reshape_moves(before, after, length) -> None:
    assert moved_axis(before, after) == length


class Cells(nn.Module):
    """Boxes (B, cells, 4) by a convolution."""

    def __init__(self, *, views: bool) -> None:
        super().__init__()
        self.net, self.views = nn.Sequential(nn.Conv2d(1, D, 3, 2, 1), nn.ReLU(), nn.Conv2d(D, 4, 1)), views

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x)
        return h.view(len(x), -1, 4) if self.views else h.flatten(2).transpose(1, 2)


def test_a_view_in_place_of_a_transpose() -> None:
    batch = (draw(B, 1, 12, 12), draw(B, 36, 4, seed=1))
    for views in (False, True):
        codes = found(Cells(views=views), batch, lambda model, b: F.smooth_l1_loss(model(b[0]), b[1]))
        assert codes.keys() == ({"axes-swapped"} if views else set())


class Reads(nn.Module):
    def __init__(self, position: int) -> None:
        super().__init__()
        self.rnn, self.head, self.position = nn.GRU(D, 16, batch_first=True), nn.Linear(16, 2), position

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, self.position])


def test_positions_without_effect() -> None:
    batch = (draw(B, T, D), draw(B, 2, seed=1))
    for position in (0, -1):
        codes = found(Reads(position), batch, lambda model, b: F.mse_loss(model(b[0]), b[1]))
        assert codes.keys() == ({"input-unused"} if position == 0 else set())


class Looks(nn.Module):
    """A masked language model's encoder with or without positions."""

    def __init__(self, *, places: bool) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(V + 1, D), nn.Parameter(draw(T, D)) if places else None
        self.layer, self.head = nn.TransformerEncoderLayer(D, 2, 24, 0.0, batch_first=True), nn.Linear(D, V + 1)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        return self.head(self.layer(h if self.places is None else h + self.places))


def restore(model: nn.Module, batch) -> Tensor:
    return F.cross_entropy(model(batch["ids"]).transpose(1, 2), batch["labels"])


def masked() -> dict[str, Tensor]:
    text = (words(B, 1) + torch.arange(T)) % (V - 1) + 1  # each follows the one before
    chosen = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.3
    return {"ids": text.masked_fill(chosen, V), "labels": text.masked_fill(~chosen, -100)}


def test_the_order_of_tokens_with_an_output_each() -> None:
    assert found(Looks(places=False), masked(), restore).keys() == {"order-ignored"}
    assert found(Looks(places=True), masked(), restore).keys() == set()


def test_a_loss_of_the_tokens_that_are_not_hidden() -> None:
    batch = masked()
    shown = batch["ids"].masked_fill(batch["ids"] == V, -100)
    assert "target-leak" in found(Looks(places=True), batch | {"labels": shown}, restore)


class Decodes(nn.Module):
    """Scores of the next token, by what stands before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(V, D), nn.GRU(D, D, batch_first=True), nn.Linear(D, V)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0])


@pytest.mark.parametrize("shift", [0, 1])
def test_targets_that_are_not_shifted_in_one_tensor(shift) -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return F.cross_entropy(model(x[:, :-1]).transpose(1, 2), x[:, 1:] if shift else x[:, :-1])

    assert found(Decodes(), words(B, T + 1), loss).keys() == (set() if shift else {"target-leak"})


class Towers(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.one, self.two, self.dim = nn.Linear(D, 16), nn.Linear(D, 16), dim

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return 10 * F.normalize(self.one(a), dim=self.dim) @ F.normalize(self.two(b), dim=self.dim).T


def test_lengths_over_the_samples_in_scores_of_all_pairs() -> None:
    def loss(model: nn.Module, batch) -> Tensor:
        scores = model(*batch)
        return F.cross_entropy(scores, torch.arange(len(scores)))

    batch = [draw(B, D), draw(B, D, seed=1)]
    assert "samples-mixed" in found(Towers(0), {"a": batch[0], "b": batch[1]}, lambda m, b: loss(m, tuple(b.values())))
    assert found(Towers(-1), {"a": batch[0], "b": batch[1]}, lambda m, b: loss(m, tuple(b.values()))).keys() == set()


class Quantized(nn.Module):
    def __init__(self, *, straight: bool) -> None:
        super().__init__()
        self.first, self.last, self.straight = nn.Linear(D, 24), nn.Linear(24, 3), straight

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        rounded = (8 * h).round() / 8
        return self.last(F.relu(h + (rounded - h).detach() if self.straight else rounded))


def test_a_rounding_lets_no_gradient_pass() -> None:
    batch = (draw(B, D), words(B) % 3)
    for straight in (True, False):
        codes = found(Quantized(straight=straight), batch, lambda model, b: F.cross_entropy(model(b[0]), b[1]))
        assert codes.keys() == (set() if straight else {"gradient-stopped"})
    assert codes["gradient-stopped"].startswith("all layers No gradient passes round in the model")


def equation(model: nn.Module, batch) -> Tensor:
    x = batch["x"].clone().requires_grad_()
    slope = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
    bend = torch.autograd.grad(slope.sum(), x, create_graph=True)[0]
    return (bend + 1).square().mean() + model(torch.zeros(1, 1)).square().mean()


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_a_second_derivative_of_relu(activation) -> None:
    model = nn.Sequential(nn.Linear(1, 24), activation(), nn.Linear(24, 24), activation(), nn.Linear(24, 1))
    codes = found(model, {"x": draw(B, 1)}, equation)
    assert ("derivative-zero" in codes) == (activation is nn.ReLU)


@pytest.mark.parametrize("again", [False, True])
def test_noise_that_is_drawn_a_second_time(again) -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        noisy = x + noise
        return (model(noisy) - (torch.randn_like(x) if again else noise)).square().mean()

    model = nn.Sequential(nn.Linear(D, 24), nn.ReLU(), nn.Linear(24, D))
    assert ("target-drawn" in found(model, draw(B, D), loss)) == again


def test_classes_that_the_loss_leaves_out() -> None:
    batch = (draw(B, D), words(B) % 3)
    model = nn.Sequential(nn.Linear(D, 24), nn.ReLU(), nn.Linear(24, 3))
    for weights in ((1.0, 1.0, 1.0), (1.0, 0.0, 1.0)):
        weight = torch.tensor(weights)
        codes = found(model, batch, lambda model, b, w=weight: F.cross_entropy(model(b[0]), b[1], weight=w))
        assert codes.keys() == ({"labels-ignored"} if 0.0 in weights else set())


@pytest.mark.parametrize("leaks", [False, True])
def test_a_label_among_the_inputs(leaks) -> None:
    x, y = draw(B, D), draw(B, 2, seed=1)
    x[:, 3] = 0.5 * y[:, 1] + 2 if leaks else x[:, 3]
    model = nn.Sequential(nn.Linear(D, 24), nn.ReLU(), nn.Linear(24, 2))
    assert ("target-leak" in found(model, (x, y), lambda m, b: F.mse_loss(m(b[0]), b[1]))) == leaks


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.policy, self.value = nn.Linear(D, 24), nn.Linear(24, 4), nn.Linear(24, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.body(x))
        return self.policy(h), self.value(h).squeeze(1)


def act(model: nn.Module, batch, *, values: bool = True) -> Tensor:
    scores, value = model(batch["state"])
    loss = F.cross_entropy(scores, batch["action"])
    return loss + F.mse_loss(value, batch["return"]) if values else loss


def test_a_policy_begins_small_and_states_come_again() -> None:
    states = F.one_hot(words(B), D).float()
    batch = {"state": states, "action": words(B, seed=1) % 4, "return": draw(B)}
    model = Heads()
    nn.init.orthogonal_(model.policy.weight, 0.01)
    assert found(model, batch, act).keys() == set()


def test_a_term_that_is_missing() -> None:
    batch = {"state": draw(B, D), "action": words(B) % 4, "return": draw(B)}
    codes = found(Heads(), batch, lambda model, b: act(model, b, values=False))
    assert codes.keys() == {"parameter-unused"}
    assert 'batch["return"]' in codes["parameter-unused"]


def test_a_mean_over_what_counts_is_no_sum() -> None:
    def loss(model: nn.Module, batch) -> Tensor:
        scores, value = model(batch["state"])
        counts = batch["action"] > 0
        error = F.smooth_l1_loss(value, batch["return"], reduction="none")
        return F.cross_entropy(scores, batch["action"]) + (error * counts).sum() / counts.sum()

    batch = {"state": draw(B, D), "action": words(B) % 4, "return": draw(B)}
    assert found(Heads(), batch, loss).keys() == set()


def test_targets_below_a_rectified_value_that_is_picked() -> None:
    def loss(model: nn.Module, batch) -> Tensor:
        picked = model(batch["state"]).gather(1, batch["action"][:, None]).squeeze(1)
        return F.mse_loss(picked, batch["reward"])

    batch = {"state": draw(B, D), "action": words(B) % 4, "reward": -draw(B).abs()}
    net = nn.Sequential(nn.Linear(D, 24), nn.ReLU(), nn.Linear(24, 4))
    assert "output-range" not in found(net, batch, loss)
    assert "output-range" in found(nn.Sequential(*net, nn.ReLU()), batch, loss)
