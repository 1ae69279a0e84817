"""Samples of a batch: its first ones, and whether it can be cut into any."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gramian.batch import main_input, mapped, tensors
from gramian.errors import InputError

__all__ = ["first_samples", "has_rows"]


def first_samples(batch: Any, num: int) -> Any:
    """The first samples of a batch: the first rows of every tensor that has as many as the main input.

    Args:
        batch: any batch. One that cannot be cut by rows stays whole: objects such as graphs, and where whole numbers
            have another length, as edges of a graph, labels without padding, and a sequence whose first dimension is
            time.
        num: how many.

    Returns: a batch of the same form.
    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.

    >>> import torch
    >>> first_samples((torch.arange(5), {"y": torch.arange(5)}), 2)
    (tensor([0, 1]), {'y': tensor([0, 1])})
    """
    length = _rows(batch)
    if length is None:
        return mapped(batch, lambda t: t)
    is_of = lambda t: t.ndim > 0 and length in (0, len(t))  # noqa: E731
    return mapped(batch, lambda t: _first_of(t, num) if t.is_nested else t[:num] if is_of(t) else t)


def has_rows(batch: Any) -> bool:
    """Whether a batch can be cut into samples by the rows of its tensors.

    Args:
        batch: any batch.

    Returns: false where whole numbers have another length than the main input, as the edges of a graph.
    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.

    >>> import torch
    >>> edges = torch.tensor([[0, 1, 2], [1, 2, 0]])
    >>> has_rows({"x": torch.ones(3, 4), "y": torch.ones(3)}), has_rows({"x": torch.ones(3, 4), "edges": edges})
    (True, False)
    """
    return _rows(batch) is not None


def _rows(batch: Any) -> int | None:
    """The length of the tensors that are cut by samples, 0 for any; `None` where none can be."""
    found = [t for t in tensors(batch) if t.ndim and not t.is_nested]
    if len({len(t) for t in found}) <= 1:
        return 0
    try:
        length = len(main_input(batch))
    except InputError:
        length = len(found[0])
    others = (t for t in found if len(t) not in (1, length))
    return length if all(t.is_floating_point() or t.is_complex() for t in others) else None


def _first_of(t: Tensor, num: int) -> Tensor:
    return torch.nested.as_nested_tensor(list(t.unbind()[:num]), layout=t.layout)
