"""Products with zeros, signs by the slope along outputs, what is compared with what, and labels of other samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm

Loss = Callable[[nn.Module, Any], Tensor]


def net(inputs: int, outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, outputs))


def of(make: Callable[[torch.Generator], Any], batches: int = 4) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [make(generator) for _ in range(batches)]


def codes(model: nn.Module, batches: list[Any], loss: Loss) -> set[str]:
    report = gm.inspect(model, batches, loss)
    assert not any("failed" in why or "a fault of" in why for why in report.not_looked_at.values())
    return {f.code for f in report.findings if f.severity != "info"}


class Two(nn.Module):
    """Two heads, a branch, and layers that take no part but in a penalty."""

    def __init__(self, branch: float = 1.0, gain: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.branch = nn.Linear(8, 16), nn.Linear(16, 16)
        self.number, self.classes, self.spare = nn.Linear(16, 1), nn.Linear(16, 3), nn.Linear(16, 4)
        self.factor = branch
        self.gain = None if gain is None else nn.Parameter(torch.full((16,), gain), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).tanh()
        h = h + self.factor * self.branch(h).tanh() * (1.0 if self.gain is None else self.gain)
        return self.number(h)[:, 0], self.classes(h)


def tasks(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(64, 8, generator=generator)
    return x, x[:, 0] - x[:, 1], x[:, 2:5].argmax(1)


def both(model: nn.Module, batch: Any, term: float | Tensor = 1.0, weight: Tensor | None = None) -> Tensor:
    number, classes = model(batch[0])
    unused = sum(p.sum() for p in model.spare.parameters())  # as torch's data parallel wants it
    return F.mse_loss(number, batch[1]) + term * F.cross_entropy(classes, batch[2], weight) + 0 * unused


ZEROS: dict[str, tuple[Callable[[], nn.Module], Loss, set[str]]] = {
    "none": (Two, both, set()),
    "a term": (Two, lambda m, b: both(m, b, 0.0), {"zero-factor"}),
    "a weight of all samples": (Two, lambda m, b: both(m, b, torch.zeros(64)).mean(), {"zero-factor"}),
    "weights of all classes but one": (
        Two,
        lambda m, b: both(m, b, weight=torch.tensor([1.0, 0.0, 0.0])),
        {"zero-factor"},
    ),
    "a branch": (lambda: Two(0.0), both, {"zero-factor"}),
    "a gain that is frozen": (lambda: Two(gain=0.0), both, {"zero-weights"}),
}


@pytest.mark.parametrize("name", ZEROS)
def test_products_with_zeros(name: str) -> None:
    model, loss, expected = ZEROS[name]
    assert codes(model(), of(tasks), loss) == expected


def numbers(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 8, generator=generator)
    return x, (x[:, 0] + 0.5 * x[:, 1]).exp().clamp(max=6)


def gaussian(out: Tensor, y: Tensor, by: float = 1.0, sign: float = -1.0) -> Tensor:
    return (0.5 * by * out[:, 1] + 0.5 * (y - out[:, 0]).square() * (sign * out[:, 1]).exp()).mean()


OF_NUMBERS: dict[str, tuple[int, Loss, set[str]]] = {
    "Poisson": (1, lambda m, b: ((o := m(b[0])[:, 0]).exp() - b[1] * o).mean(), set()),
    "Poisson, sign": (1, lambda m, b: ((o := m(b[0])[:, 0]).exp() + b[1] * o).mean(), {"loss-reversed"}),
    "Poisson, no rate": (1, lambda m, b: -(b[1] * m(b[0])[:, 0]).mean(), {"loss-unbounded"}),
    "exponential": (1, lambda m, b: ((o := m(b[0])[:, 0]).exp() * b[1] - o).mean(), set()),
    "Gaussian": (2, lambda m, b: gaussian(m(b[0]), b[1]), set()),
    "precision": (2, lambda m, b: gaussian(m(b[0]), b[1], -1.0, 1.0), set()),
    "variance, sign": (2, lambda m, b: gaussian(m(b[0]), b[1], -1.0), {"loss-unbounded"}),
    "plus": (1, lambda m, b: (m(b[0])[:, 0] + b[1]).square().mean(), {"loss-reversed"}),
    "another unit": (1, lambda m, b: (m(b[0])[:, 0] - 2 * b[1] - 12).square().mean(), set()),
    "rows": (1, lambda m, b: (m(b[0])[:, None] - b[1][:, None]).abs().mean(), {"loss-broadcast"}),
    "rolled": (1, lambda m, b: (m(b[0])[:, 0] - b[1].roll(1)).square().mean(), {"pairs-mismatched"}),
    "correlation": (1, lambda m, b: -torch.corrcoef(torch.stack((m(b[0])[:, 0], b[1])))[0, 1], set()),
    "tiny": (1, lambda m, b: (m(b[0])[:, 0] - b[1]).square().mean() * 1e-20, {"gradient-underflow"}),
    "a product": (1, lambda m, b: -m(b[0]).sigmoid()[:, 0].pow(300).mean() * 1e-30, {"gradient-underflow"}),
}


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_likelihoods_by_hand(name: str) -> None:
    outputs, loss, expected = OF_NUMBERS[name]
    assert codes(net(8, outputs), of(numbers), loss) == expected


def acts(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(64, 8, generator=generator)
    action = torch.randint(0, 4, (64,), generator=generator)
    return x, action, (action == x[:, :4].argmax(1)).float() - 0.25


def reinforce(sign: float, shift: int = 0) -> Loss:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, action, advantage = batch
        own = model(x).log_softmax(1).gather(1, ((action + shift) % 4)[:, None])[:, 0]
        return sign * (own * advantage).mean()

    return loss


@pytest.mark.parametrize(
    ("sign", "shift", "expected"), [(-1.0, 0, set()), (1.0, 0, {"loss-reversed"}), (-1.0, 1, {"pairs-mismatched"})]
)
def test_rewards_raise_the_scores_of_their_actions(sign: float, shift: int, expected: set[str]) -> None:
    model = net(8, 4)
    with torch.no_grad():
        model[-1].weight.mul_(0.01)  # as a policy's head begins
    assert codes(model, of(acts), reinforce(sign, shift)) == expected


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = net(8, 8), net(8, 8)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.one(a), dim=1), F.normalize(self.two(b), dim=1)


@pytest.mark.parametrize(("sign", "shift"), [(1.0, 0), (-1.0, 0), (1.0, 8)])
def test_two_encoders_and_their_pairs(sign: float, shift: int) -> None:
    def views(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        z = torch.randn(64, 8, generator=generator)
        return z.tanh(), z.flip(1) + 0.1 * torch.randn(64, 8, generator=generator)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        one, two = model(*batch)
        return F.cross_entropy(sign * one @ two.T / 0.1, torch.arange(len(one)).roll(shift))

    healthy = sign > 0 and not shift
    assert codes(Towers(), of(views), loss) == (set() if healthy else {"pairs-mismatched"})


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(12, 16, padding_idx=0), nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens))


@pytest.mark.parametrize(
    ("fault", "expected"),
    [("", set()), ("shuffled", {"labels-independent"}), ("inverted", {"padding-read"})],
)
def test_labels_and_masks_of_sequences(fault: str, expected: set[str]) -> None:
    def tagged(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        tokens = torch.randint(1, 12, (32, 10), generator=generator)
        mask = torch.arange(10) < torch.randint(4, 11, (32, 1), generator=generator)
        tags = tokens % 3
        tags = tags[torch.randperm(32, generator=generator)] if fault == "shuffled" else tags
        return tokens * mask, tags, mask.float()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        tokens, tags, mask = batch
        losses = F.cross_entropy(model(tokens).transpose(1, 2), tags, reduction="none")
        mask = 1 - mask if fault == "inverted" else mask
        return (losses * mask).sum() / mask.sum()

    assert codes(Tagger(), of(tagged), loss) == expected


@pytest.mark.parametrize("fault", ["", "rolled", "mirrored"])
def test_labels_of_images(fault: str) -> None:
    def segmented(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        mask = F.interpolate(torch.rand(32, 1, 4, 4, generator=generator).round(), scale_factor=3)
        image = mask + 0.5 * torch.randn(mask.shape, generator=generator)
        return image, mask.roll(1, 0) if fault == "rolled" else mask.flip(3) if fault == "mirrored" else mask

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
    found = codes(model, of(segmented), lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[1]))
    assert found == ({"labels-independent"} if fault else set())


def test_numbers_of_a_loss_of_ones_own_that_were_shuffled() -> None:
    def shuffled(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = numbers(generator)
        return x, y[torch.randperm(64, generator=generator)]

    loss = OF_NUMBERS["Poisson"][1]
    assert codes(net(8, 1), of(shuffled), loss) == {"labels-independent"}


class Adapted(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base, self.head, self.scale = nn.Linear(8, 64), nn.Linear(64, 3), scale
        self.requires_grad_(False)
        self.down, self.up = nn.Linear(8, 4, bias=False), nn.Linear(4, 64, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.base(x) + self.scale * self.up(self.down(x))).tanh())


@pytest.mark.parametrize(("scale", "told"), [(2.0, False), (1e-6, True), (1e5, True)])
def test_the_scale_of_an_adapter(scale: float, told: bool) -> None:
    batches = [(x, y) for x, _, y in of(tasks)]
    found = codes(Adapted(scale), batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    assert ("adapter-scale" in found) == told


class Rated(nn.Module):
    """Users and items by their numbers."""

    def __init__(self, column: int, *, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.users, self.items, self.column = nn.Embedding(20, 8), nn.Embedding(20, 8), column
        self.head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
        self.users.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat((self.users(x[:, 0]), self.items(x[:, self.column])), 1))[:, 0]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Rated(1), set()),
        (Rated(0), {"input-unused"}),
        (Rated(1, frozen=True), {"parameter-frozen"}),
    ],
)
def test_lookups(model: nn.Module, expected: set[str]) -> None:
    def rated(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randint(0, 20, (64, 2), generator=generator)
        return x, (x[:, 0] - x[:, 1]) / 10

    assert codes(model, of(rated), lambda m, b: F.mse_loss(m(b[0]), b[1])) == expected


def test_states_of_a_small_grid_repeat() -> None:
    def visited(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        row, column = torch.randint(0, 4, (2, 64), generator=generator)
        return torch.cat((F.one_hot(row, 4), F.one_hot(column, 4)), 1).float(), (row - 0.5 * column).float()

    assert not codes(net(8, 1), of(visited), lambda m, b: F.mse_loss(m(b[0])[:, 0], b[1]))
    again = [(x[:2].repeat(32, 1), y[:2].repeat(32)) for x, y in of(numbers, 1)]
    assert "input-duplicates" in codes(net(8, 1), again, lambda m, b: F.mse_loss(m(b[0])[:, 0], b[1]))


def test_a_rectified_unit_of_its_own_may_wake() -> None:
    class Sized(Two):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(x).tanh()
            h = h + self.branch(h).tanh()
            classes = self.classes(h)
            return self.number(h).relu()[:, 0], classes

    model = Sized()
    nn.init.constant_(model.number.bias, -9.0)
    assert not codes(model, [(x, y.abs(), k) for x, y, k in of(tasks)], both)


def test_a_hinge_that_is_satisfied_is_no_trouble():
    x, other = torch.randn(2, 64, 6, generator=torch.Generator().manual_seed(1))

    def triplet(model, batch):
        one, alike, apart = (model(part) for part in batch)
        return F.relu((one - alike).square().sum(1) - (one - apart).square().sum(1) + 1e-3).mean()

    assert not codes(net(6, 4), [(x, x + 0.001, 3 * other)], triplet)


def test_a_distribution_that_refuses_nan_hides_no_cause(monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # as it is unless somebody says
    x, y = torch.randn(2, 64, 6, generator=torch.Generator().manual_seed(1))
    x[3, 2] = torch.nan

    def loss(model, batch):
        mean, log = model(batch[0]).chunk(2, 1)
        return -torch.distributions.Normal(mean, log.exp()).log_prob(batch[1][:, :2]).mean()

    assert codes(net(6, 4), [(x, y)], loss) == {"input-non-finite"}
    with pytest.raises(ValueError, match="Expected parameter loc"):
        loss(net(6, 4), (x, y))


class Tuned(nn.Module):
    """Three frozen layers, each with a factored change of its own, and an offset at the end that is trained too."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(_Changed(n, scale) for n in (8, 64, 64))
        self.head, self.offset = nn.Linear(64, 3).requires_grad_(False), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x) + self.offset


class _Changed(nn.Module):
    def __init__(self, n: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = nn.Linear(n, 64).requires_grad_(False), scale
        self.down, self.up = nn.Parameter(torch.randn(4, n) / n**0.5), nn.Parameter(torch.zeros(64, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.down.T @ self.up.T)


@pytest.mark.parametrize(("scale", "told"), [(2.0, set()), (1e-7, {"adapter-scale"})])
def test_an_offset_that_is_trained_hides_no_adapter_and_its_gradients_are_none_of_depth(
    scale: float, told: set[str]
) -> None:
    batches = [(x, y) for x, _, y in of(tasks)]
    found = codes(Tuned(scale), batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    assert found & {"adapter-scale", "gradient-explodes", "gradient-vanishes"} == told


@pytest.mark.parametrize("is_trained", [True, False])
def test_adapters_that_are_zero_and_frozen(*, is_trained: bool) -> None:
    model = Tuned(2.0)
    for layer in model.layers:
        layer.up.requires_grad_(is_trained)
    batches = [(x, y) for x, _, y in of(tasks)]
    findings = gm.inspect(model, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1])).findings
    assert any("3 matrices are zero and frozen" in f.title for f in findings) != is_trained


@pytest.mark.parametrize(("is_reversed", "told"), [(False, set()), (True, {"loss-reversed"})])
def test_the_convention_of_a_label_of_pairs(is_reversed: bool, told: set[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    left, other, noise = torch.randn(3, 64, 6, generator=generator)
    same = (torch.arange(64) % 2).float()
    right = torch.where(same[:, None] == 1, left + 0.3 * noise, other)

    def loss(model, batch):
        distance = (model(batch["left"]) - model(batch["right"])).square().sum(1).add(1e-8).sqrt()
        pull = 1 - batch["labels"] if is_reversed else batch["labels"]
        return (pull * distance.square() + (1 - pull) * F.relu(2 - distance).square()).mean()

    assert codes(net(6, 4), [{"left": left, "right": right, "labels": same}], loss) == told


@pytest.mark.parametrize(("are_mixed", "told"), [(False, set()), (True, {"pairs-mismatched"})])
def test_views_of_other_samples_with_several_outputs(are_mixed: bool, told: set[str]) -> None:
    x, one, two = torch.randn(3, 192, 12, generator=torch.Generator().manual_seed(0))
    left, right = x + 0.5 * one, x + 0.5 * two
    right = right[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))] if are_mixed else right

    class Predicts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net(12, 6)
            self.head = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 6))

        def forward(self, a, b):
            a, b = self.body(a), self.body(b)
            return a, b, self.head(a), self.head(b)

    def loss(model, batch):
        a, b, of_a, of_b = (F.normalize(z, dim=1) for z in model(batch["left"], batch["right"]))
        return -((of_a * b.detach()).sum(1) + (of_b * a.detach()).sum(1)).mean()

    assert codes(Predicts(), [{"left": left, "right": right}], loss) == told
