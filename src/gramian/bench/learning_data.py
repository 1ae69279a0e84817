"""The data of the optimizers' race: digits, text, and sequences that are made up. Splits are fixed."""

from __future__ import annotations

import os
import pydoc_data.topics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.errors import TaskError
from gramian.tasks import Digits

__all__ = ["Pairs", "ShiftedDigits", "Windows", "coordinates", "ill_scaled", "recall", "signals", "text"]

TEXT_VARIABLE = "GRAMIAN_TINYSHAKESPEARE"
HELD_OUT_SHARE = 0.1
HELD_OUT_WINDOWS = 64

Batches = Iterator[tuple[Tensor, Tensor]]


@lru_cache(maxsize=2)
def text() -> tuple[str, Tensor, Tensor]:
    """Where a text is from, and its characters as numbers from 0 to 64: `(source, training, held out)`.

    Tiny Shakespeare, from the file that the variable GRAMIAN_TINYSHAKESPEARE names, or from the data folder beside the
    repository; without it, the chapters of Python's manual that come with Python, whose rare characters become one.
    """
    beside = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "tinyshakespeare.txt"
    path = Path(os.environ.get(TEXT_VARIABLE, beside))
    if path.is_file():
        source, characters = "tiny Shakespeare", path.read_bytes()
    elif TEXT_VARIABLE in os.environ:
        raise TaskError(f"{TEXT_VARIABLE} names {path}, where there is no file")
    else:
        source, characters = "Python's manual", "\n".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")
    raw = torch.frombuffer(bytearray(characters), dtype=torch.uint8).long()
    frequency = raw.bincount(minlength=256)
    kept = frequency.argsort(descending=True, stable=True)[:64].sort().values
    number = torch.full((256,), 64).scatter_(0, kept, torch.arange(64))
    tokens = number[raw]
    split = int(len(tokens) * (1 - HELD_OUT_SHARE))
    return source, tokens[:split], tokens[split:]


@dataclass(frozen=True)
class Windows:
    """Windows of the text, drawn at random, each with the one a character later."""

    context: int
    batch_size: int

    def batches(self, epoch: int, generator: torch.Generator) -> Batches:
        """A hundred batches."""
        windows = text()[1].unfold(0, self.context + 1, 1)
        for _ in range(100):
            rows = windows[torch.randint(len(windows), (self.batch_size,), generator=generator)]
            yield rows[:, :-1], rows[:, 1:]

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Windows spread evenly over the part held out."""
        held_out = text()[2]
        spread = torch.linspace(0, len(held_out) - self.context - 1, HELD_OUT_WINDOWS).long()
        rows = held_out.unfold(0, self.context + 1, 1)[spread]
        return rows[:, :-1], rows[:, 1:]


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

    def batches(self, epoch: int, generator: torch.Generator) -> Batches:
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


@dataclass(frozen=True)
class Pairs:
    """Inputs and targets of which batches are drawn, and others held out."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    batch_size: int

    def batches(self, epoch: int, generator: torch.Generator) -> Batches:
        """Every pair once, in an order from `generator`; a last smaller batch is left out."""
        order = torch.randperm(len(self.x), generator=generator)
        for rows in order[: len(order) // self.batch_size * self.batch_size].split(self.batch_size):
            yield self.x[rows], self.y[rows]

    def held_out(self) -> tuple[Tensor, Tensor]:
        """The others."""
        return self.x_test, self.y_test


def ill_scaled(num: int = 4096, inputs: int = 64, outputs: int = 8, batch_size: int = 128) -> Pairs:
    """A fixed random network's outputs, of inputs that are correlated with standard deviations from 10 to 0.01."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(1, -2, inputs)
    mix = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator))[0]
    hidden = torch.randn(64, inputs, generator=generator) / inputs**0.5
    out = torch.randn(outputs, 64, generator=generator) / 8
    z = torch.randn(num + 1024, inputs, generator=generator)
    y = (z @ hidden.T).tanh() @ out.T
    x = (z * scales) @ mix
    return Pairs(x[:num], y[:num], x[num:], y[num:], batch_size)


def coordinates(size: int = 64, batch_size: int = 512) -> Pairs:
    """A picture of discs and stripes: points of the unit square, drawn once, and the brightness at each."""
    generator = torch.Generator().manual_seed(0)

    def brightness(x: Tensor) -> Tensor:
        centers = torch.rand(12, 2, generator=torch.Generator().manual_seed(1))
        discs = (torch.cdist(x, centers) < torch.linspace(0.04, 0.15, 12)).float().amax(-1)
        return (0.6 * discs + 0.4 * (6 * torch.pi * (x[:, 0] + 0.5 * x[:, 1] ** 2)).sin())[:, None]

    x, x_test = torch.rand(size * size, 2, generator=generator), torch.rand(2048, 2, generator=generator)
    return Pairs(x, brightness(x), x_test, brightness(x_test), batch_size)


TEMPLATES = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)


def signals(num: int = 4000, batch_size: int = 128) -> Pairs:
    """Digits of one dimension after MNIST-1D (Greydanus 2020): 40 numbers each, scaled, shifted, with noise."""
    generator = torch.Generator().manual_seed(0)
    total = num + 1000
    y = torch.arange(total) % 10
    shapes = F.interpolate(torch.tensor(TEMPLATES)[:, None] - 5, size=24, mode="linear", align_corners=True)[:, 0]
    x = torch.zeros(total, 40)
    places = torch.randint(17, (total,), generator=generator)[:, None] + torch.arange(24)
    x.scatter_(1, places, shapes[y] * (0.6 + 0.8 * torch.rand(total, 1, generator=generator)))
    slope = torch.linspace(-1, 1, 40) * torch.randn(total, 1, generator=generator)
    smooth = F.avg_pool1d(torch.randn(total, 1, 44, generator=generator), 5, 1)[:, 0]
    x += 0.5 * slope + 0.5 * smooth + 0.1 * torch.randn(total, 40, generator=generator)
    order = torch.randperm(total, generator=generator)
    x, y = x[order], y[order]
    return Pairs(x[:num], y[:num], x[num:], y[num:], batch_size)


def recall(generator: torch.Generator, num: int, *, keys: int = 16, values: int = 16) -> tuple[Tensor, Tensor]:
    """Associative recall in context: eight pairs of a key and a value, then the keys again, whose values are wanted.

    Returns: tokens `(num, 32)`, and the next token where it is a value asked for; elsewhere −100, which does not count.
    """
    order = torch.rand(num, keys, generator=generator).argsort(-1)[:, :8]
    held = torch.randint(values, (num, 8), generator=generator) + keys
    again = torch.rand(num, 8, generator=generator).argsort(-1)
    asked, answers = order.gather(1, again), held.gather(1, again)
    tokens = torch.cat([torch.stack([order, held], -1), torch.stack([asked, answers], -1)], 1).flatten(1)
    wanted = torch.full_like(tokens, -100)
    wanted[:, 16::2] = answers
    return tokens, wanted
