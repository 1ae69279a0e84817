"""Accumulation: the rows of each use of a weight are added to the second moments A and G of its site."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gramian.errors import ShapeError
from gramian.gram import At, DiagonalGram, Gram, Sums, sums
from gramian.recording.form import Form
from gramian.recording.layout_sides import Side
from gramian.recording.taps import Pass, in_backward
from gramian.site import Site

__all__ = ["Accumulator"]

# G's count is set at the end to all units of the loss (`Statistics.settle`), so its updates count nothing.
_NO_COUNT = 0.0

# Entries of rows from which on they are added to a diagonal at once, since calls cost more than copies below.
_FEW = 2**16


class _Buffer:
    """Rows on their way to a second moment: small batches of them (a recurrent step's) are added together."""

    def __init__(self, gram: Gram | DiagonalGram, count: float | None) -> None:
        self.gram, self.count = gram, count
        self.rows: list[Tensor] = []
        self.num = 0

    def add(self, rows: Tensor) -> None:
        enough = -(-_FEW // self.gram.dim) if isinstance(self.gram, DiagonalGram) else self.gram.dim
        if rows.shape[-2] >= enough:
            self.gram.update(rows, self.count)
            return
        if rows.shape[-1] != self.gram.dim:  # here, where the use is known, and not when the rows are added
            raise ShapeError(f"rows of {rows.shape[-1]} entries for a second moment of {self.gram.dim}")
        # A copy: rows may lie in a parameter's memory, which a step changes and FSDP2 frees when the layer is done.
        self.rows.append(rows.clone())
        self.num += rows.shape[-2]
        if self.num >= enough:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            self.gram.update(torch.cat(self.rows, -2), self.count)
            self.rows, self.num = [], 0


class Accumulator:
    """Adds rows to the sites' second moments: whole ones up to `max_dim`, beyond that their diagonals."""

    def __init__(self, max_dim: int, precision: str) -> None:
        self.max_dim, self.precision = max_dim, precision
        self.buffers: dict[int, _Buffer] = {}  # by the identity of the second moment
        self.latest: tuple[tuple, Sums, Tensor] | None = None
        self.flush_is_queued = False

    def add_inputs(self, site: Site, form: Form, side: Side, mask: Tensor | None) -> None:
        """Adds the input rows of a use to A, without those that the mask leaves out."""
        if site.A is None and form.onehot:
            site.A = DiagonalGram(side.dim, device=form.weight.device)
        site.A = site.A or self._moment(side, form.weight.device)
        if form.onehot:
            for index in form.inputs(mask):
                site.A.update(index)
            return
        if form.moment is not None and isinstance(site.A, Gram) and _is_whole(side):
            site.A.add(*form.moment())
            return
        if form.diagonals is not None and isinstance(site.A, DiagonalGram) and _is_whole(side):
            site.A.add(*form.diagonals(None))
            return
        # Projections of one tensor (queries, keys and values; gate and up) share its second moment.
        # Inference tensors have no version, and are not written to where their model may be differentiated.
        version = -1 if form.source.is_inference() else form.source._version
        key = (id(form.source), version, form.op, form.in_dims, side.key, side.at, type(site.A), id(mask))
        if self.latest is not None and self.latest[0] == key:
            site.A.add(*self.latest[1])
            return
        for rows in form.inputs(mask):
            rows = side.arrange(rows)
            if form.op != "linear" or isinstance(site.A, DiagonalGram) or rows.shape[-2] < side.dim or side.at:
                self._update(site.A, rows, None, side.at)
                continue
            # The source is kept too, so that no other tensor gets its id.
            self.latest = key, sums(rows, self.precision), form.source
            site.A.add(*self.latest[1])

    def add_gradients(self, site: Site, form: Form, side: Side, grad: Tensor, current: Pass) -> None:
        """Adds the rows of an output's gradient to G, divided by the pass's factor."""
        assert current.factor is not None
        site.G = site.G or self._moment(side, grad.device)
        if (
            form.diagonals is not None
            and isinstance(site.G, DiagonalGram)
            and _is_whole(side)
            and not current.skip_non_finite
        ):
            total, first, _, scale = form.diagonals(grad)
            unit = torch.as_tensor(1.0 / current.factor, dtype=torch.float64, device=first.device)
            site.G.add(total, first, _NO_COUNT, unit if scale is None else scale.double() * unit)
            return
        rows = form.outputs(grad)
        rows = side.arrange(rows if rows.dtype == torch.float64 else rows.float())
        if isinstance(site.G, DiagonalGram) or rows.shape[-2] < site.G.dim:
            rows = rows / current.factor
            if current.skip_non_finite:
                rows = torch.where(_overflows(site, site.G, side.at, current, rows), 0.0, rows)
            self._update(site.G, rows, _NO_COUNT, side.at)
            return
        # The sums are smaller than the rows, so the factor and the check for overflow are applied to them.
        total, first, _, scale = sums(rows, self.precision)
        if current.skip_non_finite:
            over = _overflows(site, site.G, side.at, current, first)
            total, first = torch.where(over, 0.0, total), torch.where(over, 0.0, first)
        unit = torch.as_tensor(1.0 / current.factor, dtype=torch.float64, device=first.device)
        site.G.add(total, first, _NO_COUNT, unit if scale is None else scale.double() * unit, side.at)

    def reset(self) -> None:
        """Forgets the sums that the uses of one forward pass share."""
        self.latest = None

    def flush(self) -> None:
        """Adds all buffered rows, so that the second moments are complete."""
        self.flush_is_queued = False
        for buffer in self.buffers.values():
            buffer.flush()

    def _update(self, gram: Gram | DiagonalGram, rows: Tensor, count: float | None, at: At | None) -> None:
        if at is not None:
            gram.update(rows, count, at)
            return
        buffer = self.buffers.get(id(gram))
        if buffer is None:
            buffer = self.buffers[id(gram)] = _Buffer(gram, count)
        buffer.add(rows)
        if in_backward() and not self.flush_is_queued:
            self.flush_is_queued = True
            _at_the_end_of_backward(self.flush)

    def _moment(self, side: Side, device: torch.device) -> Gram | DiagonalGram:
        kind = Gram if side.dim <= self.max_dim else DiagonalGram
        return kind(side.dim, side.batch, device=device)


def _is_whole(side: Side) -> bool:
    """Whether the rows are the vectors of one matrix, all of it."""
    return side.names == side.vector and not side.at


def _at_the_end_of_backward(callback: Any) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def _overflows(site: Site, gram: Gram | DiagonalGram, at: At | None, current: Pass, values: Tensor) -> Tensor:
    """Whether a scaled gradient has overflowed, so that a GradScaler skips it: then G gets neither it nor its units.

    Where a weight is used several times in a pass (recurrent steps), nothing is added after the first overflow. What
    was added before stays, and the pass's units are left out once.
    """
    before = current.overflowed.get((id(site), at))
    bad = ~values.isfinite().all()
    over = bad if before is None else bad | before
    current.overflowed[id(site), at] = over
    units = torch.where(over if before is None else bad & ~before, current.units, 0.0).double()
    if site.skipped is None:
        site.skipped = torch.zeros_like(gram.count)
    if at is None:
        site.skipped += units
    else:
        index = torch.tensor(at.index, device=units.device)
        site.skipped.index_add_(at.axis, index, units.expand_as(site.skipped.index_select(at.axis, index)))
    return over
