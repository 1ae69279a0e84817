"""What chooses and what came of it: routers, policies, pairs, scales of cosines, and numbers that are one for all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm

N, D, CHOICES = 128, 6, 4
Told = dict[str, tuple[str, str]]


def told(model: nn.Module, batches: list, loss: Callable | gm.Objective) -> Told:
    """Severity and place by code, of all but information."""
    found = gm.inspect(model, batches, loss).findings
    return {f.code: (f.severity, f.where) for f in found if f.severity != "info"}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Sparse(nn.Module):
    """Each row goes to the expert with the largest score."""

    def __init__(self, how: str, bias: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.gate = how, nn.Linear(D, CHOICES)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(CHOICES))
        nn.init.constant_(self.gate.bias[2:3].detach(), bias)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        scores = scores.softmax(-1) if self.how == "softmax" else scores.sigmoid() if self.how == "sigmoid" else scores
        weights, numbers = scores.topk(1, -1)
        out = x.new_zeros(len(x), 3)
        for i, expert in enumerate(self.experts):
            rows = (numbers[:, 0] == i).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, weights[rows] * expert(x[rows]))
        return out


@pytest.mark.parametrize("how", ["softmax", "sigmoid", "scores"])
def test_experts_that_no_row_is_sent_to(how: str) -> None:
    x = draw(N, D)
    batches, loss = [(x, (x @ draw(D, 3, seed=1)).argmax(1))], gm.Objective.classification()
    found = told(Sparse(how, 8.0), batches, loss)
    assert found.get("gate-shut") == ("error", "gate, experts.0, experts.1, experts.3")
    assert "parameter-unused" not in found
    healthy = told(Sparse(how, 0.0), batches, loss)
    assert not {"gate-shut", "parameter-unused"} & healthy.keys()


def test_experts_without_rows_by_chance_are_no_trouble() -> None:
    x = draw(6, D)
    model = Sparse("softmax", 0.0)
    assert len(model.gate(x).argmax(1).unique()) < CHOICES
    found = told(model, [(x, torch.tensor([0, 1, 2, 0, 1, 2]))], gm.Objective.classification())
    assert not {"gate-shut", "parameter-unused"} & found.keys()


class Actor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.pi, self.v = (
            nn.Sequential(nn.Linear(D, 16), nn.Tanh()),
            nn.Linear(16, CHOICES),
            nn.Linear(16, 1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.pi(h), self.v(h)[:, 0]


def played() -> list[dict[str, Tensor]]:
    x = draw(N, D)
    action = torch.randint(CHOICES, (N,), generator=torch.Generator().manual_seed(1))
    return [{"obs": x, "action": action, "ret": (x @ draw(D, CHOICES, seed=2)).gather(1, action[:, None])[:, 0]}]


def policy(old: str = "stored", *, entropy: float = 0.01, is_attached: bool = False) -> Callable:
    def log_p(scores: Tensor, action: Tensor) -> Tensor:
        return scores.log_softmax(-1).gather(1, action[:, None])[:, 0]

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        scores, values = model(batch["obs"])
        own = log_p(scores, batch["action"])
        advantage = batch["ret"] - (values if is_attached else values.detach())
        advantage = (advantage - advantage.mean()) / advantage.std()
        if old == "again":
            before = log_p(model(batch["obs"])[0], batch["action"])
        else:
            before = own if old == "same" else own.detach() if old == "detached" else torch.full_like(own, -1.4)
        ratio = (own - before).exp()
        gained = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        p = scores.softmax(-1)
        return (values - batch["ret"]).square().mean() - gained + entropy * (p * p.log()).sum(-1).mean()

    return loss


@pytest.mark.parametrize("old", ["same", "again", "detached", "stored"])
def test_a_ratio_that_is_one_whatever_the_policy_is(old: str) -> None:
    is_lost = old in ("same", "again")
    assert told(Actor(), played(), policy(old)).get("gradient-stopped") == (("warning", "loss") if is_lost else None)
    alone = told(Actor(), played(), policy(old, entropy=0.0))
    assert ("gradient-underflow" in alone, alone.get("gradient-stopped")) == (
        False, ("error", "loss, pi") if is_lost else None,
    )  # fmt: skip


def test_what_a_policy_learns_from() -> None:
    assert not told(Actor(), played(), policy())
    assert not told(Actor(), played(), policy(entropy=0.0))
    assert told(Actor(), played(), policy(entropy=10.0)) == {"loss-term-dominates": ("warning", "loss")}
    assert told(Actor(), played(), policy(entropy=-0.01)) == {"loss-reversed": ("warning", "loss")}
    assert told(Actor(), played(), policy(is_attached=True)) == {"target-not-detached": ("warning", "loss")}


class Timed(nn.Module):
    """Takes a vector and one number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.out = nn.Linear(D, 16), nn.Linear(16, D)
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t.reshape(-1, 1) * torch.arange(1.0, 5.0)
        return self.out(torch.tanh(self.body(x) + self.time(torch.cat((angles.sin(), angles.cos()), 1))))


@pytest.mark.parametrize("shape", [(N,), (N, 1)])
def test_a_time_that_is_one_number(shape: tuple[int, ...]) -> None:
    def loss(model: nn.Module, batch: tuple) -> Tensor:
        return F.mse_loss(model(*batch[0]), batch[1])

    x, t = draw(N, D), draw(N, seed=1).sigmoid()
    y = x * t[:, None]
    assert told(Timed(), [((x, torch.full(shape, 0.5)), y)], loss) == {"input-constant": ("warning", "data")}
    assert not told(Timed(), [((x, t.reshape(shape)), y)], loss)
    (few,) = gm.inspect(Timed(), [((x[:64], torch.full((64,), 0.5)), y[:64])], loss).findings
    assert (few.code, few.action) == ("samples-indistinguishable", None)
    assert "time.0" in few.cause


class Towers(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(D, 16), nn.Linear(D, 16)
        self.log = nn.Parameter(torch.tensor(scale).log())

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return self.log.exp() * F.normalize(self.one(one), dim=1) @ F.normalize(self.two(two), dim=1).T


@pytest.mark.parametrize(
    ("scale", "is_told"), [(1000.0, True), (0.1, True), (1.0, False), (14.0, False), (100.0, False)]
)
def test_the_learned_scale_of_cosines(scale: float, is_told: bool) -> None:
    batch = {"one": draw(N, D), "two": draw(N, D) + 0.1 * draw(N, D, seed=1)}
    found = told(Towers(scale), [batch], lambda model, b: F.cross_entropy(model(**b), torch.arange(N)))
    assert found.get("loss-bounded-scores") == (("warning", "loss, log") if is_told else None)


@pytest.mark.parametrize("kind", ["copied", "noisy", "dropped"])
def test_pairs_of_a_sample_and_itself(kind: str) -> None:
    """Two views that are one; not where dropout makes two of it."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        one, two = (F.normalize(model(batch[name]), dim=1) for name in ("left", "right"))
        return F.cross_entropy(one @ two.T / 0.1, torch.arange(len(one)))

    torch.manual_seed(0)
    x = draw(N, 24)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Dropout(0.1 if kind == "dropped" else 0.0), nn.Linear(32, 8))
    found = told(model, [{"left": x, "right": x + (0.2 * draw(N, 24, seed=1) if kind == "noisy" else 0)}], loss)
    assert found.get("pairs-mismatched") == (("warning", "data") if kind == "copied" else None)


@pytest.mark.parametrize(("kind", "severity"), [("apart", "warning"), ("ends", None), ("ignored", None)])
def test_padding_that_counts_without_an_index(kind: str, severity: str | None) -> None:
    """One token fills the ends of rows; not told where it is also what a text ends with."""
    tokens = torch.randint(3, 12, (N, 10), generator=torch.Generator().manual_seed(0))
    lengths = torch.randint(3, 10, (N, 1), generator=torch.Generator().manual_seed(1))
    tokens[torch.arange(10) >= lengths] = 0
    labels = torch.cat((tokens[:, 1:], torch.zeros(N, 1, dtype=torch.long)), 1)
    if kind != "ends":
        labels[torch.arange(10) == lengths - 1] = 2
    if kind == "ignored":
        labels[tokens == 0] = -100
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 12))
    found = gm.inspect(model, [(tokens, labels)], gm.Objective.classification()).findings
    assert [f.severity for f in found if f.code == "padding-read"] == ([severity] if severity else [])
