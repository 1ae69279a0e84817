"""How many samples a run has been trained on, as `gramian compress RUN --task T` hands on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gramian as gm
from cases import seeded
from gramian.training.samples_seen import samples_trained_on

X = torch.randn(50, 3, generator=seeded(0))


def shuffled(epoch: int, generator: torch.Generator) -> Iterator[Any]:
    """Five batches of nine of the fifty samples: an epoch lacks five of them."""
    for rows in torch.randperm(50, generator=generator)[:45].split(9):
        yield X[rows], X[rows, :1]


def drawn(epoch: int, generator: torch.Generator) -> Iterator[Any]:
    for _ in range(5):
        x = torch.randn(9, 3, generator=generator)
        yield x, x[:, :1]


def task(batches: Callable[..., Any], name: str = "seen") -> gm.Task:
    loss = gm.Objective.regression()
    return gm.Task(lambda: nn.Linear(3, 1), loss, batches, lambda model: {"error": 0.0}, name=name)


@pytest.mark.parametrize(
    ("batches", "steps", "told"),
    [(shuffled, 40, 50), (shuffled, 5, 45), (shuffled, 4, None), (drawn, 40, None), (drawn, 5, None)],
    ids=["many epochs", "one epoch", "less than one", "drawn anew", "drawn anew, one epoch"],
)
def test_the_samples_of_a_run_are_counted(batches: Callable[..., Any], steps: int, told: int | None, tmp_path) -> None:
    gm.train(task(batches), optimizer="adamw", lr=0.01, steps=steps, out=tmp_path / "run")
    assert samples_trained_on(tmp_path / "run", task(batches)) == told
    assert samples_trained_on(tmp_path / "run" / "model.safetensors", task(batches)) == told
    assert samples_trained_on(tmp_path / "run", task(batches, "another")) is None


def test_only_a_run_tells_and_the_best_weights_count_to_their_step(tmp_path: Path) -> None:
    gm.checkpoint.save_tensors(tmp_path / "model.safetensors", {"w": torch.ones(2)})
    assert samples_trained_on(tmp_path, task(shuffled)) is None
    assert samples_trained_on(tmp_path / "missing", task(shuffled)) is None
    gm.train(task(shuffled), optimizer="adamw", lr=0.01, steps=40, best="min:error", out=tmp_path / "best")
    assert samples_trained_on(tmp_path / "best", task(shuffled)) is None  # the first of equals, before an epoch ended
