"""Whether a finding is right: its code is a cause of the case, and its `where` names a place of the case.

`where` is places joined by ", "; a place is a name, or a range "a … b" of modules in the order in which the model
defines them. What follows a name in brackets is ignored.

- A name matches a place that is equal to it; one that is inside it ("blocks.2.linear" holds "blocks.2.linear.weight");
  and one that it is inside of, as long as it is no more than a third of the model's modules with parameters. The
  module that owns a parameter always matches it.
- A finding that names more than a third of these modules, and more than three, names none of them; unless its code
  states a fact of each parameter (`FACTS`), of which many are no hedge.
- The place "all layers" is matched by an empty `where`, by "all layers" or "every layer", by "n of m layers" or
  "n layers", and by names or ranges of at least half of the modules with weights in the blocks.
- The places "data", "labels", "loss" and "optimizer" are matched by any `where`, since the codes of their causes
  concern nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from gramian.bench.faults.setup import Truth

__all__ = ["Places", "matches"]

SHARE = 1 / 3
FEW = 3
WORDS = re.compile(
    r"^(all|every|each)\b.*\blayers?\b|^(\d+ of )?(\d+|the|these) layers?$|^the (model|network)$|^model$"
)
SELF_TELLING = {"data": "input-", "labels": "labels-", "loss": "loss-"}
OF_OPTIMIZERS = frozenset(
    {"rate-too-high", "rate-too-low", "momentum-too-high", "parameter-not-stepped", "weight-decay-too-large"}
)
FACTS = frozenset(
    {
        "graph-cut",
        "parameter-frozen",
        "parameter-unused",
        "parameter-shared",
        "parameter-not-stepped",
        "parameter-constant",
        "norm-statistics",
        "norm-evaluation-mode",
        "dropout-rate",
    }
)


class Places:
    """The names of a model's modules and parameters, for matching.

    Args:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        self.owners = [
            name for name, module in model.named_modules(remove_duplicate=False) if module._parameters and name
        ]
        self.names = [name for name, _ in model.named_modules(remove_duplicate=False)]
        self.inner = {name for name in self.owners if name.startswith("blocks.")}

    def under(self, name: str) -> set[str]:
        """The modules with parameters that a name stands for: those inside it, or the one that it is inside of."""
        inside = {owner for owner in self.owners if owner == name or owner.startswith(f"{name}.")}
        return inside or {owner for owner in self.owners if name.startswith(f"{owner}.")}

    def between(self, first: str, last: str) -> list[str]:
        """The modules with parameters from one name to another."""
        ends = [i for i, owner in enumerate(self.owners) if owner in self.under(first) | self.under(last)]
        return self.owners[min(ends) : max(ends) + 1] if ends else [first, last]

    def named(self, where: str) -> list[str]:
        """The names in a finding's `where`, with ranges written out."""
        found = []
        for part in where.split(", "):
            ends = [re.split(r"[\[( ]", end.strip().strip("`'\""))[0] for end in re.split(r"…|\.\.\.", part)]
            ends = [end for end in ends if end]
            found += self.between(ends[0], ends[-1]) if len(ends) > 1 else ends
        return found


def _everywhere(where: str, places: Places) -> bool:
    if not where.strip() or any(WORDS.match(part.strip().lower()) for part in where.split(", ")):
        return True
    covered = set().union(*(places.under(name) for name in places.named(where)))
    return 2 * len(covered & places.inner) >= len(places.inner) > 0


def _local(names: Iterable[str], place: str, places: Places) -> bool:
    few = max(FEW, SHARE * len(places.owners))
    for name in names:
        if name == place or name.startswith(f"{place}."):
            return True
        owner = place.rpartition(".")[0]
        if place.startswith(f"{name}.") and (name == owner or len(places.under(name)) <= few):
            return True
    return False


def matches(code: str, where: str, truth: Truth, places: Places) -> bool:
    """Whether a finding is right about a case.

    Args:
        code, where: of the finding.
        truth: of the case.
        places: of its model.
    """
    if code not in truth.causes:
        return False
    if code in OF_OPTIMIZERS and "optimizer" in truth.places:
        return True
    if any(code.startswith(prefix) and place in truth.places for place, prefix in SELF_TELLING.items()):
        return True
    if "all layers" in truth.places and _everywhere(where, places):
        return True
    names = places.named(where)
    covered = set().union(*(places.under(name) for name in names)) if names else set()
    if code not in FACTS and len(covered) > max(FEW, SHARE * len(places.owners)):
        return False
    return any(_local(names, place, places) for place in truth.places)
