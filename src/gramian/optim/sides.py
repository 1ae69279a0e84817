"""Which sides of a matrix have a preconditioner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from gramian.errors import InputError

__all__ = ["REFRESH", "Sides", "check_sides", "sides_of"]

Sides = Literal["auto", "both", "small"]

REFRESH = 10  # steps between two eigendecompositions of a side, where nothing else is asked

SQUARE = 2.0  # aspect ratio below which both sides are worth their products


def check_sides(name: str, sides: str) -> None:
    """Raises for another word."""
    if sides not in ("auto", "both", "small"):
        raise InputError(f"{name}: sides must be 'auto', 'both' or 'small', got {sides!r}")


def sides_of(shape: Sequence[int], sides: Sides) -> list[tuple[str, int]]:
    """`"left"` (rows), `"right"` (columns), or both, each with its size.

    >>> sides_of((4, 64, 16), "auto"), sides_of((16, 16), "auto")
    ([('right', 16)], [('left', 16), ('right', 16)])
    """
    rows, columns = shape[-2:]
    both = [("left", rows), ("right", columns)]
    if sides == "both" or (sides == "auto" and max(rows, columns) < SQUARE * min(rows, columns)):
        return both
    return both[:1] if rows <= columns else both[1:]
