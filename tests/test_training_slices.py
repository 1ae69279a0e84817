"""Slices: the same run to the bit on any number of ranks, with the model whole or divided, and from one to another."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from cases import seeded
from distributed import run_on_ranks
from gramian import placement
from gramian.errors import GramianWarning, InputError, UnsupportedError
from gramian.training import folder
from gramian.training.slices import clip_

X = torch.randn(70, 6, generator=seeded(0))
Y = (X[:, 0] > 0).long()


class Net(nn.Module):
    """Blocks in a list, with dropout, which are divided by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 9), nn.Linear(9, 2)
        parts = [nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Dropout(0.2), nn.Linear(9, 9)) for _ in range(2)]
        self.blocks = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def batches(epoch: int, generator: torch.Generator):
    """Of 16 rows; one has none for a slice, and one no label that counts."""
    for part in torch.randperm(len(X), generator=generator)[:-1].split(16):
        yield X[part], Y[part]
    yield X[:3], Y[:3]
    yield X[:16], torch.full((16,), -100)


def task(**changes: Any) -> gm.Task:
    parts: dict[str, Any] = {"model": Net, "objective": gm.Objective.classification(), "train_batches": batches}
    parts["evaluate"] = lambda model: {}
    return gm.Task(**(parts | changes))


def trained(shard: bool, options: dict[str, Any], path: str | None = None, stop: int | None = None) -> Any:
    """The weights, whole, and the losses of 15 steps; nothing where the run stops before."""
    folder.EVERY_SECONDS, folder.LARGEST_SHARE = 0.0, math.inf

    def on_step(run: gm.Run, share: float) -> None:
        if run.steps == stop:
            raise KeyError("stop")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            own = {"steps": 15, "slices": 4, "shard": shard, "out": path, "resume": path is not None} | options
            run = gm.train(task(), on_step=on_step, **own)
        except KeyError:
            return None
    whole = {name: placement.whole(t).clone() for name, t in run.model.state_dict().items()}
    return whole, str([row["loss"] for row in run.history])  # text, in which NaN equals itself


OPTIONS: dict[str, Any] = {"ema": 0.8, "clip": 0.5, "accumulate": 2, "augment": {"noise": 0.1}}


WHOLE = [("adamw", False), ("muon", False)]
DIVIDED = [("muon", True), ("balanced", True), ("soap", True), ("shampoo", True), ("sgd", True)]


@pytest.mark.parametrize(("optimizer", "shard"), WHOLE + DIVIDED)
def test_two_ranks_are_one_to_the_bit(optimizer: str, shard: bool) -> None:
    """Dropout, noise, clipping and a mean of weights too."""
    options = {"optimizer": optimizer} | (OPTIONS if optimizer in ("muon", "adamw") else {})
    weights, losses = trained(False, options)
    for other, numbers in run_on_ranks(trained, 2, shard, options):
        assert numbers == losses
        torch.testing.assert_close(other, weights, rtol=0, atol=0)


def test_a_run_moves_between_ranks_to_the_bit(tmp_path: Path) -> None:
    options = {"optimizer": "muon"}
    weights, losses = trained(False, options)
    assert trained(False, options, str(tmp_path), 5) is None
    assert run_on_ranks(trained, 2, True, options, str(tmp_path), 11) == [None, None]
    other, numbers = trained(False, options, str(tmp_path))
    assert numbers == losses
    torch.testing.assert_close(other, weights, rtol=0, atol=0)


def test_slices_are_a_batch_within_rounding() -> None:
    made = task(model=lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)))
    runs = [gm.train(made, optimizer="sgd", steps=5, slices=slices) for slices in (None, 1, 4)]
    for run in runs[1:]:
        torch.testing.assert_close(run.model.state_dict(), runs[0].model.state_dict(), rtol=1e-5, atol=1e-6)
        assert run.metrics["loss"] == pytest.approx(runs[0].metrics["loss"], rel=1e-5)


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    output = model(batch[0])
    return nn.functional.cross_entropy(output @ output.T, torch.arange(len(output)))


def test_what_slices_cannot_take() -> None:
    with pytest.raises(UnsupportedError, match="is not the sum over its rows"):
        gm.train(task(objective=contrastive), steps=2, slices=4)
    normed = lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))  # noqa: E731
    with pytest.raises(UnsupportedError, match="BatchNorm1d, whose statistics would be those of a slice"):
        gm.train(task(model=normed), steps=2, slices=2)
    wrongs: list[Any] = [0, -1, 1.5, True, "4", 10**6]
    for wrong in wrongs:
        with pytest.raises(InputError, match="slices"):
            gm.train(task(), steps=2, slices=wrong)


class Spectral(nn.Sequential):
    """Whose power iteration is in buffers."""

    def __init__(self) -> None:
        super().__init__(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Linear(8, 2))


def test_buffers_that_passes_change_are_told() -> None:
    with pytest.warns(GramianWarning, match=r"changes buffers, 0\.parametrizations\.weight\.0\._u, .* not the same"):
        gm.train(task(model=Spectral), optimizer="sgd", steps=2, slices=2)


def test_clipping_counts_imaginary_parts() -> None:
    grads = [torch.tensor([3.0, 0.0]), torch.tensor([4.0j])]
    clip_(grads, 1.0, divided=False)
    assert grads[1].imag.item() == pytest.approx(0.8, rel=1e-5)


def uneven() -> str:
    try:
        gm.train(task(), steps=2, slices=3)
    except InputError as error:
        return str(error)
    return ""


def test_ranks_take_equally_many() -> None:
    for told in run_on_ranks(uneven, 2):
        assert "3 slices of a batch cannot be shared out evenly over 2 ranks" in told
