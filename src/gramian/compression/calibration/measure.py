"""Measure: the batches that tell how much worse a smaller model is, and what is known of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from gramian.objective import Objective

__all__ = ["Measure"]

REMEMBERED = 2**24
"""Numbers of the model's outputs that are kept while smaller models are compared with them."""


@dataclass
class Measure:
    """What tells how much worse a smaller model is: batches that the statistics have not seen, and a loss.

    Args:
        batches: as they came.
        objective: whose mean loss rises.
        seen: whether the statistics are of the same batches, since there were no others.
        more: batches that the statistics have seen, for more labels.
        new: whether the model was not trained on them, as its user says.
        trained_on: how many samples the model was trained on, these among them; `None` where nothing follows from it.
        assumed: whether nobody said so, and it is the number of samples that were given.
    """

    batches: list[Any]
    objective: Objective
    seen: bool = False
    more: list[Any] = field(default_factory=list)
    new: bool = False
    trained_on: int | None = None
    assumed: bool = False

    def assuming(self, samples: float) -> Measure:
        """The same, as if the model was trained on the samples that were given, where nobody says on how many.

        On new data that costs nothing: what the gradients of their folds agree on is then all of what the labels add.

        Args:
            samples: how many different ones; 0 where that is not known.
        """
        labels = self.objective.divergence is not None and self.objective.against is None
        if self.new or self.trained_on is not None or not labels or not samples:
            return self
        return replace(self, trained_on=max(round(samples), 1), assumed=True)

    def against(self, model: nn.Module) -> Measure:
        """The same, where the targets are the outputs of a model, with those of this one, which does not change."""
        if self.objective.against is None:
            return self
        return replace(self, objective=self.objective.against(model, remember=REMEMBERED))
