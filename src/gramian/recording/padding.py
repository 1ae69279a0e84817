"""Which rows of a layer's input are padding, where tokens were flattened, selected or sent to experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gramian.recording.form import Form

__all__ = ["Padding"]

_SELECTS = {Tensor.__getitem__, Tensor.index_select, torch.index_select}
_REPEATS = {Tensor.repeat_interleave, torch.repeat_interleave}


class Padding:
    """The mask of the current pass, (B, T) of bool and false at padding, and the tensors whose rows it tells.

    A tensor (B·T, …) has a row for each position. One that was selected from it by a vector of indices or of bool has
    the rows of these, and so has every tensor with as many rows that is computed from it row by row.
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        self.mask = mask
        self.selected: dict[int, tuple[Tensor, Tensor]] = {}  # the tensor is kept, so that no other gets its id

    def of(self, form: Form) -> Tensor | None:
        """The mask for the inputs of a use: of its rows where they are known, else that of the positions."""
        return self.mask if self.mask is None else self._rows(form.source, self.mask)

    def is_missed(self, form: Form, of_part: bool) -> bool:
        """Whether the inputs of a use hold positions, and the mask does not reach them.

        That is so where they are of the mask's shape in another order; and with a part of a stack (`of_part`), an
        expert, where it is not known which positions its rows are.
        """
        if self.mask is None:
            return False
        x, mask = form.source, self._rows(form.source, self.mask)
        if form.follows_mask and (mask.ndim == 1 or mask.shape in (x.shape, x.shape[:2])):
            return False
        places = list(x.shape[:-1] if form.follows_mask else x.shape)
        if (x.ndim == 2 and len(x) % self.mask.numel() == 0) or (of_part and x.ndim == 2):
            return True
        for size in self.mask.shape:
            if size not in places:
                return False
            places.remove(size)
        return True

    def follow(
        self,
        func: Callable,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tensors: list[Tensor],
        output: object,
        *,
        by_rows: bool,
    ) -> None:
        """Notes the rows of the output of a function; `by_rows` says that it acts row by row."""
        if self.mask is None or not isinstance(output, Tensor) or output.ndim < 2:
            return
        first = next(iter(args), None)
        if func in _SELECTS and isinstance(first, Tensor):
            index = args[1] if func is Tensor.__getitem__ else args[2] if len(args) > 2 and args[1] == 0 else None
            rows = self._rows(first, self.mask)
            if rows.ndim == 1 and isinstance(index, Tensor) and index.ndim == 1 and not index.is_floating_point():
                self._note(output, rows[index])
            return
        if func in _REPEATS and isinstance(first, Tensor):
            rows, times = self._rows(first, self.mask), kwargs.get("repeats", args[1] if len(args) > 1 else None)
            if rows.ndim == 1 and kwargs.get("dim", args[2] if len(args) > 2 else None) == 0:
                self._note(output, rows.repeat_interleave(times))
            return
        if by_rows and self.selected:
            for tensor in tensors:
                known = self._known(tensor)
                if known is not None and len(known) == len(output) and tensor.ndim == output.ndim:
                    self._note(output, known)
                    return

    def _note(self, output: Tensor, rows: Tensor) -> None:
        """Notes the rows of a tensor, and by its base those of the other views of it."""
        for t in (output, output._base):
            if t is not None:
                self.selected[id(t)] = (t, rows)

    def _rows(self, x: Tensor, mask: Tensor) -> Tensor:
        known = self._known(x)
        if known is not None:
            return known
        base = x if x._base is None else x._base
        flat = any(t.ndim == 2 and t.is_floating_point() and len(t) == len(x) == mask.numel() for t in (x, base))
        return mask.flatten() if flat and x.is_floating_point() else mask

    def _known(self, x: Tensor) -> Tensor | None:
        """The rows of a selected tensor, or of a view of one with as many rows."""
        for t in (x, x._base):
            _, rows = self.selected.get(id(t), (None, None))
            if rows is not None and len(rows) == len(x):
                return rows
        return None
