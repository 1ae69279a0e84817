"""Which axes of a block's layout the inputs of a use run along, and which its outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gramian.block import Block, Layout
from gramian.gram import At
from gramian.recording.form import Form

__all__ = ["BlockView", "Side", "sides_of", "view_of"]


@dataclass(frozen=True)
class BlockView:
    """What a tensor holds of a block: its dimensions, as those of the block's parameter, and which matrices.

    `part` lists the matrices by their index along the first axis, or is `None` for all. A dimension `None` is none of
    the parameter's: of size one, or the first of a weight that was repeated along it (`expand`). `index` (S,) says that
    the first dimension numbers matrices that were selected from the block's by it, as `experts[chosen]` does.
    """

    block: Block
    dims: tuple[int | None, ...]
    part: tuple[int, ...] | None = None
    index: Tensor | None = None


@dataclass(frozen=True)
class Side:
    """One side of a use, inputs or outputs: the axes of its rows, and how to make the matrices' vectors of them.

    `names` and `sizes` are the axes of a row, in order. `leading` are those that number the matrices, with sizes
    `batch`; `vector` those that form the vectors, of length `dim`. `along_rows` says that the vectors run along the
    matrices' rows. Where the weight was a part of its block, `at` says which entries of the batch the vectors are of.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    leading: tuple[str, ...]
    vector: tuple[str, ...]
    batch: tuple[int, ...]
    dim: int
    along_rows: bool
    at: At | None = None

    @property
    def key(self) -> tuple:
        """Equal for two sides whose rows are arranged in the same way."""
        return self.names, self.sizes, self.leading, self.vector

    def arrange(self, rows: Tensor) -> Tensor:
        """Rows (R, D) as (*batch, R, dim)."""
        if not self.leading and self.names == self.vector:
            return rows
        present = [name for name in self.leading if name in self.names]
        order = [self.names.index(name) + 1 for name in present]
        vector = [self.names.index(name) + 1 for name in self.vector]
        num = len(rows)
        rows = rows.reshape(num, *self.sizes).permute(*order, 0, *vector)
        rows = rows.reshape(*(self.sizes[i - 1] for i in order), num, self.dim)
        if self.at is not None and len(present) < len(self.leading):
            rows = rows.unsqueeze(self.at.axis)
            shape = list(rows.shape)
            shape[self.at.axis] = len(self.at.index)
            rows = rows.expand(shape)
        return rows


def view_of(tensor: Tensor, base: Tensor, whole: BlockView) -> BlockView | None:
    """What a view of a weight holds: all of it, its dimensions in any order, or some of its matrices; or `None`."""
    if tensor.is_sparse or base.ndim != len(whole.dims):
        return None
    free, dims = list(range(base.ndim)), []
    for place, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        fits = [d for d in free if base.stride(d) == stride and (base.shape[d] == size or (d == 0 and size > 0))]
        fits.sort(key=lambda d: base.shape[d] != size)
        if fits:
            dims.append(fits[0])
            free.remove(fits[0])
        elif size == 1 or (stride == 0 and place == 0):  # of no dimension of the weight: unsqueezed, or repeated
            dims.append(None)
        else:
            return None
    if whole.index is None:  # dimensions of size one that were squeezed
        free = [d for d in free if d == 0 or base.shape[d] != 1]
    start, rest = divmod(int(tensor.storage_offset() - base.storage_offset()), int(base.stride(0)) or 1)
    num = tensor.shape[dims.index(0)] if 0 in dims else 1
    own = tuple(None if d is None else whole.dims[d] for d in dims)
    if not free and num == base.shape[0] and start == rest == 0:
        return BlockView(whole.block, own, whole.part, whole.index)
    if rest or free not in ([], [0]) or whole.part is not None or whole.index is not None or whole.dims[0] != 0:
        return None
    layout = whole.block.layout
    axis = layout.dims[0][0] if layout.dims[0] else ""
    if axis not in layout.sides[0] or (free and len(layout.dims[0]) > 1):
        return None
    step = base.shape[0] // layout.axes[axis]
    if start % step or num % step:
        return None
    return BlockView(whole.block, own, tuple(range(start // step, (start + num) // step)))


def sides_of(form: Form, view: BlockView) -> tuple[Side, Side] | None:
    """The input and the output side of a use of a block; `None` where an axis of its layout belongs to both."""
    layout = view.block.layout
    _, rows, columns = layout.sides
    names: list[tuple[str, ...]] = [() if d is None else layout.dims[d] for d in view.dims]
    inside = [name for d in form.in_dims for name in names[d]]
    outside = [name for d in form.out_dims for name in names[d]]
    if form.groups > 1:
        group = names[0][0]
        if layout.axes[group] != form.groups:
            return None
        if 0 in form.in_dims:
            outside.insert(0, group)
        else:
            inside.insert(0, group)
    gone = {name for name, size in layout.axes.items() if size == 1} - set(inside) - set(outside)  # squeezed
    rows, columns = (tuple(name for name in side if name not in gone) for side in (rows, columns))
    for transposed, entering, leaving in ((False, columns, rows), (True, rows, columns)):
        if _takes(layout, inside, entering) and _takes(layout, outside, leaving):
            if form.onehot and tuple(inside) != entering:
                return None
            part = view.part
            return (
                _side(layout, inside, entering, part, along_rows=transposed),
                _side(layout, outside, leaving, part, along_rows=not transposed),
            )
    return None


def _takes(layout: Layout, names: Sequence[str], vector: Sequence[str]) -> bool:
    """Whether a side with axes `names` has vectors along `vector`, and its other axes only number the matrices."""
    return set(vector) <= set(names) <= set(vector) | set(layout.sides[0])


def _side(
    layout: Layout, names: Sequence[str], vector: tuple[str, ...], part: tuple[int, ...] | None, *, along_rows: bool
) -> Side:
    sizes = dict(layout.axes)
    split = layout.dims[0][0] if part is not None else None
    leading = tuple(name for name in layout.sides[0] if name in names or name == split)
    batch = tuple(sizes[name] for name in leading)
    at = None
    if part is not None and split is not None:
        at = At(leading.index(split), part)
        sizes[split] = len(part)
    dim = math.prod(sizes[name] for name in vector)
    return Side(tuple(names), tuple(sizes[name] for name in names), leading, vector, batch, dim, along_rows, at)
