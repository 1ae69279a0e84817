"""Set-ups that others train every day, with teachers, critics and advantages: nothing is told of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm

NUM, D = 128, 12


def net(*sizes: int) -> nn.Sequential:
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def told(model: nn.Module, batches: list[Any], loss: Callable[[nn.Module, Any], Tensor]) -> list[str]:
    torch.manual_seed(1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    report = gm.inspect(model, batches, loss, optimizer=optimizer)
    return [f.code for f in report.findings if f.severity != "info"]


def views() -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(8, D)[torch.randint(8, (NUM,))] + 0.3 * torch.randn(NUM, D)
    a, b = (x * (0.8 + 0.4 * torch.rand(NUM, 1)) + 0.2 * torch.randn(NUM, D) for _ in range(2))
    return [{"a": u, "b": v} for u, v in zip(a.split(32), b.split(32), strict=True)]


class Student(nn.Module):
    """Predicts what a teacher inside makes of the other view: BYOL, DINO; or what it makes itself: SimSiam."""

    def __init__(self, *, has_teacher: bool = True, stops: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.online, self.predictor = net(D, 32, 16), net(16, 32, 16)
        self.teacher = copy.deepcopy(self.online).requires_grad_(False) if has_teacher else None
        self.stops = stops
        self.register_buffer("center", torch.zeros(16))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        teacher = self.online if self.teacher is None else self.teacher
        with torch.set_grad_enabled(not self.stops):
            targets = teacher(a), teacher(b)
        return self.predictor(self.online(a)), self.predictor(self.online(b)), *targets


def similar(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    p, q, s, t = model(batch["a"], batch["b"])
    return 2 - F.cosine_similarity(p, t).mean() - F.cosine_similarity(q, s).mean()


def centered(model: Student, batch: dict[str, Tensor]) -> Tensor:
    """DINO's, whose center moves in the loss."""
    p, q, s, t = model(batch["a"], batch["b"])

    def entropy(target: Tensor, score: Tensor) -> Tensor:
        return -(((target - model.center) / 0.04).softmax(1) * (score / 0.1).log_softmax(1)).sum(1).mean()

    total = entropy(s, q) + entropy(t, p)
    model.center.lerp_(torch.cat([s, t]).mean(0).detach(), 0.1)
    return total


@pytest.mark.parametrize("loss", [similar, centered])
@pytest.mark.parametrize("has_teacher", [True, False])
def test_what_a_stopped_teacher_gives_is_no_collapse(loss, has_teacher: bool) -> None:
    assert told(Student(has_teacher=has_teacher), views(), loss) == []


def test_a_teacher_with_a_gradient_is_a_collapse() -> None:
    assert "loss-collapses" in told(Student(has_teacher=False, stops=False), views(), similar)


@pytest.mark.parametrize("penalty", [0.0, 10.0])
def test_a_critic_of_what_another_network_draws(penalty: float) -> None:
    torch.manual_seed(0)
    critic, generator = net(4, 32, 1), net(3, 32, 4)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        real = batch["real"]
        with torch.no_grad():
            fake = generator(torch.randn(len(real), 3))
        share = torch.rand(len(real), 1)
        between = (share * real + (1 - share) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
        length = penalty * (slope.norm(dim=1) - 1).square().mean()
        return F.softplus(-model(real)).mean() + F.softplus(model(fake)).mean() + length

    assert "graph-cut" not in told(critic, [{"real": x} for x in torch.randn(NUM, 4).split(32)], loss)


class Actor(nn.Module):
    """A normal policy of actions as wide as the state, with a value."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mean, self.value, self.log = net(6, 32, 2), net(6, 32, 1), nn.Parameter(torch.zeros(2))
        with torch.no_grad():
            self.mean[-1].weight.mul_(0.01)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.mean(state), self.log, self.value(state).squeeze(1)


def transitions() -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    state, action = torch.randn(256, 6), torch.randn(256, 2)
    found = {
        "state": state,
        "action": action,
        "advantage": -(action - state[:, :2]).square().sum(1),
        "result": state[:, 0] + 0.3 * torch.randn(256),
        "old": torch.distributions.Normal(0.0, 1.0).log_prob(action).sum(1),
    }
    return [dict(zip(found, rows, strict=True)) for rows in zip(*(t.split(64) for t in found.values()), strict=True)]


def clipped(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    mean, log, value = model(batch["state"])
    law = torch.distributions.Normal(mean, log.exp())
    ratio = (law.log_prob(batch["action"]).sum(1) - batch["old"]).exp()
    advantage = (batch["advantage"] - batch["advantage"].mean()) / batch["advantage"].std()
    policy = torch.max(-ratio * advantage, -ratio.clamp(0.8, 1.2) * advantage).mean()
    return policy + 0.5 * (value - batch["result"]).square().mean() - 0.001 * law.entropy().sum(1).mean()


def test_actions_are_no_labels_where_an_advantage_decides() -> None:
    assert told(Actor(), transitions(), clipped) == []


def test_likelihoods_of_the_wrong_sign_are_told_beside_weights() -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        mean, _, _ = model(batch["state"])
        near = (-(mean - batch["action"]).square().sum(1)).exp()
        return ((1 + batch["old"].abs()) * near).mean()

    assert "loss-reversed" in told(Actor(), transitions(), loss)


def test_products_of_a_batch_are_no_scores_after_a_relu() -> None:
    torch.manual_seed(0)
    model = net(32, 128, 64, 32)  # a hidden layer as wide as the batch
    x = torch.randn(8, 32)[torch.randint(8, (256,))] + 0.3 * torch.randn(256, 32)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"]
        a, b = (F.normalize(model(x + 0.1 * torch.randn_like(x)), dim=1) for _ in range(2))
        scores = (a @ b.T + 1) / 0.5  # none is negative
        return F.cross_entropy(scores, torch.arange(len(x)))

    assert "loss-rectified" not in told(model, [{"x": rows} for rows in x.split(64)], loss)
