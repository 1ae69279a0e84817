"""Large matrices, cut into parts of a few rows (or columns)."""

from __future__ import annotations

import math
from dataclasses import replace

from gramian.block import Layout

__all__ = ["in_parts"]

PART = "part"  # the name of the axis that numbers the parts


def in_parts(layout: Layout, size: int | None) -> Layout:
    """The layout with the smaller side of each matrix cut into equal parts of at most `size` rows (or columns).

    The first axis of that side is divided by its least divisor that makes the parts small enough. Where that would make
    them smaller than a quarter of `size`, the matrix stays whole.

    >>> in_parts(Layout("o i -> o i", (1000, 784)), 256).matrices
    (4, 1000, 196)
    >>> in_parts(Layout("(three o) i -> three o i", (24, 8)), 4).matrices
    (3, 2, 4, 8)
    """
    *_, m, n = layout.matrices
    small = min(m, n)
    if size is None or small <= size:
        return layout
    leading, rows, columns = layout.sides
    side = rows if m <= n else columns
    length = layout.axes[side[0]]
    counts = [c for c in range(math.ceil(small / size), length + 1) if length % c == 0 and small // c >= size / 4]
    if not counts:
        return layout
    dims = [sum(((PART, name) if name == side[0] else (name,) for name in names), ()) for names in layout.dims]
    left = " ".join(map(_group, dims))
    right = " ".join([*leading, PART, _group(rows), _group(columns)])
    cut = f"{left} -> {right}"
    sizes = {**layout.sizes, side[0]: length // counts[0], PART: counts[0]}
    return replace(layout, pattern=cut, sizes=sizes, parts=(), rows=())


def _group(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"({' '.join(names)})"
