"""What is zero or frozen by design is no trouble, and what keeps itself shut or looks forgotten is named."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.inspection.experiments.opening_zeros import open_zeros
from gramian.inspection.passes.watched_steps import observe

CLASSIFY = gm.Objective.classification()
D, WIDTH, CLASSES = 10, 16, 3


def data(num: int = 3) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(5)
    w = torch.randn(D, CLASSES, generator=g)
    return [(x, (x @ w).argmax(-1)) for x in (torch.randn(48, D, generator=g) for _ in range(num))]


def zero(*layers: nn.Module) -> None:
    for layer in layers:
        for p in layer.parameters():
            nn.init.zeros_(p)


class Block(nn.Module):
    """`h + scale · branch(norm(h))`, of which `start` says what is zero at first."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.branch = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.film = nn.Linear(WIDTH, 2 * WIDTH) if "film" in start else None
        self.gate = nn.Linear(WIDTH, WIDTH) if "gate" in start else None
        if "scale" in start:
            nn.init.zeros_(self.scale)
        zero(*(layer for layer in (self.film, self.gate) if layer is not None))
        zero(*([self.branch[2]] if "last" in start else []), *([self.branch[0]] if "first" in start else []))

    def forward(self, h: Tensor) -> Tensor:
        x = self.norm(h)
        if self.film is not None:
            gain, shift = self.film(h).chunk(2, -1)
            return h + gain * self.branch(x) + shift
        branch = self.branch(x)
        return h + self.scale * branch * (1.0 if self.gate is None else self.gate(x))


class Coupling(nn.Module):
    """A flow whose conditioners end in zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3))
        zero(*(net[2] for net in self.nets))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logs = x.new_zeros(len(x))
        for net in self.nets:
            a, b = x.chunk(2, -1)
            scale, shift = net(a).chunk(2, -1)
            x, logs = torch.cat((b * scale.tanh().exp() + shift, a), -1), logs + scale.tanh().sum(-1)
        return x, logs


class Actor(nn.Module):
    """Two heads, of which the first starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.policy, self.value = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, 1)
        zero(self.policy)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.policy(h), self.value(h)


class Adapted(nn.Module):
    """A frozen layer and factors of its change, by names that no library uses."""

    def __init__(self, width: int, *, both: bool = False) -> None:
        super().__init__()
        self.base = nn.Linear(width, WIDTH).requires_grad_(False)
        self.down = nn.Parameter(torch.zeros(4, width) if both else torch.randn(4, width) * 0.3)
        self.up = nn.Parameter(torch.zeros(WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def residual(start: str) -> nn.Module:
    return nn.Sequential(nn.Linear(D, WIDTH), *(Block(start) for _ in range(3)), nn.Linear(WIDTH, CLASSES))


def plain(*, act: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, WIDTH), act(), nn.Linear(WIDTH, WIDTH), act(), nn.Linear(WIDTH, CLASSES))


def adapted(**kwargs: bool) -> nn.Module:
    layers = (Adapted(D, **kwargs), nn.ReLU(), Adapted(WIDTH, **kwargs), nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    return nn.Sequential(*layers)


def with_zero(*places: int) -> nn.Module:
    model = plain()
    zero(*(model[i] for i in places))
    return model


def troubles(report: gm.Report) -> list[tuple[str, str, str]]:
    return [(f.severity, f.code, f.where) for f in report.findings if f.severity != "info"]


def inspected(make: Callable[[], nn.Module], objective=CLASSIFY) -> gm.Report:
    torch.manual_seed(1)
    return gm.inspect(make(), data(), objective)


BY_DESIGN = ["scale", "last", "film", "gate"]


@pytest.mark.parametrize("start", BY_DESIGN)
def test_a_branch_that_starts_at_zero_is_no_trouble(start: str) -> None:
    assert not troubles(inspected(lambda: residual(start)))


def test_a_flow_two_heads_and_adapters_that_start_at_zero_are_no_trouble() -> None:
    def likelihood(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        z, logs = model(batch[0][:, :4])
        return (0.5 * z.square().sum(-1) - logs).mean()

    def actor(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        scores, value = model(batch[0])
        return F.cross_entropy(scores, batch[1]) + (value[:, 0] - batch[0][:, 0]).square().mean()

    assert not troubles(inspected(Coupling, likelihood))
    assert not troubles(inspected(Actor, actor))
    assert not troubles(inspected(adapted))
    assert not troubles(gm.inspect(Coupling()))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: residual("scale last"), {f"{i}.{part}" for i in (1, 2, 3) for part in ("scale", "branch.2.weight")}),
        (lambda: residual("first"), {f"{i}.branch.0.weight" for i in (1, 2, 3)}),  # its ReLUs are at zero with it
        (lambda: adapted(both=True), {f"{i}.{part}" for i in (0, 2) for part in ("down", "up")}),
        (lambda: with_zero(2), {"2.weight"}),
        (lambda: with_zero(2, 4), {"2.weight"}),
    ],
    ids=["gate and branch", "ReLU", "both factors", "inside", "inside and head"],
)
def test_zeros_that_stay_are_named_first(make: Callable[[], nn.Module], named: set[str]) -> None:
    finding = inspected(make).findings[0]
    assert (finding.severity, finding.code) == ("error", "zero-weights")
    assert set(finding.where.split(", ")) == named


@pytest.mark.parametrize("start", [*BY_DESIGN, "scale last", "last gate"])
def test_opening_says_what_steps_of_the_whole_model_would(start: str) -> None:
    """Which gradients are exactly zero at first, and after four steps of gradient descent in float64."""
    torch.manual_seed(1)
    model = residual(start).double()
    batches = [(x.double(), y) for x, y in data()]
    kept = copy.deepcopy(model.state_dict())
    found = open_zeros(model, observe(model, batches, CLASSIFY), CLASSIFY)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    steps = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = []
    for i in range(5):
        steps.zero_grad()
        F.cross_entropy(model(batches[i % 3][0]), batches[i % 3][1]).backward()
        gradients.append({n: bool(p.grad.any()) for n, p in model.named_parameters() if p.grad is not None})
        steps.step()
    opened = {n for n, moves in gradients[0].items() if not moves and gradients[-1][n]}
    still = {n for n, moves in gradients[-1].items() if not moves and not kept[n].any() and "bias" not in n}
    assert found.waiting == opened
    assert found.shut == still
    assert found.last == frozenset()


def untouched(*frozen: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = nn.Sequential(*plain(act=nn.ReLU)[:4], *plain(act=nn.ReLU)[2:])
        for name, p in model.named_parameters():
            p.requires_grad_(not any(name.startswith(f) or name.endswith(f) for f in frozen))
        return model

    return make


@pytest.mark.parametrize(
    ("make", "severity"),
    [
        (adapted, "info"),
        (untouched("weight"), "info"),  # biases alone are trained
        (untouched("2."), "warning"),
        (untouched("6."), "warning"),  # the head
        (untouched("0.", "2.", "4."), "warning"),  # untrained layers under a trained head
        (untouched("0.", "2.", "4.", "6."), "error"),
    ],
    ids=["adapters", "biases", "inside", "head", "all but the head", "all"],
)
def test_what_is_frozen_is_a_warning_where_it_looks_forgotten(make: Callable[[], nn.Module], severity: str) -> None:
    [finding] = [f for f in inspected(make).findings if f.code == "parameter-frozen"]
    assert finding.severity == severity


def test_a_trained_network_under_a_new_head_is_meant() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()).requires_grad_(False)
    for layer in (body[0], body[2]):  # directions that random entries do not have
        layer.weight.add_(0.2 * torch.outer(torch.randn(64), torch.randn(64)))
    x = torch.randn(96, 64)
    report = gm.inspect(nn.Sequential(*body, nn.Linear(64, CLASSES)), [(x, x[:, :CLASSES].argmax(1))], CLASSIFY)
    [finding] = [f for f in report.findings if f.code == "parameter-frozen"]
    assert finding.severity == "info"
    assert "are trained" in finding.evidence


class Attention(nn.Module):
    """Attention over the numbers of a sample, with one weight for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attn = nn.Linear(1, WIDTH), nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH)})
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x[..., None])
        q, k, v = self.attn["qkv"](h).chunk(3, -1)
        return self.head((h + F.scaled_dot_product_attention(q, k, v)).mean(1))


@pytest.mark.parametrize("parts", ["q", "v", "qk", "qkv"])
def test_zero_parts_of_a_fused_weight_that_keep_each_other_shut_are_named(parts: str) -> None:
    torch.manual_seed(0)
    model = Attention()
    for part in parts:
        rows = slice("qkv".index(part) * WIDTH, ("qkv".index(part) + 1) * WIDTH)
        for p in model.attn.parameters():
            p.data[rows] = 0
    before = copy.deepcopy(model.state_dict())
    (finding,) = [f for f in gm.inspect(model, data(), CLASSIFY).findings if f.code == "zero-weights"]
    shut, names = "qk" in parts, [f"attn.qkv.weight[{part}]" for part in ("kq" if "qk" in parts else parts)]
    told = "error" if shut else "info", ", ".join(names)
    assert (finding.severity, finding.where) == told
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
