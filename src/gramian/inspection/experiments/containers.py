"""What a model gives, made again with other tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

from torch import Tensor

__all__ = ["is_container", "remade"]


def is_container(value: Any) -> bool:
    """Whether it is a tensor, or made of others in a way that `remade` knows."""
    is_data = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return isinstance(value, (Tensor, tuple, list, Mapping)) or is_data


def remade(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a model gave, in containers of the same types, with other tensors.

    Args:
        value: tensors in tuples, lists, mappings and dataclasses, which are copied; all else stays as it is.
        change: gives the tensor for each.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        new = [remade(one, change) for one in value]
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
    if isinstance(value, Mapping):  # a `ModelOutput` of transformers is one, and a dataclass too
        changed = {key: remade(one, change) for key, one in value.items()}
        if type(value) is dict:
            return changed
        made: Any = copy(value)
        for key, one in changed.items():
            made[key] = one
        return made
    if not is_container(value):
        return value
    made = copy(value)
    for field in dataclasses.fields(value):
        object.__setattr__(made, field.name, remade(getattr(value, field.name), change))
    return made
