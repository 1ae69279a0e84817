"""Gates that users write themselves: shut ones are named with what shuts them, and what only looks so is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.inspection.causes import ordered
from gramian.inspection.causes.context import Context
from gramian.inspection.causes.gates import RULES
from gramian.inspection.causes.heads import bounded_scores, offset
from gramian.inspection.passes.parameter_sources import trace
from gramian.inspection.passes.records import Source
from gramian.inspection.passes.step_records import Observed
from gramian.inspection.passes.watched_steps import observe
from gramian.report import Finding

N, WIDTH, STEPS, CLASSES = 64, 12, 6, 3
CLASSIFY = gm.Objective.classification()


class Net(nn.Module):
    """Modules by name, and a function of them."""

    def __init__(self, function: Callable[..., Tensor], **modules: Any) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def linear(rows: int = WIDTH, bias: float = 0.0, part: slice = slice(None), columns: int = WIDTH) -> nn.Linear:
    """A linear layer, part of whose bias has a value."""
    made = nn.Linear(columns, rows)
    nn.init.zeros_(made.bias)
    made.bias.data[part] = bias
    return made


def gated(function: Callable[..., Tensor], bias: float) -> Net:
    """A net with a gate of its own module `g` on the branch of `h`."""
    return Net(lambda m, x: m.o(function(m, x)), g=linear(bias=bias), h=linear(), o=linear(CLASSES))


def halves(function: Callable[[Tensor], Tensor]) -> Callable[[float], Net]:
    """Nets whose gate is the second half of one layer."""
    return lambda bias: Net(
        lambda m, x: m.o(function(m.g(x))), g=linear(2 * WIDTH, bias, slice(WIDTH, None)), o=linear(CLASSES)
    )


def product(gate: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def multiplied(t: Tensor) -> Tensor:
        value, before = t.chunk(2, -1)
        return value * gate(before)

    return multiplied


def cell(forget: float = 0.0, take: float = 0.0) -> Net:
    """An LSTM cell written by hand, with all gates in one layer `g`."""
    g = linear(4 * WIDTH, columns=2 * WIDTH)
    g.bias.data[:WIDTH], g.bias.data[WIDTH : 2 * WIDTH] = take, forget

    def run(m: Net, x: Tensor) -> Tensor:
        c = h = torch.zeros_like(x)
        for _ in range(STEPS):
            i, f, n, o = m.g(torch.cat([x, h], -1)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * n.tanh()
            h = o.sigmoid() * c.tanh()
        return m.o(h)

    return Net(run, g=g, o=linear(CLASSES))


def updating(bias: float, form: str = "two products") -> Net:
    """A recurrent cell whose gate keeps its state."""

    def run(m: Net, x: Tensor) -> Tensor:
        h = torch.zeros_like(x)
        for _ in range(STEPS):
            z, n = m.g(torch.cat([x, h], -1)).sigmoid(), m.h(torch.cat([x, h], -1)).tanh()
            h = (1 - z) * n + z * h if form == "two products" else n + z * (h - n)
        return m.o(h)

    return Net(run, g=linear(bias=bias, columns=2 * WIDTH), h=linear(columns=2 * WIDTH), o=linear(CLASSES))


def squeezed(bias: float, function: Callable[[Tensor], Tensor] = torch.sigmoid) -> Net:
    def run(m: Net, x: Tensor) -> Tensor:
        x = m.h(x.unsqueeze(1).unsqueeze(1).expand(-1, -1, 4, -1)).relu()
        gate = function(m.g(x.mean((2, 3))))
        return m.o((x * gate[:, :, None, None]).flatten(1))

    return Net(run, h=nn.Conv2d(1, 4, 1), g=linear(4, bias, columns=4), o=linear(CLASSES, columns=16 * WIDTH))


def highway(bias: float, form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Net:
    return gated(lambda m, x: form(m.g(x).sigmoid(), m.h(x).relu(), x), bias)


def watched(model: nn.Module) -> Context:
    torch.manual_seed(0)
    x = torch.randn(N, WIDTH)
    return Context(model, observe(model, [(x, torch.arange(N) % CLASSES)], CLASSIFY))


def found(model: nn.Module) -> dict[str, Finding]:
    context = watched(model)
    return {finding.code: finding for rule in RULES for finding in rule(context)}


SHUT: dict[str, Callable[[float], nn.Module]] = {
    "a branch": lambda b: gated(lambda m, x: x + m.g(x).sigmoid() * m.h(x).relu(), b),
    "in place": lambda b: gated(lambda m, x: m.h(x).mul_(m.g(x).sigmoid()), b),
    "addcmul": lambda b: gated(lambda m, x: torch.addcmul(x, m.g(x).sigmoid(), m.h(x)), b),
    "half of a layer": halves(product(torch.sigmoid)),
    "glu": halves(F.glu),
    "swiglu": halves(product(F.silu)),
    "geglu": halves(product(F.gelu)),
    "tanh": halves(product(lambda t: (t.tanh() + 1) / 2)),
    "norm": lambda b: Net(
        lambda m, x: m.o(m.g(m.w(x)).sigmoid() * m.h(x)), w=linear(), g=_norm(b), h=linear(), o=linear(CLASSES)
    ),
    "channels": squeezed,
    "hard sigmoid": lambda b: squeezed(b, F.hardsigmoid),
    "forget gate": lambda b: cell(forget=b),
    "input gate": lambda b: cell(take=b),
    "kept state": updating,
    "kept state by a difference": lambda b: updating(b, "difference"),
}


def _norm(bias: float) -> nn.LayerNorm:
    norm = nn.LayerNorm(WIDTH)
    nn.init.constant_(norm.bias, bias)
    return norm


@pytest.mark.parametrize("kind", SHUT)
def test_a_shut_gate_is_named_with_the_bias_that_shuts_it(kind: str) -> None:
    model = SHUT[kind](-6.0)
    finding = found(model)["gate-shut"]
    assert finding.where == "g"
    assert finding.action is not None
    assert finding.action.arguments == {"names": ("g.bias",)}
    assert "saturated-units" not in found(model)
    gm.init.reset_(model, ["g.bias"])
    assert not found(model)


@pytest.mark.parametrize("kind", SHUT)
def test_an_open_gate_is_not_told(kind: str) -> None:
    assert not found(SHUT[kind](0.0))
    assert not found(SHUT[kind](-1.0))


def test_the_mean_of_a_gate_is_measured() -> None:
    torch.manual_seed(0)
    model = SHUT["a branch"](-4.0)
    x = torch.randn(N, WIDTH)
    (gate,) = observe(model, [(x, torch.arange(N) % CLASSES)], CLASSIFY).gates
    expected = model.g(x).detach().double()
    assert gate.mean == pytest.approx(float(expected.sigmoid().mean()), rel=1e-5)
    assert gate.level == pytest.approx(float(expected.mean()), rel=1e-5)
    assert gate.size == pytest.approx(float(model.h(x).detach().relu().double().square().mean().sqrt()), rel=1e-5)
    assert found(model)["gate-shut"].severity == "warning"  # 2 % pass


@pytest.mark.parametrize("bias", [7.0])
@pytest.mark.parametrize("form", ["two products", "difference"])
def test_a_state_that_never_takes_anything_is_told(bias: float, form: str) -> None:
    finding = found(updating(bias, form))["gate-shut"]
    assert finding.where == "g"
    assert "1 − sigmoid" in finding.evidence


def test_weights_or_a_constant_that_shut_a_gate_are_told_in_words() -> None:
    finding = found(gated(lambda m, x: (m.g(x) - 6).sigmoid() * m.h(x), 0.0))["gate-shut"]
    assert finding.action is None
    assert "constant" in finding.advice
    model = gated(lambda m, x: m.g(x.abs()).sigmoid() * m.h(x), 0.0)
    nn.init.constant_(model.g.weight, -1.0)
    assert "g.weight" in found(model)["gate-shut"].advice


def _probabilities(m: Net, x: Tensor) -> Tensor:
    return m.g(x).sigmoid()[:, :1] * m.o(x).sigmoid()


def _experts(m: Net, x: Tensor) -> Tensor:
    values = torch.stack([m.h(x).relu()] * WIDTH, 1)
    best, which = m.g(x).sigmoid().topk(2, -1)
    weights = torch.zeros(N, WIDTH).scatter(-1, which, best / best.sum(-1, keepdim=True))
    return m.o((weights.unsqueeze(-1) * values).sum(1))


def _masked(m: Net, x: Tensor) -> Tensor:
    hidden = (torch.arange(WIDTH) > 0).expand_as(x)
    return m.o(m.g(x).masked_fill(hidden, -1e9).sigmoid() * m.h(x))


def _pooled(m: Net, x: Tensor) -> Tensor:
    values = torch.stack([m.h(x.roll(i, 1)) for i in range(32)], 1)
    return m.o((m.g(values).sigmoid()[..., :1] * values).sum(1))


MEANT: dict[str, Callable[[], nn.Module]] = {
    "highway": lambda: highway(-5.0, lambda t, h, x: t * h + (1 - t) * x),
    "highway by a difference": lambda: highway(-5.0, lambda t, h, x: x + t * (h - x)),
    "highway by lerp": lambda: highway(-5.0, lambda t, h, x: torch.lerp(x, h, t)),
    "a number that lets a branch begin small": lambda: Net(
        lambda m, x: m.o(x + m.g.sigmoid() * m.h(x)), g=nn.Parameter(torch.tensor(-6.0)), h=linear(), o=linear(CLASSES)
    ),
    "units that gate themselves": lambda: gated(lambda m, x: m.h(x) * (1.7 * m.h(x)).sigmoid() + m.g(x), 0.0),
    "probabilities of probabilities": lambda: Net(_probabilities, g=linear(bias=-5.0), o=linear(CLASSES, -5.0)),
    "experts": lambda: Net(_experts, g=linear(bias=-3.5), h=linear(), o=linear(CLASSES)),
    "masked entries": lambda: Net(_masked, g=linear(), h=linear(), o=linear(CLASSES)),
    "weights of a sum over positions": lambda: Net(_pooled, g=linear(bias=-3.4), h=linear(), o=linear(CLASSES)),
    "step sizes": lambda: gated(lambda m, x: F.softplus(m.g(x)) * m.h(x), -5.0),
    "a gate that is open": lambda: gated(lambda m, x: m.g(x).sigmoid() * m.h(x), 8.0),
    "a forget gate that is open": lambda: cell(forget=4.0),
}


@pytest.mark.parametrize("kind", MEANT)
def test_what_only_looks_like_a_shut_gate_is_not_told(kind: str) -> None:
    assert not found(MEANT[kind]())


def test_gates_are_told_by_inspect_and_the_action_cures() -> None:
    torch.manual_seed(0)
    model = SHUT["a branch"](-8.0)
    x = torch.randn(N, WIDTH)
    report = gm.inspect(model, [(x, (x @ torch.randn(WIDTH, CLASSES)).argmax(-1))], CLASSIFY)
    assert [f.code for f in report.findings if f.severity != "info"] == ["gate-shut"]
    assert report.findings[0].remedy.startswith('gm.init.reset_(model, ["g.bias"])')


def test_the_rows_of_a_bias_are_found_behind_splits() -> None:
    torch.manual_seed(0)
    layer, x = linear(4 * WIDTH), torch.randn(2, 3, WIDTH)
    names = {id(p): name for name, p in layer.named_parameters()}
    t = layer(x)
    for part, rows in (
        (t.chunk(4, -1)[2], (2 * WIDTH, 3 * WIDTH)),
        (t[..., 5:9], (5, 9)),
        (t[:, 1].split([10, 38], -1)[1][:, 2:4], (12, 14)),
        (t.flatten(0, 1).chunk(2, -1)[1].unbind(0)[0], (2 * WIDTH, 4 * WIDTH)),
        (t.view(2, 3, 4, WIDTH).unbind(2)[1], (WIDTH, 2 * WIDTH)),
        (t.unflatten(-1, (4, WIDTH))[:, :, 2, 3:5], (2 * WIDTH + 3, 2 * WIDTH + 5)),
        (t.view(2, 3, WIDTH, 4).unbind(-1)[3], (3, 4 * WIDTH, 4)),
        (t.view(2, 3, 4, WIDTH).permute(2, 0, 1, 3)[1], (WIDTH, 2 * WIDTH)),
        (t.view(6, 1, 2, 2, WIDTH).transpose(0, 3)[1, :, 1], (3 * WIDTH, 4 * WIDTH)),
        (1 - 2 * t.sigmoid().narrow(-1, 7, 3), (7, 10)),
    ):
        assert Source("bias", True, *rows) in trace(part, names).sources
    kernel = nn.Conv1d(3, 8, 1)
    part = kernel(torch.randn(2, 3, 5)).chunk(2, 1)[1]
    assert Source("bias", True, 4, 8) in trace(part, {id(p): n for n, p in kernel.named_parameters()}).sources
    assert trace(x, names).sources == ()


@pytest.mark.parametrize("shape", [(STEPS, 3, WIDTH), (STEPS, WIDTH, 3)])
def test_a_shut_gate_of_a_recurrence_written_by_hand_is_told(shape: tuple[int, int, int]) -> None:
    """An SRU, whose gates are divided by unbind: c = f c + (1 - f) x̃."""
    dim = shape.index(3) - 3

    def run(m: Net, x: Tensor) -> Tensor:
        inputs, forget, reset = m.g(x[:, None].expand(-1, STEPS, -1)).view(-1, *shape).unbind(dim)
        state = torch.zeros_like(inputs[:, 0])
        for t in range(STEPS):
            f = forget[:, t].sigmoid()
            state = f * state + (1 - f) * inputs[:, t]
        return m.o(reset[:, -1].sigmoid() * state.tanh())

    part = slice(WIDTH, 2 * WIDTH) if dim == -2 else slice(1, None, 3)
    for bias in (-6.0, 0.0):
        model = Net(run, g=linear(3 * WIDTH, bias, part), o=linear(CLASSES))
        told = found(model)
        assert {code: f.where for code, f in told.items()} == ({"gate-shut": "g"} if bias else {})


def cosine(function: Callable[[Tensor, Tensor], Tensor], classes: int = 40) -> Context:
    torch.manual_seed(0)
    model = Net(lambda m, x: function(m.h(x), m.w), h=linear(), w=nn.Parameter(torch.randn(classes, WIDTH)))
    model.scale = nn.Parameter(torch.tensor(2.0))
    return Context(model, observe(model, [(torch.randn(N, WIDTH), torch.arange(N) % classes)], CLASSIFY))


def cosines(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.normalize(x, dim=-1), F.normalize(w, dim=-1))


COSINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": cosines,
    "cosine_similarity": lambda x, w: F.cosine_similarity(x[:, None], w, dim=-1),
    "matmul": lambda x, w: (x / x.norm(dim=1, keepdim=True)) @ F.normalize(w).mT,
    "einsum": lambda x, w: torch.einsum("nd,cd->nc", F.normalize(x), F.normalize(w)),
    "sum of products": lambda x, w: (F.normalize(x)[:, None] * F.normalize(w)).sum(-1),
    "log-softmax": lambda x, w: cosines(x, w).log_softmax(-1),
}


@pytest.mark.parametrize("kind", COSINES)
def test_cosines_without_a_temperature_are_told_with_their_bound(kind: str) -> None:
    (finding,) = bounded_scores(cosine(COSINES[kind]))
    scores = torch.full((40,), -1.0, dtype=torch.float64)
    scores[0] = 1.0  # the best that cosines can do
    assert f"{float(F.cross_entropy(scores, torch.tensor(0))):.3g}" in finding.title


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: cosines(x, w) / 0.1,
        lambda x, w: 30 * cosines(x, w),
        lambda x, w: cosines(x, w) * w.norm(),  # a scale that is learned
        lambda x, w: F.linear(F.normalize(x), w),
        lambda x, w: F.linear(x, F.normalize(w)),
        lambda x, w: F.linear(x, w).tanh(),
    ],
)
def test_scores_that_can_grow_are_not_told(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert not list(bounded_scores(cosine(function)))


def test_cosines_of_few_classes_are_not_told() -> None:
    """With two the loss can fall to 0.127, of ln 2."""
    assert math.log1p(math.exp(-2)) < 0.2 * math.log(2)
    assert not list(bounded_scores(cosine(cosines, classes=2)))


def heads(bias: bool) -> Iterator[Finding]:
    """What is said of scores with an offset that the head's bias makes, or else its inputs."""
    torch.manual_seed(0)
    head = linear(CLASSES)
    model = Net(lambda m, x: m.o(x * 0.01 + (0 if bias else 300)), o=head)
    if bias:
        head.bias.data[0] = 100.0
    yield from offset(watched(model))


def test_an_offset_of_the_head_is_told_from_that_of_its_inputs() -> None:
    (by_bias,), (by_inputs,) = heads(True), heads(False)
    assert (by_bias.code, by_inputs.code) == ("head-offset", "head-input-offset")
    growth = Finding("residual-growth", "error", "The stream grows", where="all layers")
    mixed = Finding("samples-mixed", "warning", "Samples are mixed")
    assert [f.code for f in ordered([by_inputs, growth])] == ["residual-growth", "head-input-offset"]
    first, *rest = ordered([by_inputs, mixed, growth])
    assert (first.code, first.severity) == ("residual-growth", "error")
    assert {f.code: f.severity for f in rest}["head-input-offset"] == "info"


def test_nothing_is_told_of_an_empty_watch() -> None:
    context = Context(nn.Linear(2, 2), Observed())
    assert not [finding for rule in (*RULES, bounded_scores, offset) for finding in rule(context)]


def between(made: Callable[[], nn.Module], num: int) -> nn.Sequential:
    """Layers with norms, and a function behind each."""
    torch.manual_seed(0)
    layers = [layer for _ in range(num) for layer in (nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), made())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))


class Quick(nn.Module):
    """A function that weighs its own argument."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Squeezed(nn.Module):
    """Channels by a gate that they make themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.layer(x).sigmoid()


@pytest.mark.parametrize(
    ("made", "num", "told"),
    [(nn.Sigmoid, 3, True), (nn.Sigmoid, 2, False), (nn.Tanh, 3, False), (Squeezed, 4, False), (Quick, 4, False)],
    ids=["sigmoids", "two", "tanh", "gates", "own"],
)
def test_sigmoids_between_layers_are_told_behind_norms_too(made: Callable[[], nn.Module], num: int, told: bool) -> None:
    x = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(0))
    model = between(made, num)
    found = {f.code: f for f in gm.inspect(model, [(x, x[:, :CLASSES].argmax(1))], CLASSIFY).findings}
    assert ("gain-below-one" in found) == told
    if told:
        assert found["gain-below-one"].severity == "warning"
        assert found["gain-below-one"].action.arguments["names"] == ("2", "5", "8")
