"""Rows that do not belong together, and what the model makes of its arguments, masks and ranges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.inspection.causes.row_agreement import follows, power, relations

Loss = Callable[[nn.Module, Any], Tensor]


def net(inputs: int, outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


def told(model: nn.Module, batches: list[Any], loss: Loss | gm.Objective) -> dict[str, str]:
    report = gm.inspect(model, batches, loss)
    assert not any("failed" in why or "a fault of" in why for why in report.not_looked_at.values())
    return {f.code: f.title for f in report.findings if f.severity != "info"}


def cut(tensors: dict[str, Tensor], size: int = 32) -> list[dict[str, Tensor]]:
    num = len(next(iter(tensors.values())))
    return [{name: t[i : i + size].clone() for name, t in tensors.items()} for i in range(0, num, size)]


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shuffled(t: Tensor) -> Tensor:
    return t[torch.randperm(len(t), generator=torch.Generator().manual_seed(2))]


def test_p_values_are_uniform_and_shifts_are_found() -> None:
    small = 0
    for seed in range(40):
        x, y = drawn(100, 4, seed=seed), drawn(100, 1, seed=100 + seed)
        small += relations({"x": x, "y": y})["y"].p_value < 0.05
    assert small <= 6  # two are expected: the number of tests is paid for
    x = drawn(200, 4)
    y = x[:, 0] * x[:, 1]
    assert relations({"x": x, "y": y})["y"].p_value < 1e-6
    moved = relations({"x": x, "y": y.roll(3)})
    assert (moved["y"].shift, moved["x"].shift) == (-3, 3)
    ordered = x.cumsum(0)
    assert follows(ordered, 1)
    assert not follows(x, 1)
    many = drawn(400, 4)
    assert min(power(many[:, 0], [many]) or (0.0,)) >= 0.9
    assert power(y, [drawn(200, 3, 8, 8)]) is None


def policy(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
    chosen = model(b["obs"]).log_softmax(1).gather(1, b["action"][:, None])[:, 0]
    return -(chosen * b["reward"]).mean()


@pytest.mark.parametrize("by", [0, 1])
def test_rewards_of_other_states(by: int) -> None:
    obs = drawn(256, 4)
    action = torch.randint(3, (256,), generator=torch.Generator().manual_seed(3))
    reward = (obs[:, :3].argmax(1) == action).float()
    found = told(net(4, 3), cut({"obs": obs, "action": action, "reward": reward.roll(by)}), policy)
    assert ("pairs-mismatched" in found) == bool(by), found
    if by:
        assert "1 row earlier" in found["pairs-mismatched"]


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = net(6, 8), net(5, 8)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.left(a), dim=1), F.normalize(self.right(b), dim=1)


def contrast(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
    u, v = model(b["left"], b["right"])
    return F.cross_entropy(u @ v.T / 0.1, torch.arange(len(u)))


def critic(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
    u, v = model(b["left"], b["right"])
    return (F.softplus(-u[:, 0]) + F.softplus(v[:, 0])).mean()


@pytest.mark.parametrize(
    ("order", "loss", "expected"),
    [(torch.clone, contrast, set()), (shuffled, contrast, {"pairs-mismatched"}), (shuffled, critic, set())],
)
def test_pairs_of_encoders(order: Callable, loss: Loss, expected: set[str]) -> None:
    z = drawn(512, 3)
    left, right = z @ drawn(3, 6, seed=4), (z @ drawn(3, 5, seed=5)).tanh()
    found = told(Towers(), cut({"left": left, "right": order(right)}), loss)
    assert found.keys() & {"pairs-mismatched", "labels-independent"} == expected, found


class Scaled(Towers):
    """Towers that give a learned scale beside their embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.659))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *super().forward(a, b), self.scale.exp()


@pytest.mark.parametrize(
    ("order", "sign", "by", "expected"),
    [(torch.clone, 1, 0, False), (shuffled, 1, 0, True), (torch.clone, -1, 0, True), (torch.clone, 1, 1, True)],
)
def test_pairs_with_a_learned_scale(order: Callable, sign: int, by: int, expected: bool) -> None:
    def loss(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
        u, v, scale = model(b["left"], b["right"])
        return F.cross_entropy(sign * scale * u @ v.T, torch.arange(len(u)).roll(by))

    z = drawn(512, 3)
    left, right = z @ drawn(3, 6, seed=4), (z @ drawn(3, 5, seed=5)).tanh()
    found = told(Scaled(), cut({"left": left, "right": order(right)}), loss)
    assert ("pairs-mismatched" in found) == expected, found


class Operator(nn.Module):
    """A function, given at points, and where its integral is asked for."""

    def __init__(self, *, is_deaf: bool = False) -> None:
        super().__init__()
        self.of_function, self.of_place, self.is_deaf = net(4, 8), net(1, 8), is_deaf

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return (self.of_function(u) * self.of_place(torch.ones_like(x) if self.is_deaf else x)).sum(1)


def regress(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(b["u"], b["x"]), b["target"])


def test_one_of_two_inputs_is_of_other_samples() -> None:
    u, x = drawn(512, 4), drawn(512, 1, seed=2)
    target = u[:, 0] + u[:, 1] * x[:, 0] + x[:, 0]
    assert told(Operator(), cut({"u": u, "x": x, "target": target}), regress) == {}
    found = told(Operator(), cut({"u": shuffled(u), "x": x, "target": target}), regress)
    assert found == {
        "labels-independent": 'The rows of batch["u"] have nothing in common with the labels, whatever the other '
        "inputs are"
    }

    def weighted(model: nn.Module, b: dict[str, Tensor]) -> Tensor:  # takes what the model does not
        return (b["x"][:, 0].square() * (model(b["u"], b["x"]) - b["target"]).square()).mean()

    for is_deaf in (False, True):
        found = told(Operator(is_deaf=is_deaf), cut({"u": u, "x": x, "target": target}), weighted)
        assert ("input-unused" in found) == is_deaf


def test_nothing_is_told_of_weak_signals_parity_or_noise() -> None:
    x = drawn(256, 20)
    weak = (0.3 * x[:, 0] + drawn(256, seed=2) > 0).long()
    bits = torch.randint(2, (256, 14), generator=torch.Generator().manual_seed(1))

    class Bits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(2, 8), nn.Linear(112, 2)

        def forward(self, t: Tensor) -> Tensor:
            return self.head(self.table(t).flatten(1).tanh())

    def denoise(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(model(b["x"] + b["noise"]), b["noise"])

    for model, batches, loss in (
        (net(20, 2), [(b["x"], b["y"]) for b in cut({"x": x, "y": weak})], gm.Objective.classification()),
        (Bits(), [(b["x"], b["y"]) for b in cut({"x": bits, "y": bits.sum(1) % 2})], gm.Objective.classification()),
        (net(4, 4), cut({"x": drawn(256, 4), "noise": drawn(256, 4, seed=3)}), denoise),
    ):
        assert not told(model, batches, loss).keys() & {"labels-independent", "pairs-mismatched"}


class Pooled(nn.Module):
    def __init__(self, *, is_inverted: bool) -> None:
        super().__init__()
        self.each, self.head, self.is_inverted = net(3, 8), nn.Linear(8, 2), is_inverted

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        kept = (1 - mask if self.is_inverted else mask)[..., None]
        return self.head((self.each(x) * kept).sum(1) / kept.sum(1).clamp(min=1))


@pytest.mark.parametrize("is_inverted", [False, True])
def test_inverted_masks(is_inverted: bool) -> None:
    lengths = torch.randint(3, 8, (64, 1), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(8) < lengths).float()
    x = drawn(64, 8, 3) * mask[..., None]
    y = (x.sum((1, 2)) > 0).long()
    batches = [((x[i : i + 32], mask[i : i + 32]), y[i : i + 32]) for i in (0, 32)]
    found = told(Pooled(is_inverted=is_inverted), batches, lambda m, b: F.cross_entropy(m(*b[0]), b[1]))
    assert ("padding-read" in found) == is_inverted, found
    assert not is_inverted or "input-unused" not in found


def q_loss(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
    return (b["reward"] - model(b["obs"]).gather(1, b["action"][:, None])[:, 0]).square().mean()


@pytest.mark.parametrize("ends", [nn.Identity(), nn.Softmax(-1)])
def test_values_beyond_the_range_of_the_outputs(ends: nn.Module) -> None:
    obs = drawn(128, 4)
    action = torch.randint(3, (128,), generator=torch.Generator().manual_seed(3))
    reward = 3 * obs[torch.arange(128), action]
    found = told(nn.Sequential(net(4, 3), ends), cut({"obs": obs, "action": action, "reward": reward}), q_loss)
    assert ("output-range" in found) == isinstance(ends, nn.Softmax), found


def test_students_negatives_views_and_codes() -> None:
    x = drawn(256, 6)

    def taught(model: nn.Module, b: Tensor, detach: bool) -> Tensor:
        other = model(b + 0.1).softmax(1)
        return F.kl_div(model(b).log_softmax(1), other.detach() if detach else other, reduction="batchmean")

    batches = list(x.split(64))
    assert "target-not-detached" in told(net(6, 3), batches, lambda m, b: taught(m, b, False))
    assert "target-not-detached" not in told(net(6, 3), batches, lambda m, b: taught(m, b, True))

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 8)

        def forward(self, code: Tensor) -> Tensor:
            return self.table(code)

    def margin(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
        a, p, n = (model(b[k]) for k in ("a", "p", "n"))
        return F.relu((a - p).square().sum(1) - (a - n).square().sum(1) + 1).mean()

    generator = torch.Generator().manual_seed(1)
    a, p, n = (torch.randint(20, (128,), generator=generator) for _ in range(3))
    assert "pairs-mismatched" in told(Table(), cut({"a": a, "p": p, "n": p.clone()}), margin)
    assert "pairs-mismatched" not in told(Table(), cut({"a": a, "p": p, "n": n}), margin)

    class Larger(nn.Module):
        def __init__(self, *, by_view: bool) -> None:
            super().__init__()
            self.conv, self.by_view = nn.Conv2d(1, 4, 3, padding=1), by_view

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            return h.view(len(x), 1, 16, 16) if self.by_view else F.pixel_shuffle(h, 2)

    images, larger = drawn(32, 1, 8, 8), drawn(32, 1, 16, 16, seed=2)
    for by_view in (False, True):
        found = told(Larger(by_view=by_view), [(images, larger)], gm.Objective.regression())
        assert ("axes-swapped" in found) == by_view


def test_an_own_table_of_positions_does_not_hide_a_frozen_trunk() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Parameter(torch.randn(6, 8))
            self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x + self.places).mean(1))

    torch.manual_seed(0)
    model = Encoder()
    for p in (model.places, *model.body.parameters()):
        p.requires_grad_(False)
    x = drawn(64, 6, 8)
    assert "parameter-frozen" in told(model, [(x, (x[:, 0, 0] > 0).long())], gm.Objective.classification())


def test_a_convolution_that_sees_its_next_number() -> None:
    class Convolved(nn.Module):
        def __init__(self, *, is_causal: bool) -> None:
            super().__init__()
            self.conv, self.pad = nn.Conv1d(1, 1, 3), (2, 0) if is_causal else (1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.pad(x[:, None], self.pad))[:, 0]

    series = drawn(32, 17)
    batches = [(series[:, :-1].clone(), series[:, 1:].clone())]
    for is_causal in (True, False):
        found = told(Convolved(is_causal=is_causal), batches, gm.Objective.regression())
        assert ("target-leak" in found) != is_causal
