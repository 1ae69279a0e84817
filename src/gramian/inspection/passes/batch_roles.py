"""What of the batches the model is given, and what the loss compares its output with, by key or place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gramian.batch import LABELS, WEIGHTS, fields

__all__ = ["Given", "Taken", "given_of", "key", "taken_of"]


@dataclass(frozen=True)
class Given:
    """A tensor of each batch.

    Attributes:
        name: as Python reads it off a batch.
        values: one of each batch.
        is_input: whether the model is called with it.
        is_target: whether the loss compares an output with it.
        is_label: whether its name or place says that it is the labels.
    """

    name: str
    values: list[Tensor]
    is_input: bool
    is_target: bool
    is_label: bool


@dataclass(frozen=True)
class Taken:
    """What the model is called with of a tensor of a batch: all of it, or all but the last or first position.

    Attributes:
        name: of the tensor, as Python reads it off a batch.
        whole: the tensor.
        start, length: which positions.
    """

    name: str
    whole: Tensor
    start: int
    length: int

    @property
    def values(self) -> Tensor:
        """The positions that the model gets."""
        return self.whole.narrow(1, self.start, self.length) if self.whole.ndim > 1 else self.whole

    def with_values(self, values: Tensor) -> Tensor:
        """The whole tensor with others in their place."""
        if self.whole.ndim < 2:
            return values
        end = self.whole[:, self.start + self.length :]
        return torch.cat((self.whole[:, : self.start], values, end), 1)


def taken_of(batch: Any, fed: Collection[tuple[int, int]]) -> list[Taken]:
    """The tensors of a batch with which the model was called, whole or but for a position at an end.

    Args:
        batch: of any form.
        fed: keys of the tensors with which the model was called.

    Returns: a list, without weights of samples.
    """
    found = []
    for given in given_of([batch], set(fed), set()):
        t = given.values[0]
        length = t.shape[1] if t.ndim > 1 else 0
        for one in (
            Taken(given.name, t, 0, length),
            Taken(given.name, t, 0, length - 1),
            Taken(given.name, t, 1, length - 1),
        ):
            if (one.length > 0 or one.length == length) and key(one.values) in fed:
                found.append(one)
                break
    return found


def key(t: Tensor) -> tuple[int, int]:
    """What a view of all of a tensor has in common with it."""
    return t.data_ptr(), t.numel()


def given_of(batches: Sequence[Any], fed: set[tuple[int, int]], compared: set[tuple[int, int]]) -> list[Given]:
    """The tensors that all batches have, in their order.

    Args:
        batches: of one form.
        fed: keys of the tensors with which the model was called for the first batch.
        compared: keys of the targets of its losses.

    Returns: a list, without weights of samples; empty where the batches differ in form.
    """
    leaves = [dict(_leaves(batch, "batch")) for batch in batches]
    if not leaves or any(one.keys() != leaves[0].keys() for one in leaves):
        return []
    return [
        Given(name, [one[name] for one in leaves], key(t) in fed, key(t) in compared, _is_named(name, LABELS))
        for name, t in leaves[0].items()
        if not _is_named(name, WEIGHTS)
    ]


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.ndim and value.numel() and not value.is_sparse and not value.is_nested:
            yield name, value
        return
    named = fields(value)
    if named is not None:
        inside = [(f'{name}["{k}"]', v) for k, v in named.items()]
    else:
        inside = [(f"{name}[{i}]", v) for i, v in enumerate(value)] if type(value) in (tuple, list) else []
    for word, one in inside:
        yield from _leaves(one, word)


def _is_named(name: str, words: Sequence[str]) -> bool:
    return name.startswith('batch["') and name[len('batch["') : -len('"]')] in words
