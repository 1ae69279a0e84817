"""Uses of a stack of matrices in which each row belongs to one of them: a use for each matrix that has rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from gramian.recording.form import Form
from gramian.recording.layout_sides import BlockView

__all__ = ["uses_of"]

Use = tuple[Form, BlockView]


def uses_of(form: Form, view: BlockView) -> list[Use]:
    """The use itself; of a stack whose rows have owners, a use of each matrix; none where the two do not go together.

    Experts are such stacks: `grouped_mm` gives the owner of each row, and `bmm` with `experts[chosen]` multiplies each
    row by a matrix of its own. Where a single matrix was repeated along the first dimension, it owns all rows.
    """
    if form.owners is not None:
        return _by_owner(form, view, form.owners)
    repeated = bool(view.dims) and view.dims[0] is None and len(form.weight) > 1
    if view.index is None and not repeated:
        return [(form, view)]
    if form.in_dims[:1] != (0,) or form.out_dims[:1] != (0,):  # rows that all matrices share
        return []
    form = _apart(form)
    if view.index is None:
        return [(form, view)]
    num = sum(len(rows) for rows in form.inputs(None))
    return _by_owner(form, view, view.index.repeat_interleave(num // len(view.index)))


def _apart(form: Form) -> Form:
    """The same rows with the first dimension of the weight along them: (R, S·D) as (S·R, D)."""
    num = len(form.weight)

    def apart(rows: Tensor) -> Tensor:
        return rows.reshape(len(rows), num, -1).transpose(0, 1).flatten(0, 1)

    return replace(
        form,
        inputs=lambda mask: map(apart, form.inputs(None)),
        outputs=lambda grad: apart(form.outputs(grad)),
        in_dims=form.in_dims[1:],
        out_dims=form.out_dims[1:],
    )


def _by_owner(form: Form, view: BlockView, owners: Tensor) -> list[Use]:
    first = view.block.layout.dims[0]
    if view.part is not None or not view.dims or view.dims[0] != 0 or len(first) != 1:
        return []
    if first[0] not in view.block.layout.sides[0]:  # the first dimension does not number matrices
        return []
    rows = torch.cat(list(form.inputs(None)))

    def of_one(e: int) -> Use:
        where = (owners == e).nonzero().flatten()

        def inputs(mask: Tensor | None) -> Iterator[Tensor]:
            known = mask is not None and mask.ndim == 1 and len(mask) == len(rows)
            yield rows[where[mask[where]]] if known else rows[where]  # pyright: ignore[reportOptionalSubscript]

        one = replace(
            form, inputs=inputs, outputs=lambda grad: form.outputs(grad)[where], owners=None, follows_mask=True
        )
        return one, replace(view, part=(e,), index=None)

    return [of_one(e) for e in owners.unique().tolist() if e >= 0]
