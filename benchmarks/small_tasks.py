"""Development tasks of very small networks, whose forward and backward pass takes about a millisecond.

A smooth function of two coordinates, short convolutions along generated signals, and a linear recurrence, as
`benchmarks/near_tasks.py` runs them. They were written before a direction was tried on them, near the kinds of
network on which the default loses to its peers, and are none of the held-out tasks: other data, other networks.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from gramian.bench import learning_data as data
from gramian.bench.learning_networks import _chain
from gramian.bench.learning_tasks import LearningTask, _classified, _fitted
from gramian.training import Task

__all__ = ["SMALL"]


class Terrain(nn.Module):
    """Twenty-four fixed waves of two coordinates, and two hidden layers."""

    waves: Tensor

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.register_buffer("waves", 5 * torch.randn(2, 24))
        self.layers = nn.Sequential(*_chain([50, width, width, 1], nn.GELU))

    def forward(self, x: Tensor) -> Tensor:
        phases = x @ self.waves
        return self.layers(torch.cat([x, phases.sin(), phases.cos()], 1))


def terrain(num: int = 6000, batch_size: int = 96) -> data.Pairs:
    """The height at random places: hills and valleys of several sizes, with noise in the training half."""
    generator = torch.Generator().manual_seed(0)
    centers, widths = torch.rand(40, 2, generator=generator), 0.04 + 0.2 * torch.rand(40, generator=generator) ** 2
    heights = torch.randn(40, generator=generator) * widths.sqrt()
    x = torch.rand(num + 1500, 2, generator=generator)
    y = ((-torch.cdist(x, centers).square() / (2 * widths**2)).exp() @ heights)[:, None]
    y = (y - y.mean()) / y.std()
    noisy = y + 0.05 * torch.randn(y.shape, generator=generator)
    return data.Pairs(2 * x[:num] - 1, noisy[:num], 2 * x[num:] - 1, y[num:], batch_size)


def beats(width: int = 12) -> nn.Sequential:
    """Three convolutions along 80 samples, halved twice, and the mean over what is left."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 80))]
    for inputs, outputs in ((1, width), (width, 2 * width), (2 * width, 2 * width)):
        layers += [nn.Conv1d(inputs, outputs, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2)]
    return nn.Sequential(*layers[:-1], nn.Flatten(), nn.Linear(40 * width, 6))


def _beats(seed: int) -> Task:
    """Which of six kinds of pulse a signal repeats: at a random place and distance, of random height, in noise."""
    generator = torch.Generator().manual_seed(0)
    total, num = 4000, 3000
    kind = torch.randint(6, (total,), generator=generator)
    drawn = torch.rand(4, total, 1, generator=generator)
    period, height = 20 + 12 * drawn[0], 0.7 + 0.6 * drawn[1]
    place = (torch.arange(80) + period * drawn[2]) % period
    bell = (-(((place - 6) / 2.5) ** 2)).exp()
    late = (-(((place - 12) / 2.5) ** 2)).exp()
    shapes = [bell, bell + 0.5 * late, bell - 0.5 * late, 0.5 * bell + late, bell * (place - 6), bell * bell]
    x = height * torch.stack(shapes)[kind, torch.arange(total)]
    x += 0.5 * (2 * math.pi * (drawn[3] + torch.arange(80) / 80)).sin()
    x += 0.3 * torch.randn(total, 80, generator=generator)
    pairs = data.Pairs(x[:num], kind[:num], x[num:], kind[num:], 48)
    return _classified("beats", beats, seed, pairs.batches, pairs.held_out())


class _Memory(nn.Module):
    """A linear recurrence h ← a h + B x with a decay for each of its channels, a gate, and a matrix back."""

    apart: Tensor
    past: Tensor

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.linspace(-0.5, 3.5, width))
        self.enter, self.gate, self.leave = (nn.Linear(width, width) for _ in range(3))
        steps = torch.arange(length)
        self.register_buffer("apart", (steps[:, None] - steps).clamp_min(0)[..., None].float())
        self.register_buffer("past", (steps[:, None] >= steps)[..., None])

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.where(self.past, nn.functional.logsigmoid(self.decay).mul(self.apart).exp(), 0.0)
        h = torch.einsum("tsw,bsw->btw", kernel, self.enter(x))
        return x + self.leave(h * nn.functional.silu(self.gate(x)))


class Tanks(nn.Module):
    """Two such layers along a series of three numbers a step, and what leaves the last."""

    def __init__(self, width: int = 32, length: int = 24) -> None:
        super().__init__()
        self.enter = nn.Linear(3, width)
        self.layers = nn.Sequential(*(_Memory(width, length) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.enter(x.unflatten(-1, (-1, 3)))))[:, -1])


def tanks(num: int = 3000, batch_size: int = 32, length: int = 24) -> data.Pairs:
    """Two tanks that fill at rates which rain and a valve set, and empty by the root of their level, from either."""
    generator = torch.Generator().manual_seed(0)
    total = num + 1000
    given = torch.rand(total, length, 3, generator=generator)
    given[..., 1] = (given[..., 1] > 0.7).float() * given[..., 1]
    upper, lower = torch.ones(2, total)
    for rain, burst, valve in (now.unbind(1) for now in given.unbind(1)):
        flow = (0.5 * valve * upper.sqrt()).minimum(upper)
        upper = upper + 0.3 * rain + 0.6 * burst - flow
        lower = (lower + flow - 0.25 * lower.sqrt()).clamp_min(0)
    y = torch.stack([upper, lower], 1)
    y = (y - y.mean(0)) / y.std(0)
    x = (2 * given - 1 + 0.05 * torch.randn(given.shape, generator=generator)).flatten(1)
    return data.Pairs(x[:num], y[:num], x[num:], y[num:], batch_size)


SMALL: dict[str, LearningTask] = {
    "terrain": LearningTask(partial(_fitted, "terrain", Terrain, terrain), "unexplained", 500, "development"),
    "beats": LearningTask(_beats, "loss", 300, "development"),
    "tanks": LearningTask(partial(_fitted, "tanks", Tanks, tanks), "unexplained", 300, "development"),
}
