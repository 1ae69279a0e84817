"""What a rate makes of weights that were in order: what is found of their sizes afterwards follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace

from gramian.inspection.causes.folding import DRIVEN, SYMPTOMS, following, ordered
from gramian.report import Finding

__all__ = ["SWOLLEN", "Driven"]

# Times its first norm, to which the median matrix has grown where it has grown too far.
SWOLLEN = 10.0

_RATES = ("rate-grows", "rate-too-high")
# What is found of weights of a wrong size, and of what they make of the signal.
_SIZES = DRIVEN | SYMPTOMS | {"gate-shut"}
# What follows only where the weights are far larger than they were: there are other causes of numbers that are lost.
_LOST = frozenset(("loss-non-finite", "gradient-overflow", "non-finite-weights"))


class Driven:
    """Orders what looks find, and links to a rate that is too large what it has made of weights that were in order.

    Args:
        growth: the times its first norm that the median matrix has now; infinite where one is not finite.
    """

    def __init__(self, growth: Callable[[], float]) -> None:
        self._growth = growth
        self._first: frozenset[str] | None = None  # codes of the first look, without remarks
        self._was_in_order = False
        self._root: Finding | None = None  # that the rate is too large, or what this follows from

    def begin(self, found: Collection[Finding]) -> None:
        """Notes what the first look found before any step; later calls do nothing."""
        if self._first is None:
            self._first = frozenset(f.code for f in found if f.severity != "info")
            self._was_in_order = not any(f.severity == "error" and f.code in _SIZES for f in found)

    def ordered(self, found: Collection[Finding]) -> list[Finding]:
        """The findings of a look as `causes.ordered` orders them, none with an action that asks for batches."""
        later = [f for f in found if self._is_later(f)]
        rest = ordered(f for f in found if f not in later)
        by_code = {f.code: f for f in rest}
        rate = next((by_code[code] for code in _RATES if code in by_code), None)
        if rate is not None:
            self._root = self._root or by_code.get(rate.follows, rate)
        if later:
            growth = self._growth()
            rest = ordered([*(rest if self._root else found), *(self._linked(f, growth) for f in later)])
        return [_without_batches(f) for f in rest]

    def _is_later(self, finding: Finding) -> bool:
        is_new = self._first is not None and finding.code not in self._first
        return self._was_in_order and is_new and finding.code in _SIZES | _LOST

    def _linked(self, finding: Finding, growth: float) -> Finding:
        is_lost, is_told = finding.code in _LOST, finding.severity == "info"
        if (is_lost and growth <= SWOLLEN) or (self._root is None and (is_lost or is_told)):
            return finding
        has = "has" if growth < 1.0 else "has grown to"
        now = f"the median matrix {has} {growth:.3g} times its norm" if growth < math.inf else "weights are not finite"
        found = replace(finding, cause=f"The weights were in order when the watch began. After these steps {now}.")
        if self._root is not None:
            return following(found, self._root)
        advice = "Lower the rate, and go back to an earlier checkpoint, if the loss does not fall."
        return replace(found, action=None, advice=advice)


def _without_batches(finding: Finding) -> Finding:
    """The finding, with an action as advice that would need batches, which no watch is given."""
    if finding.action is None or "batches" not in finding.action.code:
        return finding
    told = "Before training, draw the weights by gm.init.isometric_(model, batch), with a batch of yours."
    return replace(finding, action=None, advice=f"{told}\n{finding.advice}" if finding.advice else told)
