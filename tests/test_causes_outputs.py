"""Losses as functions of their outputs: no minimum, one that no label has a say in, log-determinants, ranges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm

N = 64
Loss = Callable[[nn.Module, Any], Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def net(inputs: int, outputs: int, *last: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 24), nn.SiLU(), nn.Linear(24, outputs), *last)


def found(model: nn.Module, batches: Any, loss: Loss) -> dict[str, str]:
    """Severities of errors and warnings, by code; no experiment may fail."""
    report = gm.inspect(model, batches, loss)
    assert not any("not defined" in why or "failed" in why for why in report.not_looked_at.values())
    return {f.code: f.severity for f in report.findings if f.severity != "info"}


X = draw(N, 5)
Y = X[:, 0] + X[:, 1].sin() + 0.3 * draw(N, seed=1)
TIME, EVENT = Y.exp(), (draw(N, seed=2) > -1).float()


def regression(of: Callable[[Tensor, Tensor], Tensor], outputs: int = 2) -> tuple[nn.Module, Any, Loss]:
    return net(5, outputs), [{"x": X, "y": Y}], lambda m, b: of(m(b["x"]), b["y"])


def gaussian(o: Tensor, y: Tensor, log: float = 1.0, sign: float = -1.0) -> Tensor:
    return ((y + sign * o[:, 0]).square() * (-o[:, 1].clamp(-6, 6)).exp() + log * o[:, 1].clamp(-6, 6)).mean() / 2


def mixture(o: Tensor, y: Tensor, log: float = 1.0) -> Tensor:
    shares, means, scales = o.chunk(3, 1)
    terms = shares.log_softmax(1) - ((y[:, None] - means) * (-scales).exp()).square() / 2 - log * scales
    return -terms.logsumexp(1).mean()


def survival(sign: float) -> tuple[nn.Module, Any, Loss]:
    def loss(m: nn.Module, b: Any) -> Tensor:
        s = m(b["x"])[:, 0][b["time"].argsort(descending=True)]
        event = b["event"][b["time"].argsort(descending=True)]
        return -sign * ((s - s.logcumsumexp(0)) * event).sum() / event.sum()

    return net(5, 1), [{"x": X, "time": TIME, "event": EVENT}], loss


def critic(of: Callable[[Tensor, Tensor], Tensor]) -> tuple[nn.Module, Any, Loss]:
    return net(5, 1), [{"real": X, "fake": draw(N, 5, seed=3)}], lambda m, b: of(m(b["real"]), m(b["fake"])).mean()


def triple(of: Callable[[Tensor, Tensor], Tensor]) -> tuple[nn.Module, Any, Loss]:
    def loss(m: nn.Module, b: Any) -> Tensor:
        a, alike, other = (m(b[k]) for k in ("a", "alike", "other"))
        return of((a * alike).sum(1), (a * other).sum(1)).mean()

    return net(5, 8), [{"a": X, "alike": X + 0.1, "other": draw(N, 5, seed=4)}], loss


def binary(of: Callable[[Tensor, Tensor], Tensor], low: float = 0.0) -> tuple[nn.Module, Any, Loss]:
    y = torch.where(Y > 0, 1.0, low)
    return net(5, 1), [(X, y)], lambda m, b: of(m(b[0])[:, 0], b[1]).mean()


def by_hand(z: Tensor, y: Tensor) -> Tensor:
    return -(y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z))


def choices(of: Callable[[Tensor, Tensor], Tensor]) -> tuple[nn.Module, Any, Loss]:
    batch = {"obs": X, "action": X[:, :3].argmax(1), "reward": Y}
    return net(5, 3), [batch], lambda m, b: of(m(b["obs"]).gather(1, b["action"][:, None])[:, 0], b["reward"]).mean()


def classes(weights: list[float]) -> tuple[nn.Module, Any, Loss]:
    def loss(m: nn.Module, b: Any) -> Tensor:
        own = m(b[0]).log_softmax(1).gather(1, b[1][:, None])[:, 0]
        return -(torch.tensor(weights)[b[1]] * own).mean()

    return net(5, 3), [(X, X[:, :3].argmax(1))], loss


def boxes(sign: float) -> tuple[nn.Module, Any, Loss]:
    corner = 0.4 * torch.rand(N, 2, generator=torch.Generator().manual_seed(5))
    truth = torch.cat((corner, corner + 0.4), 1)

    def loss(m: nn.Module, b: Any) -> Tensor:
        q, t = m(b["x"]), b["boxes"]
        inner = (torch.minimum(q[:, 2:], t[:, 2:]) - torch.maximum(q[:, :2], t[:, :2])).clamp(min=0).prod(1)
        both = (q[:, 2:] - q[:, :2]).clamp(min=0).prod(1) + 0.16 - inner
        return 1 - sign * (inner / both.clamp(min=1e-6)).mean()

    model = net(5, 4, nn.Sigmoid())
    with torch.no_grad():
        model.get_parameter("2.bias").copy_(torch.tensor([-1.0, -1.0, 1.0, 1.0]))
    return model, [{"x": X, "boxes": truth}], loss


def gaussian_range(scale: float) -> tuple[nn.Module, Any, Loss]:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.log_std = net(5, 2, nn.Tanh()), nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.mean(x), self.log_std.clamp(-5, 2)

    def loss(m: nn.Module, b: Any) -> Tensor:
        mean, log_std = m(b["x"])
        return -torch.distributions.Normal(mean, log_std.exp()).log_prob(b["action"]).mean()

    return Policy(), [{"x": X, "action": scale * torch.stack((Y, -Y), 1) / Y.abs().max()}], loss


CASES: dict[str, tuple[tuple[nn.Module, Any, Loss], str]] = {
    "Gaussian": (regression(gaussian), ""),
    "Gaussian of large targets": (regression(lambda o, y: gaussian(o, 30 * y)), ""),
    "Gaussian without its logarithm": (regression(lambda o, y: gaussian(o, y, 0.0)), "loss-term-missing"),
    "Gaussian with the mean added": (regression(lambda o, y: gaussian(o, y, sign=1.0)), "loss-reversed"),
    "mixture": (regression(mixture, 6), ""),
    "mixture without scales": (regression(lambda o, y: mixture(o, y, 0.0), 6), "loss-term-missing"),
    "differences as they are": (regression(lambda o, y: (y - o[:, 0]).mean(), 1), "loss-unbounded"),
    "partial likelihood": (survival(1.0), ""),
    "partial likelihood, minimized": (survival(-1.0), "loss-unbounded"),
    "critic": (critic(lambda r, f: F.softplus(-r) + F.softplus(f)), ""),
    "critic, linear": (critic(lambda r, f: f - r), ""),
    "critic of one class": (critic(lambda r, f: F.softplus(-r) + F.softplus(-f)), "loss-unbounded"),
    "critic, reversed": (critic(lambda r, f: -F.softplus(-r) - F.softplus(f)), "loss-unbounded"),
    "pairs": (triple(lambda p, q: F.softplus(-p) + F.softplus(q)), ""),
    "pairs that are pulled alike": (triple(lambda p, q: F.softplus(-p) + F.softplus(-q)), "loss-unbounded"),
    "two labels": (binary(by_hand), ""),
    "hinge": (binary(lambda z, y: F.relu(1 - y * z), -1.0), ""),
    "two labels of −1 and 1": (binary(by_hand, -1.0), "labels-out-of-range"),
    "hinge of the size": (binary(lambda z, y: F.relu(1 - (2 * y - 1) * z.abs())), "loss-flat"),
    "values of actions": (choices(lambda q, r: (q - r).square()), ""),
    "values of actions, not squared": (choices(lambda q, r: r - q), "loss-unbounded"),
    "weighted classes": (classes([0.2, 1.0, 3.0]), ""),
    "classes without a weight": (classes([0.0, 1.0, 0.0]), "labels-ignored"),
    "overlap": (boxes(1.0), ""),
    "overlap, minimized": (boxes(-1.0), "loss-reversed"),
    "actions within the range": (gaussian_range(0.9), ""),
    "actions beyond the range": (gaussian_range(4.0), "output-range"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_loss_and_its_outputs(name: str) -> None:
    setup, code = CASES[name]
    assert set(found(*setup)) == ({code} if code else set())


class Flow(nn.Module):
    """Two affine couplings; with zeros at the end of their networks it begins as the identity."""

    def __init__(self, *, is_identity: bool) -> None:
        super().__init__()
        nets = [net(2, 4) for _ in range(2)]
        if is_identity:
            for one in nets:
                for p in one[2].parameters():
                    nn.init.zeros_(p)
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        total = torch.zeros(len(x))
        for one in self.nets:
            scale, shift = one(a).chunk(2, 1)
            a, b = b * scale.tanh().exp() + shift, a
            total = total + scale.tanh().sum(1)
        return torch.cat((a, b), 1), total


@pytest.mark.parametrize("is_identity", [True, False])
@pytest.mark.parametrize(("weight", "code"), [(1.0, ""), (-1.0, "loss-reversed"), (0.0, "loss-collapses")])
def test_log_determinants(weight: float, code: str, *, is_identity: bool) -> None:
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        z, log_det = m(x)
        prior = -z.square().sum(1) / 2 - 2 * math.log(2 * math.pi)
        return -(prior + (weight * log_det if weight else 0.0)).mean()

    codes = found(Flow(is_identity=is_identity), [draw(N, 4)], loss)
    assert {"loss-reversed", "loss-collapses"} & set(codes) == ({code} if code else set())


def test_a_network_that_judges_a_generator_is_no_fault() -> None:
    judge = net(1, 1)  # monotone outputs may please it without an end
    judge.requires_grad_(False)
    for of in (lambda s: F.softplus(-s), lambda s: -F.softplus(s), lambda s: -s):
        assert not found(net(4, 1), [draw(N, 4)], lambda m, z, of=of: of(judge(m(z))).mean())


@pytest.mark.parametrize(("sign", "codes"), [(-1, set()), (1, {"loss-unbounded"})])
def test_a_teacher_in_the_loss(sign: float, codes: set[str]) -> None:
    teacher = net(4, 3).requires_grad_(False)

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return sign * (teacher(x).softmax(-1) * m(x).log_softmax(-1)).sum(-1).mean()

    assert set(found(net(4, 3), [draw(N, 4)], loss)) == codes


@pytest.mark.parametrize("value", [-1e9, -1e4])
@pytest.mark.parametrize("is_own", [True, False])
def test_a_target_that_is_masked(value: float, *, is_own: bool) -> None:
    def loss(m: nn.Module, b: Any) -> Tensor:
        z = F.normalize(torch.cat([m(b["left"]), m(b["right"])]), dim=1)
        scores = (z @ z.T / 0.2).masked_fill(torch.eye(len(z), dtype=torch.bool), value)
        return F.cross_entropy(scores, torch.arange(len(z)) if is_own else torch.arange(len(z)).roll(len(z) // 2))

    x = draw(N, 8)
    codes = found(net(8, 6), [{"left": x, "right": x + 0.1 * draw(N, 8, seed=1)}], loss)
    assert set(codes) == ({"labels-out-of-range"} if is_own else set())


def test_dropout_as_a_function() -> None:
    class Dropped(nn.Module):
        def __init__(self, p: float) -> None:
            super().__init__()
            self.body, self.head, self.p = net(5, 24), nn.Linear(24, 3), p

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.dropout(self.body(x), self.p, self.training))

    y = X[:, :3].argmax(1)
    for p, told in ((0.1, False), (0.97, True)):
        assert ("dropout-rate" in found(Dropped(p), [(X, y)], lambda m, b: F.cross_entropy(m(b[0]), b[1]))) == told
