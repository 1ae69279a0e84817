"""Four tasks with a held-out number to reach, on which time to target is measured.

Whatever could be tuned afterwards is fixed here beforehand: data, splits, models, targets, seeds, rates, budgets.
A target is about what fused AdamW reaches in twelve seconds on two idle cores at its best rate, on the tuning seed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.errors import TaskError
from gramian.init import isometric_
from gramian.objective import Objective
from gramian.tasks import Digits, plain_tanh_network
from gramian.training import Task

__all__ = ["LEARNING", "RATES", "SCORING_SEEDS", "TUNING_SEED", "LearningTask", "tinyshakespeare"]

TUNING_SEED = 100
SCORING_SEEDS = (0, 1, 2)
RATES = (1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2, 3.16e-2, 0.1, 0.316, 1.0, 3.16)
"""Half-decades, the same for every optimizer; up to 3.16 for Muon on the CNN, whose batch norms tolerate any rate."""

TEXT_VARIABLE = "GRAMIAN_TINYSHAKESPEARE"
CONTEXT = 128
HELD_OUT_WINDOWS = 64
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class LearningTask:
    """A task and the held-out number at which it counts as learned.

    Args:
        make: the `gm.Task` of a seed, which draws the initial weights; the data and their split are the same for all.
        metric: name of the held-out number in `evaluate`'s dict; less is better.
        target: its value at which the clock stops.
        every: steps between evaluations.
        seconds: training seconds on two cores after which a run is stopped; on one core, twice as many.
    """

    make: Callable[[int], Task]
    metric: str
    target: float
    every: int
    seconds: float

    @property
    def limit(self) -> float:
        """Training seconds after which a run is stopped, for the number of threads that torch uses now."""
        return self.seconds * (2 if torch.get_num_threads() == 1 else 1)


class _Block(nn.Module):
    """Attention and a two-layer network, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A decoder of characters: tokens `(B, T)` to scores `(B, T, vocabulary)`."""

    def __init__(
        self, *, width: int = 128, depth: int = 4, heads: int = 4, vocabulary: int = 65, context: int = CONTEXT
    ) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        for table in (self.embed, self.position):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def autoencoder() -> nn.Sequential:
    """784-1000-500-250-30 and back, tanh between, a linear code: the deep autoencoder of Hinton & Salakhutdinov (2006).

    Xavier's initialization, which its signals need to cross eight layers.
    """
    sizes = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    layers: list[nn.Module] = []
    for m, n in pairwise(sizes):
        linear = nn.Linear(m, n)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Identity() if n in (30, sizes[-1]) else nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Sequential:
    """Four 3×3 convolutions of 64 channels with batch norms, the mean over pixels, and a linear head."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for inputs in (1, 64, 64, 64):
        layers += [nn.Conv2d(inputs, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def _deep_tanh() -> nn.Module:
    seed = int(torch.randint(2**31, ()))  # of the generator that `_seeded` forked
    net = plain_tanh_network(50, outputs=10, seed=seed)
    return isometric_(net, generator=torch.Generator().manual_seed(seed))


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


@lru_cache(maxsize=1)
def tinyshakespeare() -> tuple[Tensor, Tensor]:
    """The characters of the text as numbers, `(training, held out)`: the last tenth is held out.

    Read from the file that the variable GRAMIAN_TINYSHAKESPEARE names, or from the data folder beside the repository.
    Raises `TaskError` where there is none.
    """
    beside = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "tinyshakespeare.txt"
    path = Path(os.environ.get(TEXT_VARIABLE, beside))
    if not path.is_file():
        raise TaskError(f"tinyshakespeare.txt is not at {path}: set {TEXT_VARIABLE} to where it is")
    text = torch.tensor(list(path.read_bytes()))
    tokens = text.unique(return_inverse=True)[1]
    split = int(len(tokens) * (1 - HELD_OUT_SHARE))
    return tokens[:split], tokens[split:]


def characters(seed: int, *, batch_size: int = 16) -> Task:
    """The next character of Shakespeare, by a decoder of four layers; windows of 128 drawn at random."""
    train, held_out = tinyshakespeare()
    windows = train.unfold(0, CONTEXT + 1, 1)
    spread = torch.linspace(0, len(held_out) - CONTEXT - 1, HELD_OUT_WINDOWS).long()
    test = held_out.unfold(0, CONTEXT + 1, 1)[spread]

    def batches(epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(100):
            rows = windows[torch.randint(len(windows), (batch_size,), generator=generator)]
            yield rows[:, :-1], rows[:, 1:]

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"loss": float(F.cross_entropy(model(test[:, :-1]).flatten(0, 1), test[:, 1:].flatten()))}

    return Task(partial(_seeded, Transformer, seed), Objective.next_token(), batches, evaluate, "transformer")


@dataclass(frozen=True)
class ShiftedDigits:
    """The digits, each shifted by up to `most` pixels in both directions, drawn anew for every batch.

    `train` and `test` are views `(N, 2 most + 1, 2 most + 1, size, size)` of the padded images: every shift of each.
    """

    train: Tensor
    y_train: Tensor
    test: Tensor
    y_test: Tensor
    batch_size: int

    @staticmethod
    def load(size: int, most: int, batch_size: int) -> ShiftedDigits:
        """The split of `Digits.load(seed=0)`, the images bilinearly enlarged to `size` pixels a side."""
        digits = Digits.load(classes=10, seed=0)

        def views(x: Tensor) -> Tensor:
            images = x.view(-1, 1, 8, 8)
            if size != 8:
                images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
            padded = F.pad(images.squeeze(1), (most,) * 4)
            return padded.unfold(1, size, 1).unfold(2, size, 1)

        return ShiftedDigits(views(digits.x_train), digits.y_train, views(digits.x_test), digits.y_test, batch_size)

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Every training image once, in an order and with shifts from `generator`; a last smaller batch is left out."""
        order = torch.randperm(len(self.train), generator=generator)
        for rows in order[: len(order) // self.batch_size * self.batch_size].split(self.batch_size):
            dy, dx = torch.randint(self.train.shape[1], (2, len(rows)), generator=generator)
            yield self.train[rows, dy, dx].flatten(1), self.y_train[rows]

    def held_out(self, num_shifts: int) -> tuple[Tensor, Tensor]:
        """Every held-out image with `num_shifts` fixed shifts drawn for it."""
        generator = torch.Generator().manual_seed(0)
        rows = torch.arange(len(self.test)).repeat(num_shifts)
        dy, dx = torch.randint(self.test.shape[1], (2, len(rows)), generator=generator)
        return self.test[rows, dy, dx].flatten(1), self.y_test[rows]


def images(seed: int) -> Task:
    """Digits of 28×28 pixels through the deep autoencoder; held-out squared error, summed over an image."""
    data = ShiftedDigits.load(size=28, most=2, batch_size=256)
    test, _ = data.held_out(1)

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"squared error": float((model(test) - test).square().sum() / len(test))}

    return Task(partial(_seeded, autoencoder, seed), Objective.reconstruction(), data.batches, evaluate, "autoencoder")


def classes(name: str, make: Callable[[], nn.Module], seed: int, *, batch_size: int = 128, most: int = 1) -> Task:
    """Digits of 8×8 pixels, ten classes; held-out cross-entropy."""
    data = ShiftedDigits.load(size=8, most=most, batch_size=batch_size)
    x, y = data.held_out(1)

    def evaluate(model: nn.Module) -> dict[str, float]:
        scores = model(x)
        accuracy = float((scores.argmax(-1) == y).float().mean())
        return {"loss": float(F.cross_entropy(scores, y)), "accuracy": accuracy}

    return Task(partial(_seeded, make, seed), Objective.classification(), data.batches, evaluate, name)


LEARNING: dict[str, LearningTask] = {
    "transformer": LearningTask(characters, "loss", 2.5, 5, 30.0),
    "autoencoder": LearningTask(images, "squared error", 3.5, 5, 30.0),
    "cnn": LearningTask(partial(classes, "cnn", convolutional), "loss", 0.03, 5, 30.0),
    "deep tanh": LearningTask(partial(classes, "deep tanh", _deep_tanh), "loss", 0.3, 20, 20.0),
}
