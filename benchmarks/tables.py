"""`Muon` where nobody tunes: perceptrons on tables, at the usual rate, beside AdamW at 1e-3.

    OMP_NUM_THREADS=1 python benchmarks/tables.py development|held-out|fresh FILE [SEED …]

Each case is a table, a network, a size of batches, a number of steps and a schedule; its number is the mean over three
seeds of the held-out squared error, as a share of the variance, or of the held-out cross-entropy. Columns are
standardized by the training part. Beside the two defaults run `Muon` without fading, and the rate that `gm.suggest_lr`
finds.

The held-out cases were written before one of the development cases had been run, from other data and makers. They
showed what a few rows that are fitted do to `Muon`; the fresh ones were written when that had been repaired, and run
once.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor, nn

import gramian as gm
from gramian.errors import GramianError, GramianWarning

SEEDS = (0, 1, 2)
NORMS = {"": None, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
Columns = tuple[np.ndarray, np.ndarray]


def teacher() -> Columns:
    """Forty columns; a smooth function of some of them and of their products, with a little noise."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((5000, 40))
    y = np.tanh(x @ draw.standard_normal((40, 6)) / 4) @ draw.standard_normal(6)
    return x, y + 0.5 * x[:, 0] * x[:, 1] + np.maximum(x[:, 2], 0) + 0.05 * draw.standard_normal(len(x))


def steps() -> Columns:
    """Twelve columns; a sum of forty trees of depth three, with noise."""
    draw = np.random.default_rng(1)
    x, y = draw.standard_normal((4000, 12)), 0.3 * draw.standard_normal(4000)
    for _ in range(40):
        bits = (x[:, draw.integers(12, size=3)] > draw.normal(0, 0.7, 3)) @ np.array([1, 2, 4])
        y += draw.normal(0, 0.4, 8)[bits]
    return x, y


def claims() -> Columns:
    """Six numbers and three columns of categories, of which some interact; the logarithm of a skewed amount."""
    draw = np.random.default_rng(2)
    numbers = draw.gamma(2.0, 1.0, (4000, 6))
    kinds = draw.integers(5, size=(4000, 3))
    effects = draw.normal(0, 0.5, (3, 5))
    y = 0.4 * np.log(numbers[:, 0]) + 0.3 * (numbers[:, 1] > 2) * effects[1][kinds[:, 1]] + effects[0][kinds[:, 0]]
    y += 0.2 * numbers[:, 2] * (kinds[:, 2] == 1) - 0.1 * np.sqrt(numbers[:, 3]) + 0.2 * draw.standard_normal(4000)
    return np.hstack([numbers, *(np.eye(5)[kinds[:, k]] for k in range(3))]), y


def parity() -> Columns:
    """Twelve signs; whether the product of three is positive, with one label in twenty turned."""
    draw = np.random.default_rng(3)
    x = np.sign(draw.standard_normal((3000, 12)))
    return x, ((x[:, :3].prod(1) > 0) ^ (draw.random(3000) < 0.05)).astype(int)


def low_rank() -> Columns:
    """Thirty columns near four directions; three smooth targets of these."""
    x = datasets.make_low_rank_matrix(3000, 30, effective_rank=4, random_state=0)
    draw = np.random.default_rng(4)
    z = x / x.std(0)
    return x, np.sin(z @ draw.standard_normal((30, 3)) / 3) + 0.05 * draw.standard_normal((3000, 3))


def crossed() -> Columns:
    """Sixteen clusters in six dimensions, in four classes of four that lie apart."""
    x, place = datasets.make_blobs(3000, 6, centers=16, cluster_std=2.0, random_state=0)
    return x, place % 4


def ripples() -> Columns:
    """Four columns; a wave of their distance from the origin and a product, with noise."""
    draw = np.random.default_rng(5)
    x = draw.uniform(-1, 1, (2500, 4))
    return x, np.sin(5 * np.linalg.norm(x, axis=1)) + x[:, 0] * x[:, 3] + 0.05 * draw.standard_normal(2500)


TABLES: dict[str, Callable[[], Columns]] = {
    "teacher": teacher,
    "steps": steps,
    "friedman1": lambda: datasets.make_friedman1(2500, noise=0.5, random_state=0),
    "friedman3": lambda: datasets.make_friedman3(2500, noise=0.05, random_state=0),
    "diabetes": lambda: datasets.load_diabetes(return_X_y=True),
    "breast cancer": lambda: datasets.load_breast_cancer(return_X_y=True),
    "classes": lambda: datasets.make_classification(
        4000, 20, n_informative=10, n_classes=4, n_clusters_per_class=3, flip_y=0.02, random_state=0
    ),
    "hastie": lambda: (lambda x, y: (x, (y > 0).astype(int)))(*datasets.make_hastie_10_2(5000, random_state=0)),
    "moons": lambda: datasets.make_moons(1500, noise=0.2, random_state=0),
    "digits": lambda: datasets.load_digits(return_X_y=True),
    "friedman2": lambda: datasets.make_friedman2(2500, noise=20.0, random_state=0),
    "wine": lambda: datasets.load_wine(return_X_y=True),
    "iris": lambda: datasets.load_iris(return_X_y=True),
    "quantiles": lambda: datasets.make_gaussian_quantiles(n_samples=4000, n_features=10, n_classes=5, random_state=0),
    "swiss roll": lambda: datasets.make_swiss_roll(3000, noise=0.1, random_state=0),
    "s curve": lambda: datasets.make_s_curve(3000, noise=0.05, random_state=0),
    "sparse": lambda: datasets.make_sparse_uncorrelated(2000, 10, random_state=0),
    "circles": lambda: datasets.make_circles(1500, noise=0.1, factor=0.6, random_state=0),
    "claims": claims,
    "parity": parity,
    "low rank": low_rank,
    "crossed": crossed,
    "ripples": ripples,
    "few blobs": lambda: datasets.make_blobs(150, 5, centers=4, cluster_std=3.0, random_state=7),
    "few classes": lambda: datasets.make_classification(250, 12, n_informative=6, random_state=9),
    "few lines": lambda: datasets.make_regression(400, 8, noise=10.0, random_state=5),
    "few quantiles": lambda: datasets.make_gaussian_quantiles(
        n_samples=300, n_features=5, n_classes=3, random_state=11
    ),
}


@dataclass(frozen=True)
class Case:
    """A table, and how a perceptron is trained on it."""

    table: str
    width: int
    depth: int
    batch: int
    steps: int
    schedule: str
    norm: str = ""
    dropout: float = 0.0

    def __str__(self) -> str:
        inside = "".join([f", {self.norm} norm" if self.norm else "", f", dropout {self.dropout}" * (self.dropout > 0)])
        return f"{self.table}, {self.depth} × {self.width}{inside}; {self.steps} of {self.batch}, {self.schedule}"


CASES: dict[str, list[Case]] = {
    "development": [
        Case("teacher", 128, 3, 64, 1500, "linear"),
        Case("teacher", 64, 4, 32, 1200, "constant", "layer"),
        Case("friedman1", 64, 2, 32, 1500, "constant"),
        Case("friedman1", 128, 3, 16, 1500, "linear"),
        Case("friedman3", 32, 2, 16, 1500, "constant"),
        Case("steps", 256, 2, 64, 600, "constant", dropout=0.1),
        Case("diabetes", 32, 2, 16, 600, "constant", dropout=0.1),
        Case("breast cancer", 64, 2, 32, 400, "linear", "batch"),
        Case("classes", 128, 4, 64, 600, "cosine", "batch", 0.2),
        Case("hastie", 64, 3, 128, 800, "constant"),
        Case("moons", 32, 3, 32, 800, "linear"),
        Case("digits", 128, 2, 32, 700, "cosine"),
    ],
    "held-out": [
        Case("friedman2", 64, 3, 32, 1500, "constant"),
        Case("wine", 64, 2, 16, 400, "linear", dropout=0.1),
        Case("iris", 32, 2, 16, 500, "constant"),
        Case("quantiles", 128, 2, 64, 1000, "cosine"),
        Case("swiss roll", 128, 3, 64, 1000, "linear"),
        Case("s curve", 48, 3, 128, 1000, "constant"),
        Case("sparse", 32, 2, 32, 800, "constant"),
        Case("circles", 32, 4, 16, 800, "constant", "layer"),
        Case("claims", 128, 3, 128, 800, "cosine", dropout=0.1),
        Case("parity", 128, 2, 32, 800, "constant"),
        Case("low rank", 256, 2, 64, 500, "cosine", "batch"),
        Case("crossed", 64, 3, 32, 800, "linear", "batch", 0.2),
    ],
    "fresh": [
        Case("ripples", 96, 2, 32, 800, "constant"),
        Case("few blobs", 32, 2, 16, 400, "constant"),
        Case("few classes", 64, 2, 16, 500, "linear"),
        Case("few lines", 48, 2, 16, 600, "constant"),
        Case("few quantiles", 64, 3, 32, 500, "cosine"),
    ],
}

Split = tuple[Tensor, Tensor, Tensor, Tensor]


@cache
def split(table: str) -> Split:
    """Training and held-out columns and targets: three quarters and the rest."""
    x, y = TABLES[table]()
    order = np.random.default_rng(0).permutation(len(x))
    x, y = torch.tensor(x[order], dtype=torch.float32), torch.tensor(y[order])
    num = 3 * len(x) // 4
    mean, size = x[:num].mean(0), x[:num].std(0).clamp_min(1e-6)
    x = (x - mean) / size
    if y.is_floating_point():
        y = y.float().view(len(y), -1)
        y = (y - y[:num].mean(0)) / y[:num].std(0)
    return x[:num], y[:num], x[num:], y[num:]


def network(case: Case, seed: int) -> nn.Sequential:
    """A perceptron with `depth` hidden layers; the weights of this seed."""
    x, y, _, _ = split(case.table)
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    widths = [x.shape[1], *[case.width] * case.depth]
    for before, after in pairwise(widths):
        norm = NORMS[case.norm]
        layers += [nn.Linear(before, after), *([norm(after)] if norm else []), nn.ReLU()]
        layers += [nn.Dropout(case.dropout)] if case.dropout else []
    return nn.Sequential(*layers, nn.Linear(case.width, y.shape[1] if y.is_floating_point() else int(y.max()) + 1))


def batches(case: Case, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of shuffled epochs, without end."""
    x, y, _, _ = split(case.table)
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(case.batch):
            if len(rows) == case.batch:
                yield x[rows], y[rows]


def loss_of(output: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of standardized targets, or cross-entropy."""
    return F.mse_loss(output, y) if y.is_floating_point() else F.cross_entropy(output, y)


def scheduler(case: Case, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """torch's, without a warm-up, as a newcomer takes it."""
    if case.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, case.steps)
    end = 0.0 if case.schedule == "linear" else 1.0
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, end, case.steps)


Make = Callable[[nn.Module, Case, int], torch.optim.Optimizer]


def run(case: Case, make: Make, seed: int) -> float:
    """The held-out number after a run."""
    model = network(case, seed)
    optimizer = make(model, case, seed)
    schedule, stream = scheduler(case, optimizer), batches(case, seed)
    for _ in range(case.steps):
        x, y = next(stream)
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    _, _, x, y = split(case.table)
    with torch.no_grad():
        found = float(loss_of(model(x), y))
    return found if math.isfinite(found) else math.inf


def suggested(model: nn.Module, case: Case, seed: int) -> torch.optim.Optimizer:
    """`Muon` at the rate that `gm.suggest_lr` finds, or its usual one where that refuses."""
    regression = split(case.table)[1].is_floating_point()
    objective = gm.Objective.regression() if regression else gm.Objective.classification()
    stream = batches(case, seed + 1000)
    try:
        lr = gm.suggest_lr(model, [next(stream) for _ in range(12)], objective).lr
    except GramianError:
        lr = None
    return gm.optim.Muon(model, lr=lr)


def steady(model: nn.Module, case: Case, seed: int) -> torch.optim.Optimizer:
    """`Muon` at its usual rate, which does not fade."""
    optimizer = gm.optim.Muon(model)
    for group in optimizer.param_groups:
        group["fades"] = False
    return optimizer


MAKERS: dict[str, Make] = {
    "AdamW 1e-3": lambda model, case, seed: torch.optim.AdamW(model.parameters(), 1e-3),
    "Muon": lambda model, case, seed: gm.optim.Muon(model),
    "Muon, no fading": steady,
    "Muon, suggest_lr": suggested,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", GramianWarning)
    half, path, seeds = sys.argv[1], Path(sys.argv[2]), [int(word) for word in sys.argv[3:]] or SEEDS
    found = json.loads(path.read_text()) if path.exists() else {}
    for name, maker in MAKERS.items():
        for one in CASES[half]:
            numbers = found.setdefault(str(one), {}).setdefault(name, {})
            numbers |= {str(seed): run(one, maker, seed) for seed in seeds if str(seed) not in numbers}
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(name, one, f"{fmean(numbers.values()):.4g}", sep="; ", flush=True)
