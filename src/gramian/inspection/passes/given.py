"""What of the batches the model is given, and what the loss compares its output with, by key or place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gramian.batch import LABELS, WEIGHTS, fields

__all__ = ["Given", "given_of", "key"]


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
    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.
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
    return any(name == f'batch["{word}"]' for word in words)
