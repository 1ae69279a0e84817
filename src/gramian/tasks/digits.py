"""scikit-learn's handwritten digits, with a network that is hard to train because of its depth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from gramian.errors import InputError, TaskError
from gramian.objective import Objective
from gramian.report import HeatMap
from gramian.training import Task

__all__ = ["Digits", "digits", "plain_tanh_network"]

HELD_OUT = 0.3
BATCH_SIZE = 128


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 handwritten digits of 8 × 8 pixels, labeled odd or even, or (10 classes) by digit.

    Args:
        x_train, x_test: `(samples, 64)`, pixels from 0 to 1.
        y_train, y_test: `(samples,)`, classes.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    @staticmethod
    def load(*, classes: int = 2, seed: int = 0) -> Digits:
        """Return the digits with 30 % held out, and each digit's share the same in both parts.

        Args:
            classes: 2 (is the digit odd?) or 10 (which digit?).
            seed: of the split.
        """
        if classes not in (2, 10):
            raise InputError(f"digits: classes must be 2 (odd or even) or 10 (which digit), got {classes}")
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError:
            raise TaskError("digits needs scikit-learn: pip install 'gramian[tasks]'") from None
        x, digit = load_digits(return_X_y=True)
        y = digit % 2 if classes == 2 else digit
        parts = train_test_split(x / 16, y, test_size=HELD_OUT, random_state=seed, stratify=digit)
        x_train, x_test = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
        y_train, y_test = (torch.tensor(part, dtype=torch.long) for part in parts[2:])
        return Digits(x_train, y_train, x_test, y_test)

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield training batches of 128 in random order; the last, smaller batch is left out.

        Args:
            epoch: not used: the generator alone determines the order.
            generator: for shuffling.
        """
        order = torch.randperm(len(self.x_train), generator=generator)
        for rows in order[: len(order) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
            yield self.x_train[rows], self.y_train[rows]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the share of held-out digits that the model classifies correctly."""
        return {"accuracy": float((model(self.x_test).argmax(-1) == self.y_test).float().mean())}


def plain_tanh_network(depth: int, *, width: int = 64, inputs: int = 64, outputs: int = 2, seed: int = 0) -> nn.Module:
    """Return a plain network: Linear layers with tanh between them, no skips or norms, in PyTorch's initialization.

    Args:
        depth: number of Linear layers, at least 2.
        width: of the hidden layers.
        inputs, outputs: of the network.
        seed: of the initialization.
    Returns: the network.
    Raises:
        InputError: a depth below 2.
    Cost: the random numbers of its weights.
    Source: this library's own.

    >>> len(plain_tanh_network(3))
    5
    """
    if depth < 2:
        raise InputError(f"a plain network needs at least 2 layers, got depth={depth}")
    sizes = [inputs, *[width] * (depth - 1)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [layer for m, n in pairwise(sizes) for layer in (nn.Linear(m, n), nn.Tanh())]
        return nn.Sequential(*layers, nn.Linear(width, outputs))


def digits(*, depth: int = 100, classes: int = 2, seed: int = 0) -> Task:
    """Return a task that is hard because of its depth: handwritten digits with a plain tanh network of width 64.

    Args:
        depth: number of layers.
        classes: 2 (is the digit odd?) or 10 (which digit?).
        seed: of the split and the initialization.
    Returns: the task.
    Raises:
        InputError: another number of classes.
        TaskError: scikit-learn is not installed.
    Cost: reading the digits, a tenth of a second.
    Source: scikit-learn's `load_digits`.

    >>> digits(depth=10).name
    'digits'
    """
    data = Digits.load(classes=classes, seed=seed)
    return Task(
        model=partial(plain_tanh_network, depth, outputs=classes, seed=seed),
        objective=Objective.classification(),
        train_batches=data.batches,
        evaluate=data.evaluate,
        name="digits" if classes == 2 else f"digits-{classes}",
    )


def digits_cnn(*, seed: int = 0) -> Task:
    """Return a task of images: which handwritten digit, with two convolutions and a linear layer.

    Args:
        seed: of the split.
    Returns: the task, whose batches are images `(B, 1, 8, 8)`.
    Raises:
        TaskError: scikit-learn is not installed.
    Cost: reading the digits, a tenth of a second.
    Source: scikit-learn's `load_digits`.

    >>> digits_cnn().batches(1)[0][0].shape
    torch.Size([128, 1, 8, 8])
    """
    data = Digits.load(classes=10, seed=seed)
    images = Digits(data.x_train.view(-1, 1, 8, 8), data.y_train, data.x_test.view(-1, 1, 8, 8), data.y_test)
    return Task(_convolutional, Objective.classification(), images.batches, images.evaluate, name="digits-cnn")


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


def autoencoder(*, dim: int = 8, seed: int = 0) -> Task:
    """Return a task of compression: digits are to be rebuilt from a few numbers.

    The evaluation tells the share of the variance of held-out digits that is left unexplained, and for comparison that
    of as many principal components of the training digits, the best linear map of this kind. The report of a run draws
    digits beside both.

    Args:
        dim: how many numbers.
        seed: of the split.
    Returns: the task.
    Raises:
        InputError: `dim` is not between 1 and 64.
        TaskError: scikit-learn is not installed.
    Cost: reading the digits, and a singular value decomposition of 1,257 × 64.
    Source: Hinton & Salakhutdinov, Science 313 (2006).

    >>> sorted(autoencoder().evaluate(nn.Identity()))
    ['pca_unexplained', 'unexplained']
    """
    if not 1 <= dim <= 64:
        raise InputError(f"autoencoder: dim must be between 1 and 64, got {dim}")
    data = Digits.load(classes=10, seed=seed)
    mean = data.x_train.mean(0)
    basis = torch.linalg.svd(data.x_train - mean, full_matrices=False).Vh[:dim]
    rebuilt = mean + (data.x_test - mean) @ basis.T @ basis
    variance = (data.x_test - mean).square().sum()

    def evaluate(model: nn.Module) -> dict[str, float]:
        outputs = {"unexplained": model(data.x_test), "pca_unexplained": rebuilt}
        return {name: float((output - data.x_test).square().sum() / variance) for name, output in outputs.items()}

    def batches(epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor]]:
        return ((x,) for x, _ in data.batches(epoch, generator))

    def pictures(model: nn.Module) -> list[HeatMap]:
        drawn = {"Held-out digits": data.x_test, "Rebuilt by the network": model(data.x_test)}
        drawn[f"Rebuilt by {dim} principal components"] = rebuilt
        return [HeatMap(title, _mosaic(images), "column", "row") for title, images in drawn.items()]

    def model() -> nn.Module:
        layers = [nn.Linear(64, 64), nn.GELU(), nn.Linear(64, dim), nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, 64)]
        return nn.Sequential(*layers)

    return Task(model, Objective.reconstruction(), batches, evaluate, name="autoencoder", pictures=pictures)


def _mosaic(images: Tensor) -> list[list[float]]:
    """The first 16 images, side by side in a square, as rows of pixels."""
    return images[:16].reshape(4, 4, 8, 8).transpose(1, 2).reshape(32, 32).tolist()
