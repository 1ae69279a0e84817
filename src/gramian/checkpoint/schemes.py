"""The form of a row in the tables of `composed` and `quantized`: a way of storing a weight in parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from gramian.checkpoint.formats import Entry

__all__ = ["Plan", "Scheme", "Setting"]


class Setting(NamedTuple):
    """What a plan is made from: the weight's name, its parts, the JSON files beside them, and a function that loads."""

    name: str
    parts: Mapping[str, Entry]
    config: Mapping[str, Any]
    read: Callable[[Entry], Tensor]


class Plan(NamedTuple):
    """The weight that the parts give: its shape, its dtype, how it is made in words, and the function that makes it.

    `low_rank` says that it is a product of thin factors alone.
    """

    shape: tuple[int, ...]
    dtype: str
    how: str
    compute: Callable[[Mapping[str, Tensor]], Tensor]
    low_rank: bool = False


@dataclass(frozen=True)
class Scheme:
    """A way of storing a weight in parts.

    Args:
        name: in words.
        anchor: matches the whole name of the first part; its groups fill the templates below.
        first: the word for the first part.
        parts: templates of the other parts' names, by the word for each; the first that exists is taken.
        optional: those of parts that may be missing.
        result: the template of the entry's name: the weight's, or that of the parameter that has its shape.
        weight: the template of the weight's name, where that is another.
        plan: from the parts to the weight. Text says why it cannot be computed; `None`, that this is another scheme.
    """

    name: str
    anchor: re.Pattern[str]
    first: str
    parts: Mapping[str, tuple[str, ...]]
    result: str
    plan: Callable[[Setting], Plan | str | None]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    weight: str = ""

    def match(self, name: str, stored: Mapping[str, Entry]) -> tuple[str, str, dict[str, Entry]] | None:
        """The names of the entry and the weight, and the parts, where a tensor of that name is the first of them."""
        found = self.anchor.fullmatch(name)
        if found is None:
            return None
        words = {key: value or "" for key, value in found.groupdict().items()}
        parts = {self.first: stored[name]}
        for word, templates in (*self.parts.items(), *self.optional.items()):
            names = (template.format(**words) for template in templates)
            entry = next((stored[other] for other in names if other in stored and other != name), None)
            if entry is not None:
                parts[word] = entry
            elif word in self.parts:
                return None
        result = self.result.format(**words)
        return result, self.weight.format(**words) or result, parts
