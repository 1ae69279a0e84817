"""Journal: which parts of a model in shards are done, so that a run that was stopped goes on after them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from gramian.checkpoint import load_tree, save_tree
from gramian.compression.budget.weighted import WeightedSVD
from gramian.compression.sharded.spool import JOURNAL, Spool
from gramian.compression.storage.plans import packed, unpacked
from gramian.durations import in_words
from gramian.errors import CheckpointError

__all__ = ["Journal", "Remaining"]


@dataclass
class Journal:
    """What is done, beside the factors and gradients that are in the spool.

    Args:
        of: what a run has to have in common with the one that wrote it: numbers, text, and lists and dicts of these.
        parts: that are done.
        spectra: of their layers, without factors.
        reasons: why layers have none.
        judged: what the first part showed of the data: notes, whether layers are ranked, and whether G is left out.
    """

    of: Any
    parts: list[str] = field(default_factory=list)
    spectra: dict[str, WeightedSVD] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    judged: tuple[list[str], bool, bool] | None = None

    @classmethod
    def found(cls, spool: Spool, of: Any) -> Journal:
        """The journal in a spool; a new one where there is none, or one of another run.

        Args:
            spool: where it may be.
            of: as there; losses in it tell the weights, the data and the objective.
        """
        try:
            tree = unpacked(load_tree(spool.path(JOURNAL)))
            if tree["of"] == of:
                spectra = {name: _in_shape(*one) for name, one in tree["spectra"].items()}
                return cls(of, tree["parts"], spectra, tree["reasons"], tree["judged"])
        except (CheckpointError, KeyError, TypeError):  # none, or that of another version
            pass
        spool.drop(JOURNAL)  # before anything that it tells of is written over
        return cls(of)

    def save(self, spool: Spool) -> None:
        """Writes it, in place of what was there."""
        empty = torch.empty(0)
        spectra = {
            name: (replace(s, left=empty, right=empty, moments=empty), s.shape) for name, s in self.spectra.items()
        }
        save_tree(spool.path(JOURNAL), packed(vars(self) | {"spectra": spectra}))


def _in_shape(s: WeightedSVD, shape: tuple[int, int]) -> WeightedSVD:
    """A decomposition with factors without values."""
    num = len(s.values)
    sizes = {"left": (shape[0], num), "right": (num, shape[1]), "moments": (num,)}
    return replace(s, **{name: torch.empty(size, device="meta") for name, size in sizes.items()})  # type: ignore[arg-type]


class Remaining:
    """How long layers will take yet, from how long those before them took, and what lay between their parts.

    Args:
        costs: of each layer, in any unit.
        parts: that these are of.
    """

    def __init__(self, costs: Mapping[str, int], parts: int) -> None:
        self.costs, self.done, self.total = dict(costs), 0, sum(costs.values())
        self.parts, self.begun = parts, 0
        self.between = self.layers = 0.0
        self.last = time.monotonic()

    def begin(self) -> None:
        """A part's layers come next."""
        self.between += self._passed()
        self.begun += 1

    def after(self, name: str) -> tuple[float, str]:
        """The share that is done with one more layer, and how long the rest takes, in words."""
        self.layers += self._passed()
        self.done += self.costs.pop(name)
        left = self.layers * sum(self.costs.values()) / self.done
        left += self.between * (self.parts - self.begun) / max(self.begun, 1)
        return self.done / self.total, in_words(left)

    def _passed(self) -> float:
        before, self.last = self.last, time.monotonic()
        return self.last - before
