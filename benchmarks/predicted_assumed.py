"""How far `plan.predicted` is from the rise on new data where nothing is said of the calibration's data.

`python benchmarks/predicted_assumed.py`: five models that were fixed before they were scored, each calibrated on all of
its training data, on half of them, and on new data. Each line has the rise with half its 90 % interval, and for
`gm.compress` with nothing said, and with the calibration's number of samples as `trained_on`, the number, its error as
a share of the rise, and the interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import gramian as gm
from gramian.bench.learning_data import text

Data = tuple[Tensor, Tensor]
LENGTH, TRAINING_PART = 32, 0.6
KEPT = (0.7, 0.5, 0.35)


class Case(NamedTuple):
    """A model, and its data: those that it is trained on, new ones to calibrate on, and new ones that tell the rise."""

    make: Callable[[], nn.Module]
    objective: Any
    data: tuple[Data, Data, Data]
    epochs: int
    rate: float
    batch: int


def windows(num: int, seed: int) -> Data:
    """Windows of Shakespeare, with the next characters; training data are of another part than the others."""
    characters = torch.cat(text()[1:])
    end = int(TRAINING_PART * len(characters))
    low, high = (0, end) if seed in (1, 4) else (end, len(characters))
    g = torch.Generator().manual_seed(seed)
    places = torch.randint(low, high - LENGTH - 1, (num,), generator=g)
    rows = characters[places[:, None] + torch.arange(LENGTH + 1)]
    return rows[:, :-1], rows[:, 1:]


class Recurrent(nn.Module):
    """A GRU that predicts characters."""

    def __init__(self) -> None:
        super().__init__()
        num = int(torch.cat(text()[1:]).max()) + 1
        self.table, self.core, self.head = nn.Embedding(num, 24), nn.GRU(24, 64, batch_first=True), nn.Linear(64, num)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(self.table(x))[0])


class Causal(nn.Module):
    """Causal convolutions with skips that predict characters."""

    def __init__(self) -> None:
        super().__init__()
        num = int(torch.cat(text()[1:]).max()) + 1
        self.table, self.layers = nn.Embedding(num, 32), nn.ModuleList(nn.Conv1d(32, 32, 4) for _ in range(3))
        self.up, self.head = nn.Linear(32, 96), nn.Linear(96, num)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x).mT
        for layer in self.layers:
            h = h + functional.gelu(layer(functional.pad(h, (3, 0))))
        return self.head(functional.gelu(self.up(h.mT)))


class Residual(nn.Module):
    """A perceptron with skips and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(10, 48)
        block = lambda: nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 48))  # noqa: E731
        self.blocks, self.head = nn.ModuleList(block() for _ in range(2)), nn.Linear(48, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


def rings(num: int, seed: int) -> Data:
    """Classes by the distance from the origin, of which 15 % are drawn anew."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 10, generator=g)
    y = ((x[:, :3].norm(dim=1) * 2 + x[:, 3].sin()).long()).clamp(0, 5)
    wrong = torch.rand(num, generator=g) < 0.15
    return x, torch.where(wrong, torch.randint(6, (num,), generator=g), y)


class Attending(nn.Module):
    """An encoder layer over a set, whose mean gives a number."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 32)
        self.layer, self.head = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.enter(x)).mean(1))


def sets(num: int, seed: int) -> Data:
    """Sets of seven points, and a noisy number of each."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 7, 4, generator=g)
    y = (x[:, :, 0] * x[:, :, 1]).sum(1).tanh() + x[:, :, 2].amax(1) * 0.5 + 0.4 * torch.randn(num, generator=g)
    return x, y[:, None]


def convolutional() -> nn.Module:
    """Two convolutions and two matrices, for digits of 8 × 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 48), nn.ReLU(), nn.Linear(48, 10),
    )  # fmt: skip


def digits() -> tuple[Data, Data, Data]:
    """scikit-learn's digits, in an order drawn once."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    order = torch.randperm(len(found.data), generator=torch.Generator().manual_seed(3))
    x = torch.tensor(found.data, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    y = torch.tensor(found.target)[order]
    return (x[:600], y[:600]), (x[600:1000], y[600:1000]), (x[1000:], y[1000:])


def cases() -> dict[str, Case]:
    """The five."""
    one, regression, tokens = gm.Objective.classification(), gm.Objective.regression(), gm.Objective.next_token()
    return {
        "GRU, 10 times": Case(Recurrent, tokens, (windows(640, 1), windows(640, 2), windows(4000, 3)), 10, 4e-3, 16),
        "causal convolutions, twice": Case(
            Causal, tokens, (windows(2400, 4), windows(2400, 5), windows(4000, 6)), 2, 3e-3, 16
        ),
        "digits, 8 times": Case(convolutional, one, digits(), 8, 2e-3, 25),
        "residual, 15 times": Case(Residual, one, (rings(1500, 1), rings(1500, 2), rings(30000, 3)), 15, 2e-3, 50),
        "sets, 25 times": Case(Attending, regression, (sets(1000, 1), sets(1000, 2), sets(20000, 3)), 25, 2e-3, 50),
    }


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean loss of each sample."""
    if y.dtype.is_floating_point:
        return functional.mse_loss(model(x), y, reduction="none").flatten(1).mean(1)
    each = functional.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="none")
    return each.view(len(y), -1).mean(1)


@torch.no_grad()
def evaluated(model: nn.Module, data: Data) -> Tensor:
    """The loss of each sample, in parts."""
    return torch.cat([losses(model, x, y) for x, y in zip(data[0].split(500), data[1].split(500), strict=True)])


def trained(case: Case) -> nn.Module:
    """The model after its epochs of AdamW, whose rate falls to zero."""
    torch.manual_seed(11)
    model, (x, y) = case.make(), case.data[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=case.rate)
    g, steps, step = torch.Generator().manual_seed(5), case.epochs * math.ceil(len(x) / case.batch), 0
    for _ in range(case.epochs):
        for rows in torch.randperm(len(x), generator=g).split(case.batch):
            optimizer.param_groups[0]["lr"] = case.rate * (1 - step / steps)
            step += 1
            optimizer.zero_grad()
            losses(model, x[rows], y[rows]).mean().backward()
            optimizer.step()
    return model.eval()


def main() -> None:
    """Print a line for each model, calibration and share."""
    for name, case in cases().items():
        model, (known, new, fresh) = trained(case), case.data
        before = evaluated(model, fresh)
        print(f"## {name}: loss {float(evaluated(model, known).mean()):.3f}, on new data {float(before.mean()):.3f}")
        half = (known[0][: len(known[0]) // 2], known[1][: len(known[1]) // 2])
        for what, data in (("all", known), ("half", half), ("new", new)):
            batches = list(zip(data[0].split(case.batch), data[1].split(case.batch), strict=True))
            plans = [gm.compress(model, batches, case.objective, trained_on=num) for num in (None, len(data[0]))]
            for keep in KEPT:
                parts = [plan.at(keep=keep, of="factorable") for plan in plans]
                rises = evaluated(parts[0].apply().eval(), fresh) - before
                rise, error = float(rises.mean()), 1.645 * float(rises.std()) / len(rises) ** 0.5
                told = [
                    f"{p.rise:.5f} {p.rise / rise - 1:+.0%} ({p.low:.5f} to {p.high:.5f})"
                    for p in (part.predicted for part in parts)
                ]
                print(f"{keep} {what} {rise:.5f} ±{error:.5f} | {' | '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
