"""Reshapes that cut axes anew where they would have to change places: what a transpose does, and a view does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from gramian.batch import num_samples
from gramian.inspection.experiments.replay import Asked, loss_of
from gramian.inspection.passes.current_module import Follower
from gramian.samples import first_samples

__all__ = ["Recut", "moved_axis", "recut"]

# Samples of the pass: few, and a prime, so that no other axis is as long or a multiple.
NUM = 7
# Ratios of lengths (T, C) at which (T, C) to (T/k, kC), which stacks k neighbors, looks like (C, T).
STACKED = range(2, 9)

_RESHAPES = {Tensor.view, Tensor.reshape, torch.reshape}


@dataclass(frozen=True)
class Recut:
    """A reshape in which an axis gets another place.

    Attributes:
        name: the module in which it is; empty for the model itself, and outside of it.
        is_inside: whether it is in the model.
        before, after: the shapes, of 7 samples.
        length: of the axis.
    """

    name: str
    is_inside: bool
    before: tuple[int, ...]
    after: tuple[int, ...]
    length: int


def recut(asked: Asked) -> Recut | None:
    """The first reshape in which an axis gets another place, so that its values are those of several indices.

    A relative shift of attention's scores does so on purpose, and then leaves out the first row.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: a `Recut`, or `None`.
    Raises: what the model raises, which may not run on 7 samples.
    Cost: a forward pass of 7 samples.
    """
    whole = asked.seen.batches[0]
    if num_samples(whole) < NUM:
        return None
    with _Reshapes(asked.model).installed() as reshapes:
        loss_of(asked.model, first_samples(whole, NUM), asked.objective)
    return next(iter(reshapes.found.values()), None)


def moved_axis(before: Sequence[int], after: Sequence[int]) -> int:
    """The length of an axis that a reshape gives another place; 0 where axes are only split and joined.

    Args:
        before, after: the shapes.

    Returns: a length above one that is in both shapes once, with another number of entries in front; of images the
        number of channels, where some of these become rows and columns, or the reverse.

    >>> moved_axis((7, 16, 32), (7, 4, 16, 8)), moved_axis((7, 16, 32), (7, 16, 4, 8))
    (16, 0)
    >>> moved_axis((7, 4, 8, 8), (7, 1, 16, 16)), moved_axis((7, 3, 4, 4), (7, 16, 3))
    (4, 3)
    """
    if len(before) == len(after) == 4 and (between := _between(before, after) or _between(after, before)):
        return between
    for old, new in _groups([n for n in before if n != 1], [n for n in after if n != 1]):
        if len(old) < 2 or len(new) < 2:
            continue
        once = [n for n in old if old.count(n) == new.count(n) == 1]
        moved = [n for n in once if prod(old[: old.index(n)]) != prod(new[: new.index(n)])]
        is_shift = sorted(old) == sorted(new) and bool({n + 1 for n in old} & set(old))  # (T, T + 1) to (T + 1, T)
        if not moved or is_shift:
            continue
        if len(old) == len(new) == 2 and max(old) % min(old) == 0 and max(old) // min(old) in STACKED:
            continue
        return moved[0]
    return 0


def _between(before: Sequence[int], after: Sequence[int]) -> int:
    """The channels that a reshape of images puts between rows and columns, k² of them into k by k; else 0."""
    k = after[2] // before[2]
    is_larger = k > 1 and list(after[2:]) == [k * side for side in before[2:]]
    return before[1] if is_larger and before[1] == k * k * after[1] and min(before[2:]) > 1 else 0


def _groups(before: list[int], after: list[int]) -> list[tuple[list[int], list[int]]]:
    """The axes, in the smallest groups of the same number of entries, from the left."""
    found = []
    old, new = [], []
    before, after = before[::-1], after[::-1]
    while before or after:
        if before and (prod(old) <= prod(new) or not after):
            old.append(before.pop())
        else:
            new.append(after.pop())
        if prod(old) == prod(new):
            found.append((old, new))
            old, new = [], []
    return found


class _Reshapes(Follower):
    """Keeps the reshapes that move an axis, until a part of the result is taken along one of its axes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.found: dict[int, Recut] = {}
        self.kept: list[Tensor] = []  # so that no id is used twice

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = args[0] if args else None
        if not isinstance(made, Tensor) or not isinstance(given, Tensor) or isinstance(given, nn.Parameter):
            return made
        if func in _RESHAPES and made.numel() and made.dtype == given.dtype:
            length = moved_axis(given.shape, made.shape)
            if length:
                self.found[id(made)] = Recut(
                    self.place, bool(self.stack), tuple(given.shape), tuple(made.shape), length
                )
                self.kept.append(made)
        elif func is Tensor.__getitem__ and id(given) in self.found and made.ndim == given.ndim:
            del self.found[id(given)]
        return made
