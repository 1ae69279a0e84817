"""A forward pass that fails is told in one line that names the layer, whichever function runs it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import gramian as gm
from gramian.errors import InputError

LOSS = gm.Objective.regression()


def network(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def batches(width: int) -> list:
    return [(torch.randn(16, width), torch.randn(16, 2)) for _ in range(4)]


CALLS: dict[str, Callable[[], object]] = {
    "capture": lambda: gm.capture(network(), batches(3), LOSS),
    "capture in compress": lambda: gm.compress(network(), batches(3), LOSS),
    "isometric_": lambda: gm.init.isometric_(network(), batches(3)[0]),
    "heal": lambda: gm.heal(network(), network(3), batches(4), LOSS, steps=1),
    "suggest_lr": lambda: gm.suggest_lr(network(), batches(3), LOSS, optimizer="adamw"),
    "inspect": lambda: gm.inspect(network(), batches(3), LOSS),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_layer_and_its_input_are_named(name: str) -> None:
    told, wanted = (4, 3) if name == "heal" else (3, 4)
    line = rf"{name.split()[0]}: 0 \(Linear\) got a tensor of shape \(\d+, {told}\) and wants {wanted} features"
    with pytest.raises(InputError, match=line):
        CALLS[name]()


def test_an_error_outside_of_the_layers_stays_as_it_is() -> None:
    def loss(model: nn.Module, batch: tuple) -> torch.Tensor:
        model(batch[0])
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        gm.capture(network(), batches(4), loss)


def test_a_class_of_optimizers_is_answered_by_the_line_to_write() -> None:
    for kind, line in (
        (torch.optim.SGD, r"torch\.optim\.SGD\(model\.parameters\(\)"),
        (gm.optim.Muon, r"gm\.optim\.Muon\(model,"),
    ):
        with pytest.raises(InputError, match=f"Write optimizer={line}"):
            gm.inspect(network(), batches(4), LOSS, optimizer=kind)
