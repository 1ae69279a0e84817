"""Where batches come from: a loader, a list, a generator; checked, and read once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from gramian.batch import described, fields, num_samples
from gramian.errors import GramianWarning, InputError

__all__ = ["Batches", "as_batches", "first_few", "is_one_batch", "looks_like_one", "no_batches"]

Batches = Iterable[Any] | Callable[[], Iterable[Any]]
"""What verbs take: batches, or a function that makes them; `as_batches` checks and calls it."""


_ARRAYS = (Tensor, np.ndarray)


def as_batches(batches: Any, verb: str) -> Iterable[Any]:
    """The batches that a verb was given: an iterable, checked; or a function that makes one, called.

    Args:
        batches: a `DataLoader`, a list, a generator, or a function without arguments that returns one of these.
        verb: for the error: who asks.

    Returns: the iterable. It may be one that can be used only once: verbs read it once.
    Raises:
        InputError: it is no iterable, or it is one batch, or a dataset of single samples.
    Cost: none.
    Source: this library's own.

    >>> len(list(as_batches(lambda: iter([1, 2]), "capture")))
    2
    """
    if hasattr(batches, "criterion") and hasattr(batches, "predict"):
        raise InputError(f"{verb}: batches must be an iterable of batches, got an Objective. Are the two exchanged?")
    if is_one_batch(batches) or looks_like_one(batches):
        raise InputError(
            f"{verb}: batches must be an iterable of batches, and this looks like one batch, {described(batches)}. "
            "Write [batch]"
        )
    if isinstance(batches, list) and [isinstance(t, _ARRAYS) for t in batches] == [True, True]:
        one, two = (tuple(t.shape) for t in batches)
        if one == two:
            warnings.warn(
                f"{verb}: a list of two tensors of one shape, {one}, is read as two batches of inputs. If it is one "
                "batch [x, y], write [(x, y)]; if it is two, iter([x1, x2]) says so",
                GramianWarning,
                stacklevel=3,
            )
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise InputError(
            f"{verb}: batches must be an iterable of batches, got a data set of single samples, "
            f"{type(batches).__name__}. Write torch.utils.data.DataLoader(dataset, batch_size=32)"
        )
    if callable(batches) and not isinstance(batches, Iterable):
        batches = batches()
    sequence = isinstance(batches, Iterable) or hasattr(batches, "__getitem__")
    if isinstance(batches, (str, bytes)) or not sequence:
        raise InputError(
            f"{verb}: batches must be a DataLoader, a list or another iterable of batches, got {described(batches)}"
        )
    return batches


def is_one_batch(batches: Any) -> bool:
    """Whether this is one batch by its type: a tensor or array, a batch with names, or an object with a method `to`.

    Args:
        batches: one batch, or many.

    Returns: true for one; false for a list or tuple, which may be either.
    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.

    >>> is_one_batch({"x": torch.ones(2)}), is_one_batch([torch.ones(2)])
    (True, False)
    """
    if isinstance(batches, (nn.Module, type, DataLoader, Dataset)):
        return False
    return fields(batches) is not None or isinstance(batches, (*_ARRAYS, PackedSequence)) or hasattr(batches, "to")


def looks_like_one(batches: Any) -> bool:
    """Whether a tuple or list is one batch, `(x, y)` or `[x, y]`, by what is in it.

    A tuple of tensors or numbers is; so is a list of them, unless it may be a list of inputs: tensors of as many
    dimensions, all floating or none, and with as many features where they are two-dimensional floats. Two tensors of
    one shape may be both, and are read as two batches; `as_batches` then warns.

    Args:
        batches: one batch, or many.

    Returns: true for one.
    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.

    >>> x, y = torch.ones(4, 2), torch.ones(4, dtype=torch.long)
    >>> looks_like_one([x, y]), looks_like_one([x, x[:3]]), looks_like_one([(x, y)])
    (True, False, False)
    """
    if not isinstance(batches, (tuple, list)) or not any(isinstance(t, (*_ARRAYS, int, float)) for t in batches):
        return False
    if isinstance(batches, tuple) or not all(isinstance(t, _ARRAYS) and t.ndim for t in batches):
        return True
    floats = [(t, t.is_floating_point() if isinstance(t, Tensor) else t.dtype.kind == "f") for t in batches]
    kinds = {(t.ndim, floating, t.shape[1:] if floating and t.ndim == 2 else ()) for t, floating in floats}
    return len(kinds) > 1


def is_in_memory(batches: Iterable[Any]) -> bool:
    """Whether more batches cost next to nothing: a list, or a loader of tensors without workers.

    Args:
        batches: as `as_batches` returns it.

    Returns: true where they do.

    >>> is_in_memory([1, 2]), is_in_memory(iter([1, 2]))
    (True, False)
    """
    if isinstance(batches, DataLoader):
        return isinstance(batches.dataset, TensorDataset) and batches.num_workers == 0
    return isinstance(batches, (list, tuple))


def first_few(batches: Iterable[Any], num: int, verb: str) -> list[Any]:
    """The first few batches.

    The global random state, from which a `DataLoader` draws its order, is left as it was.

    Args:
        batches: as `as_batches` returns it.
        num: how many; fewer come where there are fewer.
        verb: for the error: who asks.

    Returns: the batches.
    Raises:
        InputError: there is no batch.
    Cost: that of these batches.
    Source: this library's own.

    >>> first_few(iter("abc"), 2, "inspect")
    ['a', 'b']
    """
    with torch.random.fork_rng(devices=[]):
        few = list(islice(batches, num))
    if not few:
        raise no_batches(batches, verb)
    return few


def with_samples(batches: list[Any], verb: str) -> list[Any]:
    """The batches that are not empty.

    Args:
        batches: any batches.
        verb: for the error: who asks.

    Returns: a list.
    Raises:
        InputError: all are empty.

    >>> [len(batch) for batch in with_samples([torch.ones(2, 3), torch.ones(0, 3)], "inspect")]
    [2]
    """
    some = [batch for batch in batches if not _is_empty(batch)]
    if not some:
        raise InputError(f"{verb}: no batch has a sample. Give batches with at least one")
    return some


def _is_empty(batch: Any) -> bool:
    try:
        return num_samples(batch) == 0
    except (InputError, TypeError):  # not in a form whose samples can be counted
        return False


def no_batches(batches: Any, verb: str) -> InputError:
    """The error for an iterable that gave no batch, with the likely reason.

    Args:
        batches: the iterable.
        verb: for the error: who asks.

    Returns: the error, to be raised.
    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.

    >>> str(no_batches([], "capture"))
    'capture: there were no batches: the list is empty'
    """
    why = f"the {type(batches).__name__} is empty"
    if isinstance(batches, DataLoader) and batches.drop_last and hasattr(batches.dataset, "__len__"):
        num = len(batches.dataset)  # type: ignore[arg-type]
        why = f"the DataLoader drops the last, incomplete batch, and has {num} samples for {batches.batch_size} a batch"
    elif isinstance(batches, Iterator):
        why = f"perhaps a spent generator; a {type(batches).__name__} can be used once. Pass a DataLoader, or list(...)"
    return InputError(f"{verb}: there were no batches: {why}")
