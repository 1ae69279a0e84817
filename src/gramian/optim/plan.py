"""What the step of a parameter group needs beside the gradients, worked out once and used while it fits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import compress
from typing import Any

from torch import Tensor

from gramian.optim.adamw import Rest
from gramian.optim.rates import Kind, by_kind, full_rates, rest_groups
from gramian.optim.route import Route
from gramian.optim.stacks import Stack, State, same

__all__ = ["Plan"]


class Plan:
    """The routes of a group's parameters, by kind, and the stacks of its matrices for the present gradients.

    Whether it fits is asked in every step, and costs an identity test for each parameter and option.

    Args:
        group: the parameter group.
        routes: of all parameters.
    """

    def __init__(self, group: Mapping[str, Any], routes: Mapping[Tensor, Route]) -> None:
        self.params: list[Tensor] = list(group["params"])
        self.routes = [routes[p] for p in self.params]
        self.kinds = by_kind(self.routes)
        self.matrices = [r.parameter for r in self.kinds.get("matrix", [])]
        self.options: dict[str, Any] = {}  # as they were checked last
        self.stacks: list[Stack] | None = None
        self.rest = Rest()
        self.present: list[bool] = []  # which of the parameters have a gradient
        self.stepped: dict[Kind, list[Tensor]] = {}  # those, by kind
        self._made_for: tuple[list[bool], int] = ([], 0)
        self._rates: tuple[list[Any], dict[Kind, float]] = ([], {})

    def see(self, present: list[bool]) -> None:
        """Takes note of which parameters have a gradient in this step."""
        if present != self.present:
            having = set(compress(self.params, present))
            self.stepped = {
                kind: [r.parameter for r in routes if r.parameter in having] for kind, routes in self.kinds.items()
            }
        self.present = present

    @property
    def grads(self) -> list[Tensor]:
        """The gradients of the matrices."""
        return [p.grad for p in self.stepped.get("matrix", [])]  # type: ignore[misc]

    def rest_groups(self, group: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What AdamW steps of the group now."""
        given = [group[key] for key in ("full_lr", "rest_lr", "scale", "num_matrices")]
        if given != self._rates[0]:
            self._rates = given, full_rates(group, self.kinds)
        return rest_groups(group, self._rates[1], self.stepped)

    def of(self, params: Sequence[Tensor]) -> bool:
        """Whether these are its parameters."""
        return same(self.params, params)

    def changed(self, group: Mapping[str, Any], keys: Collection[str]) -> list[str]:
        """The options whose value is another than when they were checked; a tensor always counts."""
        if same(list(self.options.values()), [group[key] for key in keys]) and not isinstance(group["lr"], Tensor):
            return []
        known = self.options
        return [key for key in keys if key not in known or isinstance(group[key], Tensor) or known[key] != group[key]]

    def current(self, refresh: int, states: Mapping[Tensor, State]) -> list[Stack] | None:
        """The stacks, if they are for the present gradients and hold the present state."""
        if self.stacks is None or self._made_for != (self.present, refresh):
            return None
        return self.stacks if all(stack.holds(states) for stack in self.stacks) else None

    def keep(self, stacks: list[Stack], refresh: int) -> None:
        """Keeps the stacks that were made for the present gradients."""
        self.stacks, self._made_for = stacks, (self.present, refresh)
