"""Whether a training went better with a remedy than without: judgments of pairs of losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, pstdev

from gramian.remedies.rehearsing import Rehearsed
from gramian.report import Rehearsal

__all__ = ["is_as_low", "is_higher", "is_lower", "is_no_worse", "learns", "why_not"]

# A remedy helps if it lowers the loss by this share of it, in each pair of rehearsals that have the same seed.
SHARE = 0.05

# A loss counts as below that without inputs from this share of it on.
BEYOND = 0.01


def is_lower(pairs: Sequence[tuple[float, float]]) -> bool:
    """Whether the loss is clearly lower with the remedy, in every pair of rehearsals of one seed."""
    return all(
        math.isfinite(now) and (math.isinf(before) or now < before - SHARE * abs(before)) for before, now in pairs
    )


def learns(before: Rehearsed, after: Rehearsed) -> bool:
    """Whether what is lower than a loss that blew up is any good.

    Where the training without the remedy fails, or ends above what the one with it reaches without looking at its
    inputs, any loss is lower. Then the remedied training has to end below that plain loss, or still fall clearly from
    one moment to the next.
    """
    last = after[-1]
    if not math.isfinite(last):
        return False
    if before[-1] <= after.plain and math.isfinite(before[-1]):
        return True
    falls = len(after) < 2 or last < after[-2] - SHARE * abs(after[-2])
    return falls or (math.isfinite(after.plain) and last < after.plain - BEYOND * abs(after.plain))


def is_no_worse(pairs: Sequence[tuple[float, float]], first: Sequence[float]) -> bool:
    """Whether the loss falls as far with the remedy as without, up to a share of the first loss."""
    return all(
        math.isfinite(now) and now <= before + SHARE * abs(start)
        for (before, now), start in zip(pairs, first, strict=True)
    )


def is_as_low(pairs: Sequence[tuple[float, float]]) -> bool:
    """Whether the mean loss is not higher with it, up to how much the losses of one training differ between seeds."""
    if not all(math.isfinite(loss) for pair in pairs for loss in pair):
        return False
    before, now = zip(*pairs, strict=True)
    return fmean(now) <= fmean(before) + max(pstdev(before), pstdev(now))


def is_higher(pairs: Sequence[tuple[float, float]]) -> bool:
    """Whether the mean loss is clearly higher with it."""
    before, now = (fmean(losses) for losses in zip(*pairs, strict=True))
    return not now <= before + SHARE * abs(before)


def why_not(shown: Rehearsal, *, helps: bool, learns: bool, is_higher: bool) -> str:
    """Why what was seen is not enough to offer the action."""
    if helps:
        return "the loss is lower with it, but it does not remove what was found"
    if not math.isfinite(shown.after):
        return "training fails with it"
    if is_higher:
        return "the loss is higher with it than without"
    if not learns:
        return "the loss blows up without it, and with it nothing is learned"
    if shown.after < shown.before - max(shown.before_spread, shown.after_spread):
        return "the loss is a little lower with it, too little to tell"
    return "training without it comes as far"
