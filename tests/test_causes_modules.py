"""Causes in convolutional, recurrent and attention networks: named in their place, and not in the healthy network."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.inspection.causes.context import Context
from gramian.inspection.causes.precision import float16_weights
from gramian.inspection.passes.step_records import Observed
from gramian.inspection.passes.watched_steps import observe

CLASSIFY = gm.Objective.classification()
N, SIDE, VOCABULARY, LENGTH, CLASSES = 128, 8, 12, 10, 3


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def images() -> tuple[Tensor, Tensor]:
    """Images whose brightest of three stripes is the label."""
    y = torch.arange(N) % CLASSES
    x = torch.randn(N, 1, SIDE, SIDE, generator=draw())
    x[torch.arange(N), 0, y] += 2.0
    return x, y


@cache
def sentences() -> tuple[Tensor, Tensor]:
    """Tokens of which those of the label's third are the most frequent."""
    y = torch.arange(N) % CLASSES
    tokens = torch.randint(VOCABULARY, (N, LENGTH), generator=draw())
    own = y[:, None] * 4 + torch.randint(4, (N, LENGTH), generator=draw(1))
    return torch.where(torch.rand(N, LENGTH, generator=draw(2)) < 0.5, own, tokens), y


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(Residual() for _ in range(3))
        self.head = nn.Linear(8 * SIDE, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(3).flatten(1))


class Plain(nn.Module):
    """Residual blocks without norms."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(SIDE * SIDE, 32), nn.Linear(32, CLASSES)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))
        with torch.no_grad():
            for block in self.blocks:
                nn.init.orthogonal_(block.weight, factor)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.v, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.out(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))


class Sentences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 16)
        self.positions = nn.Parameter(0.1 * torch.randn(LENGTH, 16))
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.head = nn.Linear(16, CLASSES)
        self.cut = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.positions
        for block in self.blocks:
            x = block(x)
            x = x.detach() if self.cut and block is self.blocks[0] else x
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.lstm = nn.Embedding(VOCABULARY, 16), nn.LSTM(16, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.tokens(x))[0].mean(1))


class Deep(nn.Sequential):
    def __init__(self) -> None:
        layers = [m for _ in range(5) for m in (nn.Linear(SIDE * SIDE, SIDE * SIDE), nn.Tanh())]
        super().__init__(nn.Flatten(), *layers, nn.Linear(SIDE * SIDE, CLASSES))


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    model = kind()
    if isinstance(model, Images):
        with torch.no_grad():  # statistics as after some epochs
            for _ in range(60):
                model(images()[0])
    return model


def times(name: str, factor: float) -> Callable:
    def plant(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            model.get_parameter(name).mul_(factor)
        return model

    return plant


def scores(m: nn.Module) -> nn.Module:
    return times("blocks.1.k.weight", 12.0)(times("blocks.1.q.weight", 12.0)(m))


def rank_one(m: nn.Module) -> nn.Module:
    w = m.get_parameter("5.weight")
    with torch.no_grad():
        w.copy_(w[:, :1] @ w[:1] / w.norm() * 4)
    return m


def statistics(m: nn.Module) -> nn.Module:
    m.blocks[1].norm1.running_mean.add_(20.0)
    return m


def evaluation(m: nn.Module) -> nn.Module:
    m.blocks[1].norm1.eval()
    return m


def shared(m: nn.Module) -> nn.Module:
    m.blocks[1] = m.blocks[0]
    return m


def unused(m: nn.Module) -> nn.Module:
    m.blocks[1].forward = lambda x: x
    return m


def cut(m: nn.Module) -> nn.Module:
    m.cut = True
    return m


def shut(m: nn.Module) -> nn.Module:
    with torch.no_grad():
        m.lstm.bias_ih_l1[:16] -= 30.0  # the input gate of the second layer
    return m


def zero_gains(m: nn.Module) -> nn.Module:
    nn.init.zeros_(m.norm.weight)
    nn.init.zeros_(m.norm.bias)
    return m


def saturated(m: nn.Module) -> nn.Module:
    with torch.no_grad():
        m[5].bias.fill_(30.0)
    return m


def randn(m: nn.Module) -> nn.Module:
    for p in m.parameters():
        nn.init.normal_(p)
    return m


FAULTS = [
    (Images, "norm-zero-gain", "norm", zero_gains),
    (Images, "norm-statistics", "blocks.1.norm1", statistics),
    (Images, "norm-evaluation-mode", "blocks.1.norm1", evaluation),
    (Images, "parameter-shared", "blocks.0, blocks.1", shared),
    (Sentences, "graph-cut", "blocks.0.out", cut),
    (Sentences, "embedding-scale", "tokens.weight", times("tokens.weight", 100.0)),
    (Sentences, "attention-saturated", "blocks.1", scores),
    (Sentences, "head-scale", "head.weight", times("head.weight", 100.0)),
    (Recurrent, "gate-shut", "lstm", shut),
    (Deep, "parameter-scale-small", "5.weight", times("5.weight", 1e-3)),
    (Deep, "parameter-scale-large", "5.weight", times("5.weight", 100.0)),
    (Deep, "parameter-rank-one", "5.weight", rank_one),
    (Deep, "saturated-units", "5", saturated),
    (Deep, "gain-above-one", "all layers", randn),
]


def batch_of(kind: type) -> tuple[Tensor, Tensor]:
    return sentences() if kind in (Sentences, Recurrent) else images()


@cache
def troubles_of_healthy(kind: type) -> tuple[str, ...]:
    report = gm.inspect(made(kind), [batch_of(kind)], CLASSIFY)
    return tuple(f.code for f in report.findings if f.severity != "info")


@pytest.mark.parametrize("kind", [Images, Sentences, Recurrent, Deep])
def test_healthy_networks_have_no_trouble(kind: type) -> None:
    assert troubles_of_healthy(kind) == ()


@pytest.mark.parametrize(("kind", "code", "where", "plant"), FAULTS, ids=[f[1] for f in FAULTS])
def test_the_cause_is_first_and_in_its_place(kind: type, code: str, where: str, plant: Callable) -> None:
    first = gm.inspect(plant(made(kind)), [batch_of(kind)], CLASSIFY).findings[0]
    assert (first.code, first.where) == (code, where)
    assert first.severity != "info"


def test_a_block_that_is_not_called_is_named_with_its_parameters() -> None:
    first = gm.inspect(unused(made(Sentences)), [sentences()], CLASSIFY).findings[0]
    assert (first.code, first.severity) == ("parameter-unused", "warning")
    assert set(first.where.split(", ")) == {f"blocks.1.{part}" for part in ("norm", "q", "k", "v", "out")}


def test_a_stream_that_grows() -> None:
    torch.manual_seed(0)
    codes = {f: [x.code for x in gm.inspect(Plain(f), [images()], CLASSIFY).findings] for f in (0.1, 2.0)}
    assert "residual-growth" in codes[2.0]
    assert "residual-growth" not in codes[0.1]


def test_gradients_that_overflow_and_underflow_between_a_finite_loss_and_the_weights() -> None:
    def scaled(factor: float) -> Callable:
        """The loss in float16 on its way, scaled back: its gradient leaves the range of float16."""
        return lambda m, b: F.cross_entropy(m(b[0]).half().float(), b[1]) * factor

    model = made(Deep)
    for factor, code, where in ((1e9, "gradient-overflow", "all layers"), (1e-8, "gradient-underflow", "loss")):
        first = gm.inspect(model, [images()], scaled(factor)).findings[0]
        assert (first.code, first.where) == (code, where)


def test_labels_that_do_not_depend_on_the_inputs() -> None:
    x, y = images()
    wrong = y[torch.randperm(N, generator=draw(5))]
    assert "labels-independent" in {f.code for f in gm.inspect(made(Deep), [(x, wrong)], CLASSIFY).findings}
    tokens, y = sentences()
    wrong = y[torch.randperm(N, generator=draw(5))]
    assert "labels-independent" in {f.code for f in gm.inspect(made(Sentences), [(tokens, wrong)], CLASSIFY).findings}


def test_repeated_inputs_and_decay() -> None:
    x, y = images()
    few = torch.arange(N) % 20
    assert "input-duplicates" in {f.code for f in gm.inspect(made(Deep), [(x[few], y[few])], CLASSIFY).findings}
    model = made(Deep)
    decayed = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=5.0)
    assert gm.inspect(model, [images()], CLASSIFY, optimizer=decayed).findings[0].code == "weight-decay-too-large"


def test_a_value_that_is_not_finite_is_named_with_its_operation() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(x.clamp(max=0.0))

    model = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 8), Log(), nn.Linear(8, CLASSES))
    first = gm.inspect(model, [images()], CLASSIFY).findings[0]
    assert (first.code, first.where) == ("loss-non-finite", "2")
    assert "log" in first.title


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_entropy_of_attention_is_that_of_its_weights(causal: bool, masked: bool) -> None:
    """However the arguments of scaled_dot_product_attention are given."""
    if causal and masked:
        pytest.skip("torch refuses both")

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(4, 4)
            self.mask = torch.rand(5, 5, generator=draw()) < 0.7
            self.mask[:, 0] = True

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x)
            return F.scaled_dot_product_attention(q, x, x, self.mask if masked else None, 0.0, causal).mean(1)

    torch.manual_seed(0)
    model, x = Attend().double(), torch.randn(3, 5, 4, generator=draw()).double()
    [found] = observe(model, [(x, torch.zeros(3, dtype=torch.long))], CLASSIFY).attentions
    scores = model.q(x) @ x.mT / 2
    allowed = torch.ones(5, 5, dtype=torch.bool)
    if causal or masked:
        allowed = allowed.tril() if causal else model.mask
        scores = scores.masked_fill(~allowed, -torch.inf)
    p, keys = scores.detach().softmax(-1), allowed.sum(-1)
    entropy = torch.special.entr(p).sum(-1)[:, keys > 1] / keys[keys > 1].double().log()
    assert found.entropy == pytest.approx(float(entropy.mean()), rel=1e-5)
    assert found.masked == 0.0


def test_a_gradient_by_depth_counts_all_positions() -> None:
    """A mean over positions makes each position's gradient small, and not the layer's."""
    torch.manual_seed(0)
    convolutions = [m for _ in range(3) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.Tanh())]
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), *convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    )
    ratios = []
    for side in (8, 32):
        x = torch.randn(16, 1, side, side, generator=draw())
        report = gm.inspect(model, [(x, torch.arange(16) % CLASSES)], CLASSIFY)
        ratios.append(float(report.facts["gradient, first layer against last"]))
    assert 0.5 < ratios[1] / ratios[0] < 2.0  # with sixteen times the positions


class FunctionalDropout(nn.Module):
    """Dropout by functions, with or without the flag of the mode."""

    def __init__(self, *, follows_mode: bool, attends: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)
        self.follows_mode, self.attends = follows_mode, attends

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        acts = self.training or not self.follows_mode
        if self.attends:
            heads = h.view(-1, 4, 8)
            return self.last(F.scaled_dot_product_attention(heads, heads, heads, None, 0.2 * acts).flatten(1))
        return self.last(F.dropout(h, 0.2, acts))


@pytest.mark.parametrize("attends", [False, True])
@pytest.mark.parametrize("follows_mode", [False, True])
def test_dropout_that_acts_in_evaluation_mode_is_named(attends: bool, follows_mode: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(FunctionalDropout(follows_mode=follows_mode, attends=attends))
    x = torch.randn(64, 16)
    report = gm.inspect(model, [(x, x[:, :4].argmax(1))], gm.Objective.classification(), quick=True)
    told = [f.title for f in report.findings if f.code == "dropout-evaluation"]
    assert told == ([] if follows_mode else ["Dropout in module '0' (FunctionalDropout) acts in evaluation mode too"])


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, None])
def test_float16_weights_are_named_before_the_steps_that_diverge(make: type[torch.optim.Optimizer] | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).half()
    x = torch.randn(64, 16)
    y = x[:, :4].argmax(1)
    optimizer = make(model.parameters(), 1e-3) if make else None
    report = gm.inspect(model, [(x.half(), y)], gm.Objective.classification(), optimizer=optimizer, quick=True)
    first = report.findings[0]
    assert (first.code, first.severity) == ("parameter-float16", "error" if make is torch.optim.AdamW else "warning")
    if make is torch.optim.AdamW:  # which does diverge
        assert optimizer is not None
        F.cross_entropy(model(x.half()).float(), y).backward()
        optimizer.step()
        assert not all(bool(p.isfinite().all()) for p in model.parameters())


def test_frozen_float16_weights_are_nothing_to_tell() -> None:
    model = nn.Sequential(nn.Linear(16, 32).half().requires_grad_(False), nn.ReLU(), nn.Linear(32, 4))
    model[2].weight.data.clamp_(-1, 1)
    assert not list(float16_weights(Context(model, Observed())))


def test_labels_are_not_judged_where_no_dependence_could_be_seen() -> None:
    """128 images of 432 independent numbers, with labels that a network learns: the tests are blind, and say so."""
    x = torch.randn(N, 3, 12, 12, generator=draw())
    y = (x.flatten(1) @ torch.randn(432, 8, generator=draw(11))).relu() @ torch.randn(8, 3, generator=draw(21))
    report = gm.inspect(
        nn.Sequential(nn.Flatten(), nn.Linear(432, 8), nn.ReLU(), nn.Linear(8, 3)), [(x, y.argmax(1))], CLASSIFY
    )
    assert "labels-independent" not in {f.code for f in report.findings}
    assert "too few samples" in report.not_looked_at["whether labels depend on inputs"]


@pytest.mark.parametrize("init", ["torch", "he"])
@pytest.mark.parametrize("at", [1, 5, 9])
@pytest.mark.parametrize("samples", [8, 16, 64])
def test_a_dead_layer_is_the_cause_whatever_the_gains_and_the_size_of_the_batch(
    init: str, at: int, samples: int
) -> None:
    def net(bias: float) -> nn.Sequential:
        torch.manual_seed(at)
        linears = [nn.Linear(64, 64) for _ in range(10)]
        for layer in linears if init == "he" else ():
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        linears[at].bias.data.add_(bias)
        return nn.Sequential(*[m for layer in linears for m in (layer, nn.ReLU())], nn.Linear(64, CLASSES))

    x = torch.randn(samples, 64, generator=draw(at))
    batches = [(x, x[:, :CLASSES].argmax(1))]
    findings = gm.inspect(net(-10.0), batches, CLASSIFY).findings
    assert (findings[0].code, findings[0].where) == ("dead-units", str(2 * at))
    assert [f.code for f in findings if f.severity == "error"] == ["dead-units"]
    healthy = gm.inspect(net(0.0), batches, CLASSIFY).findings
    assert not [f for f in healthy if f.code == "dead-units" and f.severity == "error"]
