"""A batch as people have it: what is in it, by name or by place.

A batch is a tensor, `(x,)`, `(x, y)`, `(x, y, weights)`, a mapping such as a Hugging Face `BatchEncoding`, a
namedtuple, a dataclass, or an object with a method `to` (a graph). NumPy arrays stand for tensors.
`docs/objectives.md` has the rules.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset

from gramian.errors import InputError

__all__ = [
    "LABELS",
    "WEIGHTS",
    "Parts",
    "described",
    "fields",
    "has_arrays",
    "is_pair",
    "main_input",
    "mapped",
    "num_samples",
    "parts",
    "tensors",
    "token_mask",
]

LABELS = ("labels", "label", "label_ids", "targets", "target", "y")
"""Names of the labels in a batch with names; the first that is there counts."""

WEIGHTS = ("weights", "weight", "sample_weights", "sample_weight")
"""Names of the weights of samples."""

MAIN = ("input_ids", "pixel_values", "inputs_embeds", "input_values", "input_features", "inputs", "input", "x")
"""Names of the input that stands for the sample, where there are several inputs; else it is the first tensor."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is in a batch.

    Args:
        inputs: what the model is called with: a tensor, a mapping of named inputs, or an object.
        labels: a tensor, or `None`.
        weights: of the samples, or of single labels; a tensor, or `None`.
    """

    inputs: Any
    labels: Any = None
    weights: Any = None


def fields(batch: Any) -> dict[str, Any] | None:
    """The parts of a batch by name; `None` where it has places (a tuple), or is one thing.

    A mapping and a dataclass have names. A namedtuple has them where one of its fields is a name that `LABELS` or
    `MAIN` knows; otherwise it is a tuple.

    Args:
        batch: any batch.

    Returns: a dict of the values, or `None`.
    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.

    >>> fields({"x": 1, "y": 2}), fields((1, 2))
    ({'x': 1, 'y': 2}, None)
    """
    if type(batch) in (Tensor, tuple, list):  # at once: a training step asks often
        return None
    if isinstance(batch, Mapping):
        return dict(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    names = getattr(batch, "_fields", ()) if isinstance(batch, tuple) else ()
    known = not isinstance(batch, PackedSequence) and any(name in (*LABELS, *MAIN) for name in names)
    return {name: getattr(batch, name) for name in names} if known else None


def parts(batch: Any) -> Parts:
    """The inputs, labels and weights of a batch.

    Args:
        batch: any batch: by names, those of `LABELS` and `WEIGHTS`; by place, `(inputs, labels, weights)`.

    Returns: `Parts`.
    Raises:
        InputError: a tuple of more than three parts, or a `DataLoader`.
    Cost: none.
    Source: this library's own.

    >>> import torch
    >>> parts((torch.ones(2, 3), torch.zeros(2))).labels
    tensor([0., 0.])
    """
    if type(batch) is tuple and 1 < len(batch) <= 3:
        return Parts(*batch)
    if isinstance(batch, (DataLoader, Dataset)):
        kind = type(batch).__name__
        raise InputError(f"expected one batch, got a {kind}. Take one: next(iter(loader)) of a DataLoader")
    named = fields(batch)
    if named is not None:
        inputs = {key: value for key, value in named.items() if key not in (*LABELS, *WEIGHTS)}
        return Parts(inputs, _first_named(named, LABELS), _first_named(named, WEIGHTS))
    if isinstance(batch, Sequence) and not isinstance(batch, (str, PackedSequence)):
        if not 1 <= len(batch) <= 3:
            raise InputError(
                f"a batch that is a {type(batch).__name__} is (inputs, labels, weights), of which the last two may be "
                f"missing; got {len(batch)} parts. Name them: a dict with the keys that the model's forward takes, and "
                "'labels'"
            )
        return parts(batch[0]) if len(batch) == 1 else Parts(*batch)
    if isinstance(batch, Tensor) or not callable(getattr(batch, "to", None)):
        return Parts(batch)
    return Parts(batch, *(_first_named(_Attributes(batch), names) for names in (LABELS, WEIGHTS)))


def is_pair(batch: Any) -> bool:
    """Whether a batch is the usual one, two plain tensors: what it is then need not be asked part by part.

    A step of a small network takes no longer than these questions.

    Args:
        batch: any batch.

    Returns: whether it is `(inputs, labels)`, a tuple of two tensors.
    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.

    >>> import torch
    >>> is_pair((torch.ones(2, 3), torch.zeros(2))), is_pair([torch.ones(2, 3), torch.zeros(2)])
    (True, False)
    """
    return type(batch) is tuple and len(batch) == 2 and type(batch[0]) is Tensor and type(batch[1]) is Tensor


class _Attributes(Mapping[str, Any]):
    """The attributes of an object, such as a graph, as a mapping."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def __getitem__(self, name: str) -> Any:
        value = getattr(self.of, name, None)
        if value is None:
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self.of))

    def __len__(self) -> int:
        return len(vars(self.of))


def _first_named(named: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((named[name] for name in names if named.get(name) is not None), None)


def main_input(batch: Any) -> Tensor:
    """The tensor that stands for the samples: the tokens, pixels or rows.

    Args:
        batch: any batch.

    Returns: the first input; of several with names, one of `MAIN` if it is there.
    Raises:
        InputError: the batch does not begin with a tensor.
    Cost: none.
    Source: this library's own.

    >>> import torch
    >>> main_input({"attention_mask": torch.ones(2, 3), "input_ids": torch.zeros(2, 3)}).sum()
    tensor(0.)
    """
    inputs = batch[0] if _has_many_places(batch) else parts(batch).inputs
    named = fields(inputs)
    found = inputs
    if named is not None or not isinstance(inputs, (Tensor, Sequence)):
        named = named if named is not None else _Attributes(inputs) if hasattr(inputs, "__dict__") else {}
        found = _first_named(named, MAIN)
        found = found if found is not None else next((v for v in named.values() if isinstance(v, Tensor)), inputs)
    while isinstance(found, Sequence) and not isinstance(found, str) and len(found):
        found = found[0]
    if not isinstance(found, Tensor) or not found.ndim:
        raise InputError(
            f"a batch must start with a tensor (samples, …), got {described(found)}"
            + ("; tokenize first" if isinstance(found, str) else "")
        )
    return found


def _has_many_places(batch: Any) -> bool:
    """Whether a batch is a tuple of more parts than have a meaning, which only its own loss can read."""
    return isinstance(batch, (tuple, list)) and fields(batch) is None and len(batch) > 3


def num_samples(batch: Any) -> int:
    """The number of samples of a batch: the length of its main input; of a graph, that of its labels.

    Args:
        batch: any batch.

    Returns: the length of the first dimension.
    Raises:
        InputError: the batch does not begin with a tensor.
    Cost: none.
    Source: this library's own.

    >>> import torch
    >>> num_samples((torch.ones(5, 2), torch.zeros(5)))
    5
    """
    if _has_many_places(batch):
        return len(main_input(batch))
    given = parts(batch)
    graph = not isinstance(batch, (Tensor, Sequence)) and fields(batch) is None
    return len(given.labels) if graph and isinstance(given.labels, Tensor) else len(main_input(batch))


def token_mask(batch: Any) -> Tensor | None:
    """Where the input is no padding, (B, T) of bool: a mapping's `attention_mask`, if it has one of two dimensions.

    Args:
        batch: any batch.

    Returns: the mask, or `None` where the batch has none.
    Raises: nothing of its own.
    Cost: none.
    Source: the convention of Hugging Face transformers.

    >>> import torch
    >>> token_mask({"input_ids": torch.ones(1, 2), "attention_mask": torch.tensor([[1, 0]])})
    tensor([[ True, False]])
    """
    named = fields(parts(batch).inputs)
    mask = named.get("attention_mask") if named else None
    return mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None


def mapped(batch: Any, change: Callable[[Tensor], Any], other: Callable[[Any], Any] = lambda value: value) -> Any:
    """A batch of the same form with every tensor changed.

    A mapping becomes a dict; tuples, lists, namedtuples and dataclasses keep their types; a NumPy array becomes a
    tensor.

    Args:
        batch: any batch.
        change: what is applied to each tensor.
        other: what is applied to what is neither a tensor nor holds any by the rules above.

    Returns: the new batch.
    Raises:
        InputError: a NumPy array of a dtype that torch has not, such as text.
    Cost: that of `change`.
    Source: this library's own.

    >>> import torch
    >>> mapped({"x": torch.ones(2), "n": [3]}, lambda t: t + 1)
    {'x': tensor([2., 2.]), 'n': [3]}
    """
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, np.ndarray):
        return change(_as_tensor(batch))
    if isinstance(batch, PackedSequence):
        return other(batch)
    if isinstance(batch, Mapping):
        return {key: mapped(value, change, other) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        new = [mapped(value, change, other) for value in batch]
        return type(batch)(*new) if hasattr(batch, "_fields") else type(batch)(new)
    named = fields(batch)
    if named is None:
        return other(batch)
    changed = copy.copy(batch)
    for name, value in named.items():
        object.__setattr__(changed, name, mapped(value, change, other))
    return changed


def _as_tensor(array: np.ndarray) -> Tensor:
    """The array as a tensor: of its memory where torch can share it, which has no negative strides."""
    try:
        return torch.from_numpy(array if array.flags.writeable and min(array.strides, default=0) >= 0 else array.copy())
    except TypeError as error:
        raise InputError(
            f"the batch has a NumPy array of {array.dtype}, which torch has not; turn it into numbers first: "
            "array.astype('float32')"
        ) from error


def has_arrays(batch: Any) -> bool:
    """Whether there is a NumPy array in a batch.

    Args:
        batch: any batch.

    Returns: true where `mapped` would turn something into a tensor.
    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.

    >>> has_arrays((torch.ones(2), {"y": np.ones(2)}))
    True
    """
    if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        return any(map(has_arrays, batch))
    named = fields(batch)
    return isinstance(batch, np.ndarray) if named is None else any(map(has_arrays, named.values()))


def tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors in a batch.

    Args:
        batch: any batch.

    Returns: an iterator.
    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.

    >>> import torch
    >>> [t.shape[0] for t in tensors({"x": torch.ones(2), "more": (torch.ones(3), "text")})]
    [2, 3]
    """
    found: list[Tensor] = []
    mapped(batch, found.append)
    return iter(found)


def described(value: Any) -> str:
    """A value in a few words, for an error.

    Args:
        value: anything.

    Returns: its type, with the shapes of tensors.
    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.

    >>> import torch
    >>> described((torch.ones(2, 3), "a"))
    "(a tensor of shape (2, 3), 'a')"
    """
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" if value.numel() != 1 else f"the value {value.item()}"
    if isinstance(value, np.ndarray):
        return f"a NumPy array of shape {value.shape}"
    if isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) < 40):
        return repr(value)
    named = fields(value)
    if named:
        return f"{type(value).__name__} with {', '.join(map(str, named))}"
    if isinstance(value, (tuple, list)) and 0 < len(value) <= 4:
        inside = ", ".join(map(described, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return type(value).__name__
