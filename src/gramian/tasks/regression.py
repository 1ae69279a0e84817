"""Regression: the progression of diabetes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gramian.errors import TaskError
from gramian.objective import Objective
from gramian.training import Task

__all__ = ["diabetes"]

BATCH_SIZE = 32


def diabetes(*, seed: int = 0) -> Task:
    """Return a task of regression on few data, where regularization shows: 442 patients, 30 % of them held out.

    Inputs and targets are standardized. The evaluation tells R², the share of the held-out variance that is explained;
    a linear regression reaches about 0.5.

    Args:
        seed: of the split.
    Returns: the task, with a network of two hidden layers of 64.
    Raises:
        TaskError: scikit-learn is not installed.
    Cost: reading the data, a tenth of a second.
    Source: Efron et al., Least Angle Regression, Annals of Statistics 32 (2004); scikit-learn's `load_diabetes`.

    >>> [tuple(t.shape) for t in diabetes().batches(1)[0]]
    [(32, 10), (32, 1)]
    """
    try:
        from sklearn.datasets import load_diabetes
    except ImportError:
        raise TaskError("diabetes needs scikit-learn: pip install 'gramian[tasks]'") from None
    x, y = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[len(x) * 3 // 10 :], order[: len(x) * 3 // 10]
    x, y = ((t - t[train].mean(0)) / t[train].std(0) for t in (x, y[:, None]))

    def batches(epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        shuffled = train[torch.randperm(len(train), generator=generator)]
        return ((x[rows], y[rows]) for rows in shuffled.split(BATCH_SIZE))

    def evaluate(model: nn.Module) -> dict[str, float]:
        left = (model(x[test]) - y[test]).square().sum()
        return {"r2": float(1 - left / (y[test] - y[test].mean()).square().sum())}

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    return Task(model, Objective.regression(), batches, evaluate, name="diabetes")
