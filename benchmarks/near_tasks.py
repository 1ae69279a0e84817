"""Development tasks beside those of `gramian bench optim`: small networks, convolutions, raw inputs, a recurrence.

Those of `benchmarks/small_tasks.py`, whose networks are smaller still, run here too.

    OMP_NUM_THREADS=1 python benchmarks/near_tasks.py [TASK …]

Equal steps: the geometric mean over three seeds of the held-out number, at each of a grid of half-decades, widened
until the best lies between two worse ones, and at the quarter-decades beside it, without which a change that only
moves the best rate looks like a gain; Muon and BalancedMuon. Then what a whole step of each costs, in turns, and
equal seconds: BalancedMuon with its steps cut by that, at its best rate.

They were written before a direction was tried on them, near the families on which the default loses, and are none of
the held-out tasks: other data, other networks.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from statistics import geometric_mean

import torch
from torch import Tensor, nn

from gramian.bench import learning_data as data
from gramian.bench.learning_networks import _Block, _chain
from gramian.bench.learning_tasks import LEARNING, LearningTask, _fitted, classes
from gramian.bench.race import Make, costs, grid, held_out
from gramian.optim import BalancedMuon, Muon
from small_tasks import SMALL

__all__ = ["NEAR", "TASKS"]


class _Residual(nn.Module):
    """Two 3×3 convolutions with batch norms, beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.second, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.norm2(self.second(self.norm1(self.first(x)).relu()))).relu()


def residual(width: int = 24, depth: int = 2) -> nn.Sequential:
    """A residual network of 8×8 pixels, halved once."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _Residual(width),
        nn.MaxPool2d(2),
        *(_Residual(width) for _ in range(depth - 1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


class Grid(nn.Module):
    """A small vision transformer: 8×8 pixels in patches of 2×2."""

    def __init__(self, width: int = 40, depth: int = 2) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, width, 2, stride=2)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(_Block(width, 4, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x.unflatten(-1, (1, 8, 8))).flatten(2).mT + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


def spectrometer(width: int = 24) -> nn.Sequential:
    """Three convolutions along a spectrum of 96 channels, each halving it, without norms; four concentrations."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 96))]
    for inputs, outputs in ((1, width), (width, width), (width, 2 * width)):
        layers += [nn.Conv1d(inputs, outputs, 7, stride=2, padding=3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * width * 12, 4))


def spectra(num: int = 3000, batch_size: int = 64) -> data.Pairs:
    """Spectra of four substances of three lines each, drifting along the axis, on a sloping base, with noise."""
    generator = torch.Generator().manual_seed(0)
    total = num + 1000
    lines, widths = torch.rand(4, 3, generator=generator), 0.01 + 0.03 * torch.rand(4, 3, generator=generator)
    heights = 0.3 + torch.rand(4, 3, generator=generator)
    amounts = torch.rand(total, 4, generator=generator)
    drift = 0.02 * torch.randn(total, 1, 1, 1, generator=generator)
    axis = torch.linspace(0, 1, 96)
    shapes = heights[..., None] / (1 + ((axis - lines[..., None] - drift) / widths[..., None]) ** 2)
    x = (amounts[..., None] * shapes.sum(2)).sum(1)
    x += torch.randn(total, 1, generator=generator) * axis + torch.rand(total, 1, generator=generator)
    x += 0.03 * torch.randn(total, 96, generator=generator)
    y = 3 * (amounts - 0.5)
    return data.Pairs(x[:num], y[:num], x[num:], y[num:], batch_size)


def raw_units(num: int = 3000, batch_size: int = 64) -> data.Pairs:
    """Sixteen columns in units of their own, with offsets, correlated by fours; four smooth targets with noise."""
    generator = torch.Generator().manual_seed(0)
    total = num + 1000
    common = torch.randn(total, 4, generator=generator).repeat_interleave(4, 1)
    z = 0.7 * common + 0.7 * torch.randn(total, 16, generator=generator)
    units = torch.logspace(-1.5, 1, 16)[torch.randperm(16, generator=generator)]
    x = units * (z + torch.randn(16, generator=generator))
    hidden = torch.randn(16, 24, generator=generator) / 3
    y = (z @ hidden).sin() @ torch.randn(24, 4, generator=generator) / 24**0.5
    y += 0.1 * torch.randn(total, 4, generator=generator)
    return data.Pairs(x[:num], y[:num], x[num:], y[num:], batch_size)


def pendulum(num: int = 4000, batch_size: int = 128) -> data.Pairs:
    """The four accelerations and energies of a double pendulum, from its two angles and two velocities."""
    generator = torch.Generator().manual_seed(0)
    angles = math.pi * (2 * torch.rand(num + 1000, 2, generator=generator) - 1)
    speeds = torch.randn(num + 1000, 2, generator=generator)
    (a, b), (u, v) = angles.unbind(1), speeds.unbind(1)
    apart = a - b
    mass = 3 - (2 * apart).cos()
    first = -(3 * a.sin() + (a - 2 * b).sin() + 2 * apart.sin() * (v**2 + u**2 * apart.cos())) / mass
    second = 2 * apart.sin() * (2 * u**2 + 2 * a.cos() + v**2 * apart.cos()) / mass
    kinetic, potential = u**2 + 0.5 * v**2 + u * v * apart.cos(), -2 * a.cos() - b.cos()
    y = torch.stack([first, second, kinetic, potential], 1)
    x = torch.cat([angles, speeds], 1)
    y = (y - y.mean(0)) / y.std(0)
    return data.Pairs(x[:num], y[:num], x[num:], y[num:], batch_size)


def smooth(width: int = 64) -> nn.Sequential:
    """A plain network of four inputs and three hidden layers."""
    return nn.Sequential(*_chain([4, width, width, width, 4], nn.SiLU))


def table(width: int = 64) -> nn.Sequential:
    """A plain network of sixteen columns and three hidden layers."""
    return nn.Sequential(*_chain([16, width, width, width, 4], nn.ReLU))


class Forecast(nn.Module):
    """A GRU along a series of three numbers a step; the change over the next few steps."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, width, batch_first=True), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x.unflatten(-1, (-1, 3)))[0][:, -1])


def lorenz(num: int = 3000, batch_size: int = 64, length: int = 16, ahead: int = 6) -> data.Pairs:
    """Lorenz's equations by Runge–Kutta, with noise: windows of a long orbit, and where it is six steps later."""

    def slope(s: Tensor) -> Tensor:
        x, y, z = s.unbind()
        return torch.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])

    state, orbit, h = torch.tensor([1.0, 1.0, 20.0], dtype=torch.float64), [], 0.04
    for _ in range(num + 1000 + length + ahead + 100):
        k1 = slope(state)
        k2 = slope(state + h / 2 * k1)
        k3 = slope(state + h / 2 * k2)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(state + h * k3))
        orbit.append(state)
    series = torch.stack(orbit[100:]).float()
    series = (series - series.mean(0)) / series.std(0)
    noisy = series + 0.02 * torch.randn(series.shape, generator=torch.Generator().manual_seed(0))
    x = noisy.unfold(0, length, 1)[: num + 1000].mT.flatten(1)
    y = series[length + ahead - 1 :][: num + 1000]
    return data.Pairs(x[:num], y[:num], x[num:], y[num:], batch_size)


NEAR: dict[str, LearningTask] = {
    "residual": LearningTask(partial(classes, "residual", residual), "loss", 100, "development"),
    "grid": LearningTask(partial(classes, "grid", Grid), "loss", 120, "development"),
    "spectra": LearningTask(partial(_fitted, "spectra", spectrometer, spectra), "unexplained", 200, "development"),
    "raw units": LearningTask(partial(_fitted, "raw units", table, raw_units), "unexplained", 300, "development"),
    "pendulum": LearningTask(partial(_fitted, "pendulum", smooth, pendulum), "unexplained", 400, "development"),
    "lorenz": LearningTask(partial(_fitted, "lorenz", Forecast, lorenz), "unexplained", 120, "development"),
}

SHORT = {"mlp": 240, "autoencoder": 50, "characters": 60, "depthwise": 80, "lstm": 100, "ill-scaled": 320, "recall": 90}
"""Steps for the tasks of the bench's development half."""

TASKS = {name: replace(LEARNING[name], steps=steps) for name, steps in SHORT.items()} | NEAR | SMALL
SEEDS = (100, 0, 1)
QUARTER = 10**0.25
OURS: dict[str, Make] = {
    "Muon": lambda model, lr: Muon(model, lr=lr),
    "BalancedMuon": lambda model, lr: BalancedMuon(model, lr=lr),
}


def compare(learning: LearningTask) -> str:
    """The best numbers of both with their rates, the ratio, that of whole steps, and the one in equal seconds."""
    best: dict[str, tuple[float, float]] = {}

    def score(make: Make, rate: float, steps: int) -> float:
        return geometric_mean(held_out(learning, make, rate, seed, steps) for seed in SEEDS)

    for name, make in OURS.items():
        scores = grid(partial(score, make, steps=learning.steps), 0.1)
        middle = min(scores, key=lambda rate: scores[rate])
        scores |= {rate: score(make, rate, learning.steps) for rate in (middle / QUARTER, middle * QUARTER)}
        best[name] = min((number, rate) for rate, number in scores.items())
    old, new = costs(learning, {name: (make, 0.1) for name, make in OURS.items()}, SEEDS[0]).values()
    told = ", ".join(f"{name} {number:.4g} at {rate:.2g}" for name, (number, rate) in best.items())
    (muon, _), (balanced, rate) = best["Muon"], best["BalancedMuon"]
    cost = new.total / old.total
    cut = score(OURS["BalancedMuon"], rate, round(learning.steps / cost))
    return (
        f"{told}: {balanced / muon:.2f}; whole step {cost:.2f}, its own {new.own / old.own:.2f}; "
        f"in equal seconds {cut / muon:.2f}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for task in sys.argv[1:] or TASKS:
        print(task, compare(TASKS[task]), sep=": ", flush=True)
