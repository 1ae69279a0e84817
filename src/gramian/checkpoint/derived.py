"""Weights that a file holds in parts (integers and scales, a direction and its length, two factors), put together.

`SCHEMES` has a row for each way of storing a weight: how its parts are named, and how it is computed from them. Such a
weight is an entry under the name that it has in the model, and is computed when it is loaded, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from gramian.checkpoint.composed import COMPOSED
from gramian.checkpoint.formats import Entry, Made
from gramian.checkpoint.quantized import QUANTIZED
from gramian.checkpoint.schemes import Plan, Scheme, Setting
from gramian.errors import some

__all__ = ["SCHEMES", "with_derived"]

SCHEMES: tuple[Scheme, ...] = (*COMPOSED, *QUANTIZED)


def with_derived(
    stored: Mapping[str, Entry], config: Mapping[str, Any], read: Callable[[Entry], Tensor]
) -> tuple[dict[str, Entry], list[str]]:
    """The entries with those of weights that are put together, each in the place of its first part; and notes.

    Args:
        stored: the tensors of the file, by name.
        config: what JSON files beside it say, by their names.
        read: loads a tensor; called for the few bytes that describe a scheme.
    """
    made: dict[str, Entry] = {}
    part_of: dict[str, str] = {}
    places: dict[str, str] = {}
    failed: dict[str, list[str]] = {}
    for scheme in SCHEMES:
        for name in stored:
            found = None if name in part_of else scheme.match(name, stored)
            if found is None or any(entry.name in part_of for entry in found[2].values()):
                continue
            result, weight, parts = found
            taken = result in made or (result in stored and all(entry.name != result for entry in parts.values()))
            plan = None if taken else scheme.plan(Setting(result, parts, config, read))
            if result in made:
                plan = f"stored in parts twice; the first is inspected ({made[result].made.how})"  # type: ignore[union-attr]
            if isinstance(plan, str):
                failed.setdefault(plan, []).append(result)
            if not isinstance(plan, Plan):
                continue
            first = next(iter(parts.values()))
            how = Made(weight, plan.how, parts, plan.compute, plan.low_rank)
            made[result] = Entry(result, plan.shape, plan.dtype, first.file, first.key, made=how)
            part_of |= {entry.name: result for entry in parts.values()}
            places[name] = result
    entries: dict[str, Entry] = {}
    for name, entry in stored.items():
        if name in places:
            entries[places[name]] = made[places[name]]
        if name in part_of and name not in made:
            entries[name] = replace(entry, part_of=part_of[name])
        elif name not in made:
            entries[name] = entry
    notes = [f"{some(names)}: {reason}" for reason, names in failed.items()]
    return entries, notes
