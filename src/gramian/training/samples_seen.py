"""How many samples a run has been trained on, from what its folder says and from its task's batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from gramian.checkpoint import open_checkpoint
from gramian.compression.calibration.reading import hashes
from gramian.training.folder import FINISHED, MODEL
from gramian.training.options import best_row
from gramian.training.task import Task, calling

__all__ = ["samples_trained_on"]

EPOCHS = 4
"""Batches may be drawn or left out at random, so that an epoch lacks some samples; so many are read, at most."""
REPEATED = 0.01
"""An epoch of which fewer samples are new has no others to come."""
MOST_SAMPLES = 2**18


def samples_trained_on(run: str | Path, task: Task) -> int | None:
    """The number of different samples that a finished run of `gm.train` has seen.

    Args:
        run: its folder, or the model's file in it.
        task: of that run; samples are compared by their main inputs.

    Returns:
        The number; `None` where it is not known: there is no finished run of this task; it did not see a whole epoch,
        so that it has not seen all batches of one; each epoch has other samples, as those that are drawn or augmented
        anew; or there are more than 2¹⁸.

    Raises:
        TaskError: of the task's batches.
    Cost: reading up to four epochs of them.
    """
    path = Path(run)
    path = path / MODEL if path.is_dir() else path
    if path.name != MODEL or not path.is_file():
        return None
    text = open_checkpoint(path, stored=True).metadata.get(FINISHED)
    told = {} if text is None else json.loads(text)
    identity = told.get("identity", {})
    if identity.get("task") != (task.source or task.name):
        return None
    taken = _steps(told) * int(identity.get("accumulate", 1))
    generator, seen, num = torch.Generator().manual_seed(0), set[int](), 0
    for epoch in range(EPOCHS):
        before = len(seen)
        with calling(task, f"train_batches({epoch}, generator)"):
            for batch in task.train_batches(epoch, generator):
                found = hashes(batch, num)
                if taken == 0:
                    return len(seen) if epoch and 2 * len(seen.intersection(found)) >= len(set(found)) else None
                seen.update(found)
                num, taken = num + len(found), taken - 1
                if num > MOST_SAMPLES:
                    return None
        if epoch and len(seen) - before <= REPEATED * before:
            return len(seen)
    return None


def _steps(told: dict[str, Any]) -> int:
    """The steps that the weights are of: all, or those up to the best evaluation."""
    best = told["identity"].get("best")
    return int(told["history"][best_row(best, told["history"])[0]]["step"]) if best else int(told["steps"])
