"""Weights that are put together before they are used: a product with `cat([w1, w2])` is a product with each part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gramian.recording.form import Form
from gramian.recording.layout_sides import BlockView

__all__ = ["JOINS", "Joined", "joined", "of_view", "uses_of_parts"]

JOINS: dict[Callable, Callable[[int], int]] = {
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate, torch.stack), lambda dim: dim),
    **dict.fromkeys((torch.vstack, torch.row_stack), lambda dim: 0),
    **dict.fromkeys((torch.hstack, torch.column_stack), lambda dim: 1),
}
"""The functions that put tensors of two dimensions or more together, and along which dimension, given `dim`."""


@dataclass(frozen=True)
class Joined:
    """A tensor made of parts that lie one after the other along a dimension; a part that is no weight has no view."""

    tensor: Tensor
    dim: int
    parts: tuple[tuple[int, BlockView | None], ...]
    name: str

    def views(self) -> Iterator[tuple[int, int, BlockView]]:
        """The start, the size and the view of each part that is a weight."""
        start = 0
        for size, view in self.parts:
            if view is not None:
                yield start, size, view
            start += size


def joined(
    func: Callable, name: str, args: tuple, kwargs: Any, resolve: Callable[[Any], BlockView | None], made: Tensor
) -> Joined | None:
    """What a call of a function in `JOINS` has put together; `None` where no part is a whole weight."""
    tensors = args[0] if args else kwargs.get("tensors", ())
    dim = JOINS[func](kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))) % made.ndim
    views = [resolve(t) for t in tensors]
    if all(view is None for view in views) or any(t.ndim < 2 for t in tensors):
        return None
    if func is torch.stack:  # a dimension of its own numbers the parts
        views = [v and replace(v, dims=(*v.dims[:dim], None, *v.dims[dim:])) for v in views]
        sizes = [1] * len(views)
    else:
        sizes = [t.shape[dim] for t in tensors]
    views = [None if v is None or v.index is not None else v for v in views]
    return Joined(made, dim, tuple(zip(sizes, views, strict=True)), name)


def of_view(tensor: Tensor, whole: Joined) -> Joined | None:
    """The same with its dimensions in another order, as `.T` gives them; `None` for another view, such as a slice."""
    base = whole.tensor
    if tensor.ndim != base.ndim or tensor.numel() != base.numel():
        return None
    order, free = [], list(range(base.ndim))
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found = next((d for d in free if (base.shape[d], base.stride(d)) == (size, stride)), None)
        if found is None:
            return None
        order.append(found)
        free.remove(found)
    parts = tuple((size, v and replace(v, dims=tuple(v.dims[d] for d in order))) for size, v in whole.parts)
    return Joined(tensor, order.index(whole.dim), parts, whole.name)


def uses_of_parts(form: Form, whole: Joined) -> list[tuple[Form, BlockView]]:
    """The uses of the parts of a weight in a product with the whole.

    Along the outputs' dimensions each part has all inputs and its rows of the gradient; along the inputs' dimensions it
    has its own features and the whole gradient. There are none where the rows belong to parts by their number.
    """
    dim = whole.dim
    inside, outside = dim in form.in_dims, dim in form.out_dims
    if form.groups > 1 or form.owners is not None or (form.onehot and inside) or not (inside or outside):
        return []
    found = []
    for start, size, view in whole.views():
        with torch._C.DisableTorchFunction():
            weight = form.weight.detach().narrow(dim, start, size)
        into = _cut(form.weight, form.in_dims, dim, start, size) if inside else None
        out = _cut(form.weight, form.out_dims, dim, start, size) if outside else None
        found.append((_part(form, weight, into, out), view))
    return found


def _part(form: Form, weight: Tensor, into: Any, out: Any) -> Form:
    return replace(
        form,
        weight=weight,
        inputs=form.inputs if into is None else lambda mask: map(into, form.inputs(mask)),
        outputs=form.outputs if out is None else lambda grad: out(form.outputs(grad)),
        moment=form.moment if into is None else None,
        source=form.source if into is None else weight,  # cut inputs share no sums with other uses of the source
    )


def _cut(weight: Tensor, dims: tuple[int, ...], dim: int, start: int, size: int) -> Callable[[Tensor], Tensor]:
    """Rows that run over `dims` of the whole weight, cut to a part along one of them."""
    sizes, place = [weight.shape[d] for d in dims], dims.index(dim)
    return lambda rows: rows.reshape(len(rows), *sizes).narrow(place + 1, start, size).flatten(1)
