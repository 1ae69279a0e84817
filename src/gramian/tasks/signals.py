"""Signals of one dimension: MNIST-1D."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gramian.errors import TaskError
from gramian.objective import Objective
from gramian.seeding import seeded
from gramian.training import Task

__all__ = ["mnist1d"]

BATCH_SIZE = 100


def mnist1d() -> Task:
    """Return a task of signals: which of ten digits is drawn as a curve of 40 points, with three convolutions.

    The data are made by the package `mnist1d` (4,000 for training, 1,000 held out), and nothing is downloaded. The
    authors report 68 % for an MLP and 94 % for a convolutional network.

    Returns: the task.
    Raises:
        TaskError: the package is not installed.
    Cost: making the data, some seconds.
    Source: Greydanus & Kobak, Scaling Down Deep Learning with MNIST-1D (2011.14439).

    >>> "mnist1d" in __import__("gramian").tasks.TASKS
    True
    """
    try:
        from mnist1d.data import get_dataset_args, make_dataset  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise TaskError("mnist1d needs its package: pip install 'gramian[mnist1d]'") from None
    arguments = get_dataset_args()
    with seeded(arguments.seed):  # it draws from numpy's global generator
        made = make_dataset(arguments)
    x, x_test = (torch.tensor(made[name], dtype=torch.float32)[:, None] for name in ("x", "x_test"))
    y, y_test = (torch.tensor(made[name], dtype=torch.long) for name in ("y", "y_test"))

    def batches(epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        return ((x[rows], y[rows]) for rows in torch.randperm(len(x), generator=generator).split(BATCH_SIZE))

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"accuracy": float((model(x_test).argmax(-1) == y_test).float().mean())}

    return Task(_convolutional, Objective.classification(), batches, evaluate, name="mnist1d")


def _convolutional() -> nn.Module:
    """The authors' convolutional network."""
    return nn.Sequential(
        nn.Conv1d(1, 25, 5, 2, 1),
        nn.ReLU(),
        nn.Conv1d(25, 25, 3, 2, 1),
        nn.ReLU(),
        nn.Conv1d(25, 25, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(125, 10),
    )
