"""What a case hands to a diagnoser: a model, its batches, its loss and its optimizer, as a user would have them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gramian.objective import Objective, as_objective

__all__ = ["Draw", "Setup", "Truth"]

T = TypeVar("T")
Batch = tuple[Tensor, Tensor]

GLOBAL_PLACES = ("data", "labels", "loss", "optimizer", "all layers")
"""Places that are no module or parameter."""


class Draw:
    """Random choices that depend on a key alone, never on global random state.

    Args:
        key: any text, such as `"constant-layer/mlp/0"`.
    """

    def __init__(self, key: str) -> None:
        self.seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")
        self._random = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)

    def choice(self, of: Sequence[T]) -> T:
        """One of them, each equally likely."""
        return self._random.choice(of)

    def uniform(self, low: float, high: float) -> float:
        """A number between the two."""
        return self._random.uniform(low, high)

    def power(self, low: float, high: float) -> float:
        """Ten to a power between the two."""
        return 10 ** self._random.uniform(low, high)

    def normal(self, *shape: int) -> Tensor:
        """Independent standard normal numbers."""
        return torch.randn(*shape, generator=self.generator)


@dataclass(frozen=True)
class Truth:
    """What is wrong with a case.

    Args:
        kind: of the fault.
        causes: the codes that name the cause; each of them is right.
        places: parameters, modules, or words of `GLOBAL_PLACES`; each of them is right.
        consequences: codes of what the fault makes true elsewhere. They are neither right nor misleading.
        strength: what was drawn, for people.
    """

    kind: str
    causes: frozenset[str]
    places: tuple[str, ...]
    consequences: frozenset[str] = frozenset()
    strength: str = ""


@dataclass
class Setup:
    """A training run before its first step.

    `model` is in the mode in which its owner trains it. `train` never changes the mode.

    Args:
        model: the network.
        batches: what it is trained on, in turn: pairs of inputs and labels.
        objective: `gm.Objective`, or a plain `loss(model, batch) -> scalar mean`.
        optimizer: made on the model, as its owner made it.
        held_out: batches that `score` predicts.
        seed: of dropout in `train`.
        outputs: `outputs(model, batch) -> scores`, whose largest is the prediction.
    """

    model: nn.Module
    batches: list[Batch]
    objective: Objective | Callable[[nn.Module, Any], Tensor]
    optimizer: torch.optim.Optimizer
    held_out: list[Batch]
    seed: int
    outputs: Callable[[nn.Module, Batch], Tensor] = lambda model, batch: model(batch[0])

    def train(self, steps: int) -> list[float]:
        """Train for so many steps, the batches in turn, and return the loss of each step."""
        objective, losses = as_objective(self.objective), []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for step in range(steps):
                self.optimizer.zero_grad()
                total, units = objective.loss(self.model, self.batches[step % len(self.batches)])
                loss = total / units
                loss.backward()
                self.optimizer.step()
                losses.append(float(loss.detach()))
        return losses

    def score(self) -> float:
        """Return the share of held-out labels that the model predicts in evaluation mode."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.no_grad():
                found = [(self.outputs(self.model, batch).argmax(-1) == batch[1]).float() for batch in self.held_out]
        finally:
            for module, mode in modes.items():
                module.training = mode
        return float(torch.cat([right.flatten() for right in found]).mean())

    @property
    def chance(self) -> float:
        """The share of held-out labels that always predicting the commonest one gets right."""
        labels = torch.cat([batch[1].flatten() for batch in self.held_out])
        return float(labels.bincount().max()) / labels.numel()
