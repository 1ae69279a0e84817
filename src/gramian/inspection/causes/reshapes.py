"""Causes in how axes are arranged: reshapes that mix what a transpose would keep apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gramian.inspection.causes.context import Context
from gramian.report import Finding

__all__ = ["RULES"]


def swapped(context: Context) -> Iterator[Finding]:
    """Find reshapes that give an axis another place. The shapes are exact; that it is not meant, is a heuristic."""
    found = context.probes.recut
    if found is None:
        return
    where = (found.name or "all layers") if found.is_inside else "loss"
    place = context.told(found.name) if found.is_inside else "the loss"
    yield Finding(
        "axes-swapped",
        "error",
        f"A reshape in {place} gives the axis of {found.length} another place, which mixes its entries",
        where=where,
        evidence=f"of 7 samples, {found.before} becomes {found.after} (exact)",
        cause="A reshape keeps the order of the numbers in memory and only cuts it anew: an index of the axis of "
        f"{found.length} now holds values of several. To change the places of axes takes a transpose.",
        advice="Use transpose or permute, and reshape only to split an axis or to join neighbors: "
        "x.view(batch, time, heads, width).transpose(1, 2), x.flatten(2).transpose(1, 2), F.pixel_shuffle(x, 2).",
    )


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (swapped,)
