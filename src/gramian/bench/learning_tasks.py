"""The tasks of the optimizers' race, half for development and half held out.

Whatever could be tuned afterwards is fixed here beforehand: data, splits, models, budgets, seeds, rates. The held-out
half was named before any direction was tried. Directions, their defaults and the choice of `"auto"` may use figures of
the development half only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.bench import learning_data as data
from gramian.bench import learning_networks as networks
from gramian.objective import Objective
from gramian.training import Task

__all__ = [
    "LADDER",
    "LEARNING",
    "SCORING_SEEDS",
    "TUNING_SEED",
    "Half",
    "LearningTask",
    "classes",
    "half",
    "images",
]

TUNING_SEED = 100
SCORING_SEEDS = (0, 1, 2)
LADDER = (0.125, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4)
"""Budgets, as shares of the task's, at which time to target is measured: each is a run of its own, decayed to zero."""

Half = Literal["development", "held out"]


@dataclass(frozen=True)
class LearningTask:
    """A task, and how long it lasts.

    Args:
        make: the `gm.Task` of a seed, which draws the initial weights; the data and their split are the same for all.
        metric: name of the held-out number in `evaluate`'s dict; less is better.
        steps: the budget: the seconds that fused AdamW takes for so many steps. Whoever steps slower gets fewer.
        half: whether it may be looked at while directions are chosen.
    """

    make: Callable[[int], Task]
    metric: str
    steps: int
    half: Half


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


Batches = Callable[[int, torch.Generator], Iterator[tuple[Tensor, Tensor]]]


def _classified(
    name: str, make: Callable[[], nn.Module], seed: int, batches: Batches, held_out: tuple[Tensor, Tensor]
) -> Task:
    x, y = held_out

    def evaluate(model: nn.Module) -> dict[str, float]:
        scores = model(x)
        accuracy = float((scores.argmax(-1) == y).float().mean())
        return {"loss": float(F.cross_entropy(scores, y)), "accuracy": accuracy}

    return Task(partial(_seeded, make, seed), Objective.classification(), batches, evaluate, name)


def classes(
    name: str, make: Callable[[], nn.Module], seed: int, *, size: int = 8, batch_size: int = 128, most: int = 1
) -> Task:
    """Digits of `size` pixels a side, ten classes; held-out cross-entropy."""
    digits = data.ShiftedDigits.load(size=size, most=most, batch_size=batch_size)
    return _classified(name, make, seed, digits.batches, digits.held_out(1))


def images(seed: int) -> Task:
    """Digits of 28×28 pixels through the deep autoencoder; held-out squared error, summed over an image."""
    digits = data.ShiftedDigits.load(size=28, most=2, batch_size=256)
    test, _ = digits.held_out(1)

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"squared error": float((model(test) - test).square().sum() / len(test))}

    model = partial(_seeded, networks.autoencoder, seed)
    return Task(model, Objective.reconstruction(), digits.batches, evaluate, "autoencoder")


def characters(name: str, make: Callable[[], nn.Module], context: int, seed: int) -> Task:
    """The next character of a text; windows drawn at random; held-out cross-entropy."""
    windows = data.Windows(context, 16)
    x, y = windows.held_out()

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"loss": float(F.cross_entropy(model(x).flatten(0, 1), y.flatten()))}

    return Task(partial(_seeded, make, seed), Objective.next_token(), windows.batches, evaluate, name)


def _recall(seed: int) -> Task:
    """The values of keys that were shown before, by a decoder of two layers; the error over those asked for."""
    x, y = data.recall(torch.Generator().manual_seed(0), 512)

    def batches(epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(100):
            yield data.recall(generator, 64)

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"loss": float(F.cross_entropy(model(x).flatten(0, 1), y.flatten()))}

    make = partial(networks.Transformer, width=64, depth=2, heads=4, vocabulary=32, context=32)
    return Task(partial(_seeded, make, seed), Objective.next_token(), batches, evaluate, "recall")


def _fitted(name: str, make: Callable[[], nn.Module], pairs: Callable[[], data.Pairs], seed: int) -> Task:
    """Regression; the held-out squared error as a share of the targets' variance."""
    given = pairs()
    x, y = given.held_out()
    variance = float((y - y.mean(0)).square().sum())

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"unexplained": float((model(x) - y).square().sum()) / variance}

    return Task(partial(_seeded, make, seed), Objective.regression(), given.batches, evaluate, name)


def _signals(seed: int) -> Task:
    given = data.signals()
    make = partial(networks.mlp, inputs=40, outputs=10, width=128, depth=4)
    return _classified("mnist1d", make, seed, given.batches, given.held_out())


_TOKENS = partial(networks.Transformer, width=96, depth=3, heads=4, context=64)
_EXPERTS = partial(networks.Experts, width=64, depth=2, heads=4, context=64)
_LSTM = partial(networks.Recurrent, width=96, depth=2, vocabulary=65, linear=False)
_RECURRENCE = partial(networks.Recurrent, width=64, depth=3, vocabulary=65, linear=True)
_ILL_SCALED = partial(networks.mlp, inputs=64, outputs=8, width=128, depth=3)

LEARNING: dict[str, LearningTask] = {
    "mlp": LearningTask(partial(classes, "mlp", networks.mlp), "loss", 600, "development"),
    "autoencoder": LearningTask(images, "squared error", 200, "development"),
    "characters": LearningTask(partial(characters, "characters", _TOKENS, 64), "loss", 150, "development"),
    "depthwise": LearningTask(partial(classes, "depthwise", networks.depthwise), "loss", 150, "development"),
    "lstm": LearningTask(partial(characters, "lstm", _LSTM, 32), "loss", 150, "development"),
    "ill-scaled": LearningTask(
        partial(_fitted, "ill-scaled", _ILL_SCALED, data.ill_scaled), "unexplained", 800, "development"
    ),
    "recall": LearningTask(_recall, "loss", 300, "development"),
    "cnn": LearningTask(partial(classes, "cnn", networks.convolutional), "loss", 150, "held out"),
    "deep tanh": LearningTask(partial(classes, "deep tanh", networks.deep_tanh), "loss", 400, "held out"),
    "patches": LearningTask(partial(classes, "patches", networks.Patches, size=28, most=2), "loss", 200, "held out"),
    "recurrence": LearningTask(partial(characters, "recurrence", _RECURRENCE, 32), "loss", 150, "held out"),
    "experts": LearningTask(partial(characters, "experts", _EXPERTS, 64), "loss", 150, "held out"),
    "mnist1d": LearningTask(_signals, "loss", 800, "held out"),
    "waves": LearningTask(partial(_fitted, "waves", networks.Waves, data.coordinates), "unexplained", 500, "held out"),
}


def half(of: Half) -> dict[str, LearningTask]:
    """The tasks of one half.

    >>> len(half("development")), len(half("held out"))
    (7, 7)
    """
    return {name: learning for name, learning in LEARNING.items() if learning.half == of}
