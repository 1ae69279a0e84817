"""Which sides of a matrix have a preconditioner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from gramian.optim.options import one_of

__all__ = ["REFRESH", "SIDES", "Sides", "preconditioned_sides"]

Sides = Literal["auto", "both", "small"]
SIDES = one_of("auto", "both", "small")

REFRESH = 10  # steps between two eigendecompositions or inverse roots of a side, by default

SQUARE = 2.0  # aspect ratio below which both sides are worth the cost of their products


def preconditioned_sides(shape: Sequence[int], sides: Sides) -> list[tuple[str, int]]:
    """`"left"` (rows), `"right"` (columns), or both, each with its size.

    >>> preconditioned_sides((4, 64, 16), "auto"), preconditioned_sides((16, 16), "auto")
    ([('right', 16)], [('left', 16), ('right', 16)])
    """
    rows, columns = shape[-2:]
    both = [("left", rows), ("right", columns)]
    if sides == "both" or (sides == "auto" and max(rows, columns) < SQUARE * min(rows, columns)):
        return both
    return both[:1] if rows <= columns else both[1:]
