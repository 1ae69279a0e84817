"""What `gm.suggest_lr` costs and finds, on networks and data that were written after its rule was fixed.

    OMP_NUM_THREADS=1 python benchmarks/suggested_rates.py suggest FILE    # rates and their cost, by the installed code
    OMP_NUM_THREADS=1 python benchmarks/suggested_rates.py score FILE …    # runs at those rates, beside a grid

Every batch is drawn anew. A run warms up over a twentieth of its steps and decays linearly to zero; its number is the
loss of 1,024 samples that no step has seen. The grid has quarter-decades, from the usual rate outward until the best
has two worse ones on either side. The cost is CPU time over that of a training step, the median of twenty.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.bench.learning_tasks import LearningTask, _seeded
from gramian.bench.race import _Training, clock, held_out
from gramian.errors import GramianError
from gramian.optim import OPTIMIZERS
from gramian.training import Task

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
CLASSES, NUMBERS = gm.Objective.classification(), gm.Objective.regression()


def spirals(num: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Three arms in a plane."""
    arm, t = torch.randint(3, (num,), generator=g), torch.rand(num, generator=g)
    angle = 2 * math.pi * (arm / 3 + 1.2 * t)
    x = (0.2 + t)[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return x + 0.05 * torch.randn(num, 2, generator=g), arm


def sorting(num: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Twelve letters, to be put in order."""
    x = torch.randint(16, (num, 12), generator=g)
    return x, x.sort(1).values


def chirps(num: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Frequency and drift of a tone of 64 samples in noise."""
    y, t = torch.rand(num, 2, generator=g), torch.linspace(0, 1, 64)
    phase = 2 * math.pi * ((2 + 8 * y[:, :1]) * t + 4 * (y[:, 1:] - 0.5) * t**2 + torch.rand(num, 1, generator=g))
    return phase.sin() + 0.3 * torch.randn(num, 64, generator=g), 3 * (y - 0.5)


def graphs(num: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random graphs of ten nodes: how many triangles each node is in."""
    density = 0.2 + 0.5 * torch.rand(num, 1, 1, generator=g)
    a = (torch.rand(num, 10, 10, generator=g) < density).float().triu(1)
    a = a + a.mT
    return a, (a @ a * a).sum(-1) / 20 - 1


def adding(num: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """The sum of two marked numbers of a sequence of sixteen."""
    x, marks = torch.rand(num, 16, generator=g), torch.zeros(num, 16)
    marks.scatter_(1, torch.rand(num, 16, generator=g).topk(2).indices, 1.0)
    return torch.stack([x, marks], -1), (x * marks).sum(1, keepdim=True) - 1


def polynomial(num: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Products of ten normal numbers, with noise."""
    x = torch.randn(num, 10, generator=g)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2] * x[:, 3].tanh(), x[:, 4:7].prod(1), x[:, 7:].norm(dim=1) - 1.6], 1)
    return x, y + 0.1 * torch.randn(num, 4, generator=g)


def sets(num: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Largest entry, spread and nearest distance of nine points in space."""
    x = torch.randn(num, 9, 3, generator=g)
    near = (torch.cdist(x, x) + 9 * torch.eye(9)).amin((1, 2))
    return x, torch.stack([x.amax((1, 2)) - 2, 2 * x.std((1, 2)) - 2, 2 * near - 1], 1)


def shapes(num: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Crosses, boxes and disks of 16×16 pixels, drowned in noise; the picture without it."""
    at, size = 4 + 8 * torch.rand(num, 2, 1, 1, generator=g), 2 + 3 * torch.rand(num, 1, 1, generator=g)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    dx, dy = (x - at[:, 0]).abs(), (y - at[:, 1]).abs()
    kind = torch.randint(3, (num, 1, 1), generator=g)
    forms = [torch.minimum(dx, dy) < 1, torch.maximum(dx, dy) < size, dx**2 + dy**2 < size**2]
    clean = torch.where(kind == 0, forms[0], torch.where(kind == 1, forms[1], forms[2])).float()[:, None]
    return clean + 0.7 * torch.randn(num, 1, 16, 16, generator=g), clean


def logic(num: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four columns of categories; the class follows from pairs of them."""
    x = torch.randint(12, (num, 4), generator=g)
    return x, (x[:, 0] * x[:, 1] + (x[:, 2] > x[:, 3]).long() * 3 + x[:, 3] // 4) % 5


def texture(num: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gratings of six orientations in three colors, 12×12 pixels, of random contrast and phase."""
    kind = torch.randint(6, (num,), generator=g)
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    angle = (math.pi * kind / 6)[:, None, None]
    phase = 2 * math.pi * torch.rand(num, 1, 1, generator=g)
    wave = (1.3 * (x * angle.cos() + y * angle.sin()) + phase).sin()
    color = torch.randn(num, 3, 1, 1, generator=g)
    return color * wave[:, None] + torch.randn(num, 3, 12, 12, generator=g), kind


class Sorter(nn.Module):
    """A transformer of torch's layers, norms first."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(16, 48), nn.Embedding(12, 48)
        layer = nn.TransformerEncoderLayer(48, 4, 96, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.letters(x) + self.places.weight))


class Messages(nn.Module):
    """Three rounds of messages between nodes, by the mean and by the sum."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(1, width), nn.Linear(width, 1)
        self.rounds = nn.ModuleList(nn.Linear(3 * width, width) for _ in range(3))

    def forward(self, a: Tensor) -> Tensor:
        degree = a.sum(-1, keepdim=True)
        h = self.enter(degree / 5)
        for layer in self.rounds:
            m = a @ h
            h = h + F.silu(layer(torch.cat([h, m / 5, m / degree.clamp_min(1)], -1)))
        return self.leave(h).squeeze(-1)


class Adder(nn.Module):
    """An LSTM and a head on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 40, batch_first=True), nn.Linear(40, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Skip(nn.Module):
    """x + W φ(V norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Points(nn.Module):
    """Attention among points, then a learned query that asks them all."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.enter, self.query = nn.Linear(3, width), nn.Parameter(torch.randn(1, 1, width))
        self.among, self.asked = (nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(2))
        self.mlp, self.head = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, width)), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        h = h + self.among(h, h, h)[0]
        h = h + self.mlp(h)
        return self.head(self.asked(self.query.expand(len(x), -1, -1), h, h)[0][:, 0])


class Categories(nn.Module):
    """A table for each column, and two gated layers."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(12, 10) for _ in range(4))
        self.gates = nn.ModuleList(nn.Linear(n, 96) for n in (40, 48))
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([table(x[:, k]) for k, table in enumerate(self.tables)], 1)
        for layer in self.gates:
            h = F.glu(layer(h))
        return self.head(h)


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Linear(2, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 3)
    )


def listener() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 64)), nn.Conv1d(1, 16, 9, 2, 4), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv1d(16, 32, 5, 2, 2),
        nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv1d(32, 32, 5, 2, 2), nn.SiLU(), nn.Flatten(), nn.Linear(256, 2),
    )  # fmt: skip


def denoiser() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(24, 12, 2, 2), nn.ReLU(), nn.ConvTranspose2d(12, 1, 2, 2),
    )  # fmt: skip


def residual() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 32), *(Skip(32) for _ in range(6)), nn.LayerNorm(32), nn.Linear(32, 4))


def seer() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 16, 1), (16, 16, 2), (16, 32, 1), (32, 32, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 6))


def _task(make: Callable[[], nn.Module], draw: Draw, objective: gm.Objective, size: int, seed: int) -> Task:
    held = draw(1024, torch.Generator().manual_seed(12345))

    def batches(epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(100):
            yield draw(size, generator)

    def evaluate(model: nn.Module) -> dict[str, float]:
        total, units = objective.loss(model, held)
        return {"loss": float(total / units)}

    return Task(partial(_seeded, make, seed), objective, batches, evaluate, draw.__name__)


def _case(make: Callable[[], nn.Module], draw: Draw, objective: gm.Objective, size: int, steps: int) -> LearningTask:
    return LearningTask(partial(_task, make, draw, objective, size), "loss", steps, "held out")


CASES: dict[str, LearningTask] = {
    "spirals, tanh": _case(plain, spirals, CLASSES, 64, 300),
    "sorting, transformer": _case(Sorter, sorting, CLASSES, 32, 200),
    "chirps, convolutions": _case(listener, chirps, NUMBERS, 64, 200),
    "graphs, messages": _case(Messages, graphs, NUMBERS, 32, 200),
    "adding, LSTM": _case(Adder, adding, NUMBERS, 64, 250),
    "polynomial, residual": _case(residual, polynomial, NUMBERS, 96, 200),
    "sets, attention": _case(Points, sets, NUMBERS, 64, 200),
    "shapes, denoiser": _case(denoiser, shapes, NUMBERS, 32, 150),
    "logic, gates": _case(Categories, logic, CLASSES, 128, 300),
    "texture, batch norms": _case(seer, texture, CLASSES, 48, 120),
}
FIVE = ("sorting, transformer", "chirps, convolutions", "adding, LSTM", "polynomial, residual", "texture, batch norms")
ROWS = [(name, "muon") for name in CASES] + [(name, o) for o in ("adamw", "sgd") for name in FIVE]
SEED = 0


def _step_seconds(learning: LearningTask, optimizer: str) -> float:
    training = _Training(learning, OPTIMIZERS[optimizer].make, OPTIMIZERS[optimizer].lr, SEED)
    seconds = []
    for _ in range(24):
        start = clock()
        training.differentiate()
        training.step(1e-3)
        seconds.append(clock() - start)
    return statistics.median(seconds[4:])


def suggest(path: Path) -> None:
    """Writes for each row the suggested rate, `None` where there is none, and what it cost in steps."""
    found: dict[str, Any] = {}
    for name, optimizer in ROWS:
        learning = CASES[name]
        task = learning.make(SEED)
        batches = list(islice(task.train_batches(0, torch.Generator().manual_seed(SEED)), 17))
        step = _step_seconds(learning, optimizer)
        model, start = task.model().train(), clock()
        try:
            rate = gm.suggest_lr(model, batches, task.objective, optimizer=optimizer).lr
        except GramianError as error:
            print(name, optimizer, error, flush=True)
            rate = None
        found[f"{name} | {optimizer}"] = {"rate": rate, "steps": round((clock() - start) / step, 1)}
        print(name, optimizer, found[f"{name} | {optimizer}"], flush=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def _grid(score: Callable[[int], float], first: int) -> dict[int, float]:
    scores = {first: score(first)}
    while len(scores) < 24:
        best = min(scores, key=lambda k: (scores[k], k))
        outside = [k for k in (best - 1, best + 1, best - 2, best + 2) if k not in scores]
        if not outside:
            break
        scores[outside[0]] = score(outside[0])
    return dict(sorted(scores.items()))


def score(paths: list[Path]) -> None:
    """Prints for each row the grid, and what the usual rate and those of the files come to over the grid's best."""
    files = {path.stem: json.loads(path.read_text()) for path in paths}
    ratios: dict[tuple[str, str], list[float]] = {}
    for name, optimizer in ROWS:
        learning, make = CASES[name], OPTIMIZERS[optimizer].make

        def loss(rate: float, learning: LearningTask = learning, make: Any = make) -> float:
            return held_out(learning, make, rate, SEED, learning.steps)

        made = make(learning.make(SEED).model(), None)
        usual = made.defaults["lr"] if optimizer == "muon" else OPTIMIZERS[optimizer].lr
        scores = _grid(lambda k, loss=loss: loss(10 ** (k / 4)), round(4 * math.log10(usual)))
        best = min(scores, key=lambda k: scores[k])
        told = " ".join(f"{10 ** (k / 4):.2g}:{value:.3g}" for k, value in scores.items())
        print(f"{name} | {optimizer} | best {10 ** (best / 4):.2g} | {told}", flush=True)
        rates = {"usual": usual} | {stem: file[f"{name} | {optimizer}"]["rate"] for stem, file in files.items()}
        for who, rate in rates.items():
            value = loss(usual if rate is None else rate)
            ratio = value / scores[best]
            ratios.setdefault((optimizer, who), []).append(ratio)
            cost = "" if who == "usual" else f", {files[who][f'{name} | {optimizer}']['steps']} steps"
            at = "none, so the usual one" if rate is None else f"{rate:.3g}"
            print(f"    {who}: {at}, {value:.3g}, {ratio:.2f} of the best{cost}", flush=True)
    for (optimizer, who), found in ratios.items():
        mean = statistics.geometric_mean(min(ratio, 100.0) for ratio in found)
        print(f"{optimizer}, {who}: geometric mean {mean:.3f}, worst {max(found):.2f}")
        print(f"    at most 1.25 in {sum(ratio <= 1.25 for ratio in found)} of {len(found)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    match sys.argv[1:]:
        case ["suggest", path]:
            suggest(Path(path))
        case ["score", *paths] if paths:
            score([Path(path) for path in paths])
        case _:
            sys.exit("suggested_rates.py: wanted suggest FILE, or score FILE …")
