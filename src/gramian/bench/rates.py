"""`gramian bench rates`: suggested rates against tuned grids, and whether one rate carries across widths and depths.

All runs are short, of a fixed number of steps, on handwritten digits that are shifted by up to one pixel, anew for
every batch, with the warm-up and the decay of `gm.train`. The score is the mean training loss of the last twentieth of
the steps: every batch is new, so that nothing can be memorized. Grids are half-decades, searched from the usual rate
until the best lies between two worse ones.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from gramian.bench.learning_tasks import classes
from gramian.bench.race import HALF_DECADE, MOST_RATES, grid
from gramian.bench.table import Goal, Measurement, Row, Tell
from gramian.errors import GramianWarning
from gramian.init import isometric_
from gramian.optim import Muon
from gramian.optim.registry import MATRIX_OPTIMIZERS, OPTIMIZERS
from gramian.optim.suggestion import suggest_lr
from gramian.tasks import plain_tanh_network
from gramian.training import Task, train

__all__ = ["HALF_DECADE", "MOST_RATES", "grid", "rows"]

NUM_STEPS = 60
NUM_STEPS_LONG = 400
NUM_BATCHES = 12  # that a suggestion sees: eight train, four judge

NUM_STEPS_WIDE = 30  # a step of Muon at width 1024 takes seconds on one core
WIDTHS = (64, 128, 256, 512, 1024)
DEPTHS = (4, 10, 30, 100)

Make = Callable[..., torch.optim.Optimizer]  # (model, lr=…)


@dataclass(frozen=True)
class Contender:
    """An optimizer, and the rate that its documentation gives; the search of the grid begins at the nearest."""

    make: Make
    usual: float

    @property
    def first(self) -> float:
        """The half-decade nearest to the usual rate."""
        return 10 ** (round(2 * math.log10(self.usual)) / 2)


CONTENDERS: dict[str, Contender] = {
    **{entry.optimizer.__name__: Contender(entry.make, entry.lr) for entry in MATRIX_OPTIMIZERS.values()},
    "Muon, match_rms_adamw": Contender(partial(Muon, scale="match_rms_adamw"), OPTIMIZERS["adamw"].lr),
    "AdamW": Contender(OPTIMIZERS["adamw"].make, OPTIMIZERS["adamw"].lr),
}


class Rows(nn.Module):
    """A small transformer: the eight rows of an image are its tokens."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.enter = nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x.unflatten(-1, (8, 8))) + self.position
        return self.head(self.norm(self.layers(x)).mean(1))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def _cnn() -> nn.Module:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for inputs in (1, 16, 16):
        layers += [nn.Conv2d(inputs, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def _plain(depth: int, width: int = 64) -> nn.Module:
    """Without skips and norms; isometric at first, without which 100 layers do not learn."""
    seed = int(torch.randint(2**31, ()))
    net = plain_tanh_network(depth, width=width, outputs=10, seed=seed)
    return isometric_(net, generator=torch.Generator().manual_seed(seed))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP": _mlp,
    "CNN": _cnn,
    "transformer": Rows,
    "50-layer tanh": partial(_plain, 50),
}


def rows(repeats: int, only: str, tell: Tell) -> Iterator[Row]:
    """The tasks whose name contains `only`. There is one seed for each; `repeats` is not used."""
    for name, measure in TASKS.items():
        if only in name:
            tell(name)
            yield measure(name)


def _score(task: Task, make: Make, steps: int, lr: float) -> float:
    """The training loss of the last twentieth of a run; infinite where it is not finite."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GramianWarning)  # of a loss that is not finite: it is the score
        run = train(replace(task, evaluate=lambda model: {}), optimizer=lambda model: make(model, lr=lr), steps=steps)
    return math.inf if run.diverged else run.metrics["loss"]


def _suggestion(network: str, optimizer: str, steps: int, name: str) -> Row:
    task = classes(network, NETWORKS[network], 0)
    who = CONTENDERS[optimizer]
    score = partial(_score, task, who.make, steps)
    scores = grid(score, who.first)
    best = min(scores, key=lambda rate: scores[rate])
    found = suggest_lr(task.model(), task.batches(NUM_BATCHES), task.objective, optimizer=who.make)
    others = {"suggest_lr": found.lr, "where it started": found.start, "usual rate": who.usual}
    losses = ", ".join(f"{rate:.2g}: {loss:.3g}" for rate, loss in scores.items())
    measured = [Measurement("best of the grid", None, 1.0, f"rate {best:.2g}; {losses}")]
    figures = {}
    for label, rate in others.items():
        ratio = score(rate) / scores[best]
        figures[label] = ratio
        measured.append(Measurement(label, None, ratio, f"rate {rate:.2g}, {rate / best:.2g} × the best"))
    apart = max(found.lr / best, best / found.lr)
    goals = (
        (Goal("loss at the suggested rate ÷ loss at the grid's best", "<=", 1.25), figures["suggest_lr"]),
        (Goal("suggested and best rate apart, factor", "<=", HALF_DECADE), apart),
    )
    return Row(name, "final loss ÷ that of the grid's best", tuple(measured), goals)


def _transfer(optimizer: str, shapes: Mapping[str, tuple[int, int]], steps: int, name: str) -> Row:
    """The rate tuned at the first shape, carried to the others."""
    who = CONTENDERS[optimizer]
    measured, ratios, bests, common = [], [], [], who.first
    for label, (depth, width) in shapes.items():
        task = classes("plain", partial(_plain, depth, width), 0)
        score = partial(_score, task, who.make, steps)
        scores = grid(score, common)
        best = min(scores, key=lambda rate: scores[rate])
        common = common if bests else best
        at = next((loss for rate, loss in scores.items() if abs(math.log(rate / common)) < 1e-6), math.inf)
        ratios.append(at / scores[best])
        bests.append(best)
        losses = ", ".join(f"{rate:.2g}: {loss:.3g}" for rate, loss in scores.items())
        measured.append(Measurement(label, None, ratios[-1], f"best rate {best:.2g}; {losses}"))
    goals = (
        (Goal("loss at the first shape's rate ÷ loss at the best, worst shape", "<=", 1.25), max(ratios)),
        (Goal("largest ÷ smallest best rate", "<=", 1.01 * HALF_DECADE), max(bests) / min(bests)),
    )
    return Row(name, f"final loss at rate {common:.2g} ÷ that at the shape's own best", tuple(measured), goals)


_WIDE = {f"width {width}": (4, width) for width in WIDTHS}
_DEEP = {f"depth {depth}": (depth, 64) for depth in DEPTHS}

TASKS: dict[str, Callable[[str], Row]] = {
    **{
        f"suggestion: {network}, {optimizer}": partial(_suggestion, network, optimizer, NUM_STEPS)
        for network in NETWORKS
        for optimizer in CONTENDERS
    },
    **{
        f"suggestion for {NUM_STEPS_LONG} steps: MLP, {name}": partial(_suggestion, "MLP", name, NUM_STEPS_LONG)
        for name in CONTENDERS
    },
    **{f"depths: {name}": partial(_transfer, name, _DEEP, NUM_STEPS) for name in CONTENDERS},
    **{f"widths: {name}": partial(_transfer, name, _WIDE, NUM_STEPS_WIDE) for name in CONTENDERS},
}
