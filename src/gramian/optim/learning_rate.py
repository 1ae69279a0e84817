"""A suggested learning rate, with the measurements behind it."""

from __future__ import annotations

import html
from dataclasses import dataclass

from gramian.rows import Rows

__all__ = ["LearningRate"]


@dataclass(frozen=True)
class LearningRate:
    """A suggested rate, and the measurements behind it.

    Args:
        lr: the suggestion.
        start: the rate from which the search started: the optimizer's usual one, or one by the size of its first step.
        top: the largest rate whose rehearsal gains nearly as much as the best.
        range: the rates whose rehearsal gained at least half as much as the best one, and the suggestion.
        before: the held-out loss at which all rehearsals start.
        rehearsed: pairs of a rehearsed rate and the held-out loss after it, in order of the rate.
        why: how `lr` was found, in words.
    """

    lr: float
    start: float
    top: float
    range: tuple[float, float]
    before: float
    rehearsed: tuple[tuple[float, float], ...]
    why: str

    def __repr__(self) -> str:
        return f"<LearningRate: {self}>"

    def _repr_html_(self) -> str:
        rows = Rows({"rate": rate, "held-out loss": loss} for rate, loss in self.rehearsed)
        return f"<p>{html.escape(str(self))} It starts at a loss of {self.before:.4g}.</p>{rows._repr_html_()}"

    def __str__(self) -> str:
        low, high = self.range
        return f"lr = {self.lr:.2g} (between {low:.2g} and {high:.2g}): {self.why}"
