"""Losses of one's own: wrong ones are told by what they do with labels, terms and pairs; right ones draw nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.bench.faults.cases import Case
from gramian.inspection.experiments import maximum_at_labels

CLASSES = 5
Loss = Callable[[nn.Module, Any], Tensor]


def net(inputs: int, outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, outputs))


def of(make: Callable[[torch.Generator], Any]) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [make(generator) for _ in range(4)]


def codes(model: nn.Module, batches: list[Any], loss: Loss) -> set[str]:
    report = gm.inspect(model, batches, loss)
    assert not any("failed" in why or "a fault of" in why for why in report.not_looked_at.values())
    return {f.code for f in report.findings if f.severity != "info"}


def classes(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 8, generator=generator)
    return x, (2 * x[:, :CLASSES] + x[:, 3:]).argmax(1)


def by_hand(log_probabilities: Tensor, y: Tensor) -> Tensor:
    return -log_probabilities.gather(1, y[:, None]).mean()


OF_CLASSES: dict[str, tuple[Loss, str]] = {
    "right": (lambda m, b: by_hand(m(b[0]).log_softmax(1), b[1]), ""),
    "focal": (lambda m, b: ((1 - (q := m(b[0]).softmax(1).gather(1, b[1][:, None]))) ** 2 * -q.log()).mean(), ""),
    "hinge": (lambda m, b: F.multi_margin_loss(m(b[0]), b[1]), ""),
    "sign": (lambda m, b: -by_hand(m(b[0]).log_softmax(1), b[1]), "loss-unbounded"),
    "dimension": (lambda m, b: by_hand((o := m(b[0])) - o.logsumexp(0), b[1]), "samples-mixed"),
    "one batch size": (lambda m, b: -by_hand(m(b[0]).reshape(32, CLASSES).log_softmax(1), b[1]), "loss-unbounded"),
    "alone": (lambda m, b: by_hand(m(b[0]), b[1]), "loss-not-log-probabilities"),
    "shifted": (lambda m, b: by_hand(m(b[0]).log_softmax(1), b[1].roll(1)), "pairs-mismatched"),
    "mixed": (
        lambda m, b: 0.7 * by_hand((o := m(b[0]).log_softmax(1)), b[1]) + 0.3 * by_hand(o, b[1].roll(1)),
        "",
    ),
}


@pytest.mark.parametrize("name", OF_CLASSES)
def test_classes_by_hand(name: str) -> None:
    loss, code = OF_CLASSES[name]
    assert codes(net(8, CLASSES), of(classes), loss) == ({code} if code else set())


def test_actions_and_rewards_are_no_labels() -> None:
    def act(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        x, best = classes(generator)
        action = torch.randint(0, CLASSES, (32,), generator=generator)
        return x, action, (action == best).float() - 1.0

    def reinforce(model: nn.Module, batch: Any) -> Tensor:
        x, action, reward = batch
        return -(model(x).log_softmax(1).gather(1, action[:, None])[:, 0] * reward).mean()

    assert not codes(net(8, CLASSES), of(act), reinforce)


def two(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 8, generator=generator)
    return x, (x[:, :1] + x[:, 1:2] * x[:, 2:3] > 0.3).float()


def binary(p: Tensor, y: Tensor) -> Tensor:
    return -(y * p.log() + (1 - y) * (1 - p).log()).mean()


def dice(p: Tensor, y: Tensor) -> Tensor:
    return (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)


OF_TWO: dict[str, tuple[Loss, str]] = {
    "right": (lambda m, b: binary(m(b[0]).sigmoid(), b[1]), ""),
    "clamped": (lambda m, b: binary(m(b[0]).sigmoid().clamp(1e-7, 1 - 1e-7), b[1]), ""),
    "dice": (lambda m, b: 1 - dice(m(b[0]).sigmoid(), b[1]), ""),
    "hinge": (lambda m, b: F.relu(1 - (2 * b[1] - 1) * m(b[0])).mean(), ""),
    "critic": (lambda m, b: (m(b[0]) * (2 * b[1] - 1)).mean(), ""),
    "sign": (lambda m, b: -binary(m(b[0]).sigmoid().clamp(1e-7, 1 - 1e-7), b[1]), "loss-reversed"),
    "swapped": (lambda m, b: binary(m(b[0]).sigmoid(), 1 - b[1]), "loss-reversed"),
    "missing": (lambda m, b: -(b[1] * m(b[0]).sigmoid().log()).mean(), "loss-term-missing"),
    "narrow clamp": (lambda m, b: binary(m(b[0]).sigmoid().clamp(0.4, 0.6), b[1]), "loss-flat"),
    "dice, one plus": (lambda m, b: 1 + dice(m(b[0]).sigmoid(), b[1]), "loss-reversed"),
    "dice, sign": (lambda m, b: dice(m(b[0]).sigmoid(), b[1]) + binary(m(b[0]).sigmoid(), b[1]), "loss-reversed"),
}


@pytest.mark.parametrize("name", OF_TWO)
def test_two_values_by_hand(name: str) -> None:
    loss, code = OF_TWO[name]
    found = codes(net(8, 1), of(two), loss)
    assert found == ({code} if code else set())


def overlap(scores: Tensor, y: Tensor) -> Tensor:
    p, t = scores.softmax(1), F.one_hot(y, 3).movedim(-1, 1)
    return ((2 * (p * t).sum((2, 3)) + 1) / ((p + t).sum((2, 3)) + 1)).mean()


def unlikely(scores: Tensor, y: Tensor) -> Tensor:
    return -(1 - scores.softmax(1).gather(1, y[:, None]) + 1e-6).log().mean()


OF_MASKS: dict[str, tuple[Loss, str]] = {
    "one minus": (lambda m, b: 1 - overlap(m(b[0]), b[1]), ""),
    "minus": (lambda m, b: -overlap(m(b[0]), b[1]), ""),
    "sign": (lambda m, b: overlap(m(b[0]), b[1]), "loss-reversed"),
    "one plus": (lambda m, b: 1 + overlap(m(b[0]), b[1]), "loss-reversed"),
    "beside": (lambda m, b: F.cross_entropy(o := m(b[0]), b[1]) + overlap(o, b[1]), "loss-reversed"),
    "energies": (lambda m, b: F.cross_entropy(-m(b[0]), b[1]), ""),
    "bounded energies": (lambda m, b: 1 - (-m(b[0])).softmax(1).gather(1, b[1][:, None]).mean(), ""),
    "complements": (lambda m, b: unlikely(m(b[0]), b[1]), ""),
}


@pytest.mark.parametrize("name", OF_MASKS)
def test_overlaps_by_hand(name: str) -> None:
    loss, code = OF_MASKS[name]

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(8, 3, 6, 6, generator=generator)
        return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.3).long()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))
    found = codes(model, of(batch), loss)
    assert ("loss-reversed" in found) is (code == "loss-reversed")


def numbers(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 8, generator=generator)
    return x, torch.stack((x[:, 0] * x[:, 1], x[:, 2].sin()), 1)


def quantile(e: Tensor) -> Tensor:
    return torch.maximum(0.9 * e, -0.1 * e).mean()


OF_NUMBERS: dict[str, tuple[Loss, str]] = {
    "right": (lambda m, b: ((m(b[0]) - b[1]) ** 2).mean(), ""),
    "quantile": (lambda m, b: quantile(b[1] - m(b[0])), ""),
    "residual": (lambda m, b: ((b[0][:, :2] - m(b[0]) - b[1]) ** 2).mean(), ""),
    "unsquared": (lambda m, b: (m(b[0]) - b[1]).mean(), "loss-unbounded"),
    "all pairs": (lambda m, b: ((m(b[0])[:, None] - b[1][None]) ** 2).mean(), "loss-broadcast"),
    "mean": (lambda m, b: ((m(b[0]) - b[1]) ** 2).mean() + 0 * m(b[0]).detach().sum(), ""),
    "detached": (lambda m, b: ((m(b[0]) - b[1]) ** 2).mean() + m(b[0]).detach().square().mean(), "graph-cut"),
    "column": (
        lambda m, b: ((o := m(b[0]))[:, 0] - b[1][:, 0]).square().mean() + (o[:, 1].detach() * o[:, 0]).square().mean(),
        "graph-cut",
    ),
    "straight through": (lambda m, b: ((o := m(b[0])) - b[1]).square().mean() + (o - o.detach()).sum(), ""),
}


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_numbers_by_hand(name: str) -> None:
    loss, code = OF_NUMBERS[name]
    assert codes(net(8, 2), of(numbers), loss) == ({code} if code else set())


def test_a_derivative_that_is_detached() -> None:
    def equation(*, detach: bool) -> Loss:
        def loss(model: nn.Module, batch: Any) -> Tensor:
            x = batch[0].clone().requires_grad_()
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            slope = slope.detach() if detach else slope
            return (slope - x.cos()).square().mean() + model(torch.zeros(1, 1)).square().mean()

        return loss

    batches = of(lambda g: (2 * torch.rand(32, 1, generator=g),))
    assert not codes(net(1, 1), batches, equation(detach=False))
    assert codes(net(1, 1), batches, equation(detach=True)) == {"graph-cut"}


@pytest.mark.parametrize("summed", [False, True])
def test_a_sum_beside_a_mean(summed: bool) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch[0])
        penalty = out.square().sum(1)
        return F.mse_loss(out, batch[1]) + (penalty.sum() if summed else penalty.mean())

    found = codes(net(8, 2), of(numbers), loss)
    assert found == ({"loss-summed"} if summed else set())


def views(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 12, generator=generator)
    return tuple(x + 0.3 * torch.randn(32, 12, generator=generator) for _ in range(2))


def info(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    return F.cross_entropy(F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / temperature, torch.arange(len(a)))


def alike(p: Tensor, z: Tensor) -> Tensor:
    return -F.cosine_similarity(p, z).mean()


OF_PAIRS: dict[str, tuple[Loss, str]] = {
    "info": (lambda m, b: info(m(b[0]), m(b[1])), ""),
    "rolled": (lambda m, b: info(m(b[0]), m(b[1]).roll(1, 0)), "pairs-mismatched"),
    "sign": (lambda m, b: -info(m(b[0]), m(b[1])), "pairs-mismatched"),
    "stopped": (lambda m, b: alike(m(b[0]), m(b[1]).detach()), ""),
    "not stopped": (lambda m, b: alike(m(b[0]), m(b[1])), "loss-collapses"),
    "variance": (lambda m, b: alike(z := m(b[0]), m(b[1])) + F.relu(1 - z.std(0)).mean(), ""),
    "sharp": (lambda m, b: info(m(b[0]), m(b[1]), 1e-3), "loss-bounded-scores"),
}


@pytest.mark.parametrize("name", OF_PAIRS)
def test_pairs(name: str) -> None:
    loss, code = OF_PAIRS[name]
    assert codes(net(12, 16), of(views), loss) == ({code} if code else set())


class Triplet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.net(x), dim=1)


def triplet(*, margin: float) -> Loss:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        a, p, n = model(batch[0].flatten(0, 1)).unflatten(0, (-1, 3)).unbind(1)
        return F.relu((a - p).square().sum(1) - (a - n).square().sum(1) + margin).mean()

    return loss


def triples(generator: torch.Generator) -> tuple[Tensor]:
    x = torch.randn(32, 1, 12, generator=generator) + 0.1 * torch.randn(32, 3, 12, generator=generator)
    x[:, 2] = torch.randn(32, 12, generator=generator)
    return (x,)


def test_a_triplet_loss_that_is_satisfied_is_no_fault() -> None:
    model, batches = Triplet(), of(triples)[:1]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        triplet(margin=0.3)(model, batches[0]).backward()
        optimizer.step()
    assert float(triplet(margin=0.3)(model, batches[0]).detach()) == 0.0
    assert not codes(model, batches, triplet(margin=0.3))


def test_a_triplet_loss_that_few_triples_leave_unsatisfied_uses_its_negatives() -> None:
    """Of the samples that are looked at, all negatives are far, and the loss is that of one positive."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        a, p, n = (model(batch[name]) for name in ("anchor", "positive", "negative"))
        return F.triplet_margin_loss(a, p, n, margin=0.2) + (a - p).square().mean()

    g = torch.Generator().manual_seed(0)
    x, far = torch.randn(2, 128, 12, generator=g)
    data = {"anchor": x, "positive": x + 0.01 * torch.randn(x.shape, generator=g), "negative": x + 6 * far.sign()}
    batches = [{name: t[i : i + 32] for name, t in data.items()} for i in range(0, 128, 32)]
    model, first = net(12, 8), batches[0]
    assert loss(model, first | {"negative": first["negative"].roll(1, 0)}) == loss(model, first)
    assert not codes(model, batches, loss)


def test_a_triplet_loss_with_a_margin_of_the_wrong_sign() -> None:
    assert "loss-collapses" in codes(Triplet(), of(triples), triplet(margin=-0.3))


class Values(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("detached", [True, False])
def test_temporal_differences(detached: bool) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        state, reward, after = batch
        following = model(after).amax(1)
        return F.smooth_l1_loss(model(state)[:, 0], reward + 0.9 * (following.detach() if detached else following))

    def transition(generator: torch.Generator) -> tuple[Tensor, ...]:
        x = torch.randn(32, 8, generator=generator)
        return x, x[:, 0].sin(), torch.randn(32, 8, generator=generator)

    found = codes(Values(), of(transition), loss)
    assert found == (set() if detached else {"target-not-detached"})


class Reader(nn.Module):
    """A recurrence over padded tokens, read where they end, or at the last position."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.table, self.cell = nn.Embedding(12, 16, padding_idx=0), nn.GRU(16, 24, batch_first=True)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        out, _ = self.cell(self.table(ids))
        if self.how == "last":
            return self.head(out[:, -1])
        return self.head(out[torch.arange(len(ids)), (ids != 0).sum(1) - 1])


@pytest.mark.parametrize(("how", "in_front"), [("last", False), ("end", False), ("last", True)])
def test_padding_that_is_read(how: str, in_front: bool) -> None:
    def tokens(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        lengths = torch.randint(3, 11, (32,), generator=generator)
        y = torch.randint(0, CLASSES, (32,), generator=generator)
        x = torch.randint(6, 12, (32, 10), generator=generator)
        x[:, 0] = 1 + y
        x = x * (torch.arange(10) < lengths[:, None])
        return x.flip(1) if in_front else x, y

    found = codes(Reader(how), of(tokens), lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    assert found == (set() if how == "end" or in_front else {"padding-read"})


class Translator(nn.Module):
    """A decoder that attends to itself and to its source."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fault = fault
        self.tables = nn.ModuleList(nn.Embedding(10, 16) for _ in range(2))
        self.places = nn.Parameter(0.5 * torch.randn(8, 16))
        self.maps = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
        self.head = nn.Linear(16, 10)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, hides: bool, dim: int = -1) -> Tensor:
        scores = q @ k.transpose(1, 2) / 4
        if hides:
            scores = scores.masked_fill(torch.ones(8, 8, dtype=torch.bool).triu(1), -1e9)
        return scores.softmax(dim).nan_to_num(0.0) @ v

    def forward(self, source: Tensor, given: Tensor) -> Tensor:
        memory, y = self.tables[0](source) + self.places, self.tables[1](given) + self.places
        a, b, c, d, e, f = self.maps
        y = y + self.attend(a(y), b(y), c(y), hides=self.fault != "sees behind")
        y = y + self.attend(d(y), e(memory), f(memory), hides=False, dim=1 if self.fault == "queries" else -1)
        return self.head(y)


@pytest.mark.parametrize(
    ("fault", "code"), [("", ""), ("sees behind", "target-leak"), ("queries", "attention-over-queries")]
)
@pytest.mark.parametrize("own", [False, True])
def test_decoders(fault: str, code: str, own: bool) -> None:
    def pair(generator: torch.Generator) -> dict[str, Tensor]:
        source = torch.randint(1, 10, (32, 8), generator=generator)
        target = source.flip(1)
        return {"source": source, "given": torch.cat((torch.zeros(32, 1).long(), target[:, :-1]), 1), "labels": target}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch["source"], batch["given"])
        if own:
            return -out.log_softmax(-1).gather(-1, batch["labels"][..., None]).mean()
        return F.cross_entropy(out.flatten(0, 1), batch["labels"].flatten())

    found = codes(Translator(fault), of(pair), loss)
    assert code in found if code else not found


class Attend(nn.Module):
    """Attention whose queries compete for keys."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x) for layer in self.maps)
        return x + (q @ k.mT).softmax(1) @ v


def test_all_modules_with_the_same_fault_are_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Attend(), nn.Tanh(), Attend(), nn.Flatten(), nn.Linear(40, 2))
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(32, 5, 8, generator=generator), torch.randint(2, (32,), generator=generator)
    found = next(f for f in gm.inspect(model, [batch], gm.Objective.classification()).findings if f.severity == "error")
    assert (found.code, found.where) == ("attention-over-queries", "0, 2")
    assert "so in 1 other module" in found.evidence


def test_what_classes_hold_is_put_back() -> None:
    class Counting(nn.Module):
        calls = 0
        seen: list[int] = []  # noqa: RUF012 (what is shared is the point)

        def __init__(self) -> None:
            super().__init__()
            self.net = net(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            self.seen.append(len(x))
            type(self).late = True
            return self.net(x)

    gm.inspect(Counting(), of(classes), gm.Objective.classification())
    assert Counting.calls == 0
    assert Counting.seen == []
    assert not hasattr(Counting, "late")


@pytest.mark.parametrize("kind", ["float16-underflow", "float16-overflow"])
def test_what_half_precision_loses_is_the_factors_fault(kind: str) -> None:
    """Gradients that float16 makes zero or infinite are no columns without a gradient, and nothing collapses."""
    setup = Case(kind, "mlp", 0).build()
    report = gm.inspect(setup.model, setup.batches, setup.objective, optimizer=setup.optimizer)
    first = next(f.code for f in report.findings if f.severity != "info")
    assert first == f"gradient-{kind.removeprefix('float16-')}"


def test_labels_are_put_in_place_of_the_output_of_their_shape() -> None:
    """And in columns of another one only where there is none: a score is no width of a box."""
    boxes, scores, labels = torch.zeros(8, 4), torch.zeros(8, 1), torch.zeros(8)
    assert list(maximum_at_labels._places([boxes, scores], labels)) == [(1, ())]
    assert list(maximum_at_labels._places([boxes], labels)) == [(0, (c,)) for c in range(4)]


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize(("dim", "found"), [(-1, set()), (0, {"samples-mixed"})])
def test_the_weights_of_a_mixture(dim: int, found: set[str], is_log: bool) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        scores, means, sizes = model(batch[0]).chunk(3, 1)
        density = -0.5 * ((batch[1] - means) / sizes.exp()).square() - sizes
        if is_log:
            return -(scores.log_softmax(dim) + density).logsumexp(-1).mean()
        return -(scores.softmax(dim) * density.exp()).sum(-1).log().mean()

    def points(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.rand(32, 1, generator=generator)
        return x, x + 0.3 * torch.randn(32, 1, generator=generator)

    torch.manual_seed(0)
    assert codes(nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 9)), of(points), loss) == found
