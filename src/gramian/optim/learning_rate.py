"""A suggested learning rate, with the measurements behind it."""

from __future__ import annotations

import html
from dataclasses import dataclass

from gramian.operators import LineCurvature
from gramian.rows import Rows

__all__ = ["LearningRate"]


@dataclass(frozen=True)
class LearningRate:
    """A suggested rate, and the measurements behind it.

    Args:
        lr: the suggestion.
        line: η*, where the parabola along the first direction is lowest on the held-out batch.
        curvature: that parabola.
        range: the rates whose rehearsal gained at least half as much as the best one.
        before: the held-out loss at which all rehearsals start.
        rehearsed: pairs of a rehearsed rate and the held-out loss after it, in order of the rate.
        why: how `lr` was found, in words.
    """

    lr: float
    line: float
    curvature: LineCurvature
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
