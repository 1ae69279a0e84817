"""Small data sets on which small networks learn within a hundred steps and a linear map does not do well.

All are drawn from a seed. Inputs that are not tokens have mean 0 and variance 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gramian.bench.faults.setup import Draw
from gramian.errors import TaskError

__all__ = ["Data", "chains", "clusters", "digit_images", "digit_patches", "digit_rows", "echoes"]

CLASSES = 10
VOCABULARY = 12


@dataclass
class Data:
    """Inputs and labels for training and for scoring."""

    x: Tensor
    y: Tensor
    x_held_out: Tensor
    y_held_out: Tensor


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise TaskError("the fault bench needs scikit-learn: pip install 'gramian[tasks]'") from None
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32).view(-1, 8, 8) / 16, torch.tensor(y, dtype=torch.long)


def _split(x: Tensor, y: Tensor, held_out: int, draw: Draw) -> Data:
    order = torch.randperm(len(x), generator=draw.generator)
    test, train = order[:held_out], order[held_out:]
    if x.is_floating_point():
        x = (x - x[train].mean()) / x[train].std()
    return Data(x[train], y[train], x[test], y[test])


def digit_images(draw: Draw) -> Data:
    """Handwritten digits, each moved by up to two pixels on a canvas of 10 × 10, `(1, 10, 10)`."""
    x, y = _digits()
    moved = torch.zeros(len(x), 1, 10, 10)
    shifts = torch.randint(3, (len(x), 2), generator=draw.generator).tolist()
    for i, (down, right) in enumerate(shifts):
        moved[i, 0, down : down + 8, right : right + 8] = x[i]
    return _split(moved, y, 400, draw)


def digit_patches(draw: Draw) -> Data:
    """Handwritten digits where they are, `(1, 8, 8)`."""
    x, y = _digits()
    return _split(x[:, None], y, 400, draw)


def digit_rows(draw: Draw) -> Data:
    """Handwritten digits as sequences of their 8 rows, `(8, 8)`."""
    x, y = _digits()
    return _split(x, y, 400, draw)


def clusters(draw: Draw) -> Data:
    """Ten classes of four Gaussian clusters each, `(24,)`."""
    count = 1400
    centers = draw.normal(4 * CLASSES, 24)
    which = torch.randint(4 * CLASSES, (count,), generator=draw.generator)
    return _split(centers[which] + 0.45 * draw.normal(count, 24), which % CLASSES, 400, draw)


def chains(draw: Draw, length: int = 16) -> Data:
    """Token sequences of four Markov chains whose tokens are equally frequent; the label is the chain."""
    count, kinds = 1400, 4
    follow = torch.stack([torch.randperm(VOCABULARY, generator=draw.generator) for _ in range(kinds)])
    y = torch.randint(kinds, (count,), generator=draw.generator)
    tokens = torch.randint(VOCABULARY, (count, length), generator=draw.generator)
    follows = torch.rand(count, length, generator=draw.generator) < 0.8
    for t in range(1, length):
        tokens[:, t] = torch.where(follows[:, t], follow[y, tokens[:, t - 1]], tokens[:, t])
    return _split(tokens, y, 400, draw)


def echoes(draw: Draw, length: int = 16) -> Data:
    """Token sequences in which a token mostly depends on the last but one; the labels are the next tokens."""
    count = 1100
    follow = torch.randperm(VOCABULARY, generator=draw.generator)
    tokens = torch.randint(VOCABULARY, (count, length + 1), generator=draw.generator)
    follows = torch.rand(count, length + 1, generator=draw.generator) < 0.9
    for t in range(2, length + 1):
        tokens[:, t] = torch.where(follows[:, t], follow[tokens[:, t - 2]], tokens[:, t])
    return _split(tokens[:, :-1], tokens[:, 1:], 200, draw)


def flat(data: Data) -> Data:
    """The same data with the pixels of an image in one row."""
    return Data(data.x.flatten(1), data.y, data.x_held_out.flatten(1), data.y_held_out)


def onto_batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of `size` in order; the last, smaller one is left out."""
    whole = len(x) // size * size
    return list(zip(x[:whole].split(size), y[:whole].split(size), strict=True))
