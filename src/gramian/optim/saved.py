"""The state of a matrix optimizer: as a `state_dict`, from an AdamW, and in copies."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gramian import placement
from gramian.optim import guard
from gramian.optim.adamw_state import carry_over
from gramian.optim.grouped import Grouped
from gramian.optim.matching import matched
from gramian.optim.route import Route
from gramian.optim.stacks import State

__all__ = ["Saved"]


class Saved(Grouped):
    """Saves, loads and copies what `Grouped` holds, also where it is sharded."""

    def load_adamw(
        self, source: torch.optim.Optimizer | Mapping[str, Any], names: Sequence[str] | None = None
    ) -> list[dict[str, str]]:
        """Continues from the state of an Adam or AdamW, as far as it carries over; reports what did not, and why.

        Parameters that AdamW steps here too take all of it: both moments and the number of steps. Matrices take what
        their direction declares (`Recipe.adamw`), cut into the matrices: the first moment as the momentum, and for
        SOAP, which is Adam in a basis that starts as the identity, also the second. Rates and other options stay this
        optimizer's; its own state is replaced. Collective where parameters are sharded.

        Args:
            source: the optimizer, or its `state_dict()`. Its parameters are found by identity, or by `param_names`
                where it has them, and otherwise by their order: that of `model.parameters()`.
            names: of the parameters of a `state_dict()` without names, in its order: needed where its groups are not
                in the order of the model, as with one group for weights and one for biases.
        Returns: a row for each parameter: `name`, `direction`, `carried`, `lost` and `reason`.
        Raises:
            InputError: for a state that is not Adam's, or whose shapes do not fit.

        >>> from torch import nn
        >>> from gramian.optim import Muon
        >>> net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        >>> adamw = torch.optim.AdamW(net.parameters())
        >>> net(torch.ones(1, 3)).sum().backward()
        >>> adamw.step()
        >>> for row in Muon(net).load_adamw(adamw)[:2]:
        ...     print(row["name"], "|", row["carried"], "|", row["lost"])
        0.weight | exp_avg | exp_avg_sq, step
        0.bias | exp_avg, exp_avg_sq, step |
        """
        self._follow()
        groups = {p: g for g in self.param_groups for p in g["params"]}

        def empty(r: Route) -> State:
            return self._empty(r, groups[r.parameter])

        def maximize(r: Route) -> bool:
            return bool(groups[r.parameter]["maximize"])

        routes = [self._routes[p] for p in groups]
        states, rows = carry_over(source, names, routes, self._sharding, empty, self.recipe.adamw, maximize)
        self.state.clear()
        self.state.update(states)
        self._plans.clear()
        known = source.state if isinstance(source, torch.optim.Optimizer) else source["state"]
        steps = [int(float(entry["step"])) for entry in known.values() if "step" in entry]
        for group in self.param_groups:  # a momentum that is taken over is not young
            group["step"] = max(steps, default=0)
        return rows

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Where parameters are sharded, it is collective and gives this rank's part."""
        self._follow()
        if not self._sharding:
            return super().state_dict()
        own = self.state
        try:
            self.state = self._sharding.divide(own)  # type: ignore[assignment]
            return super().state_dict()
        finally:
            self.state = own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict()` gave; the next step is then the same, bit for bit.

        Parameters are matched by name where both have names, and otherwise by their order.

        Args:
            state_dict: of an optimizer of the same direction.

        Raises:
            InputError: before anything changes: for the state of another optimizer or direction, or of other
                parameters.
        """
        self._follow()
        given: dict[str, Any] = {}
        names = [group.get("param_names") for group in self.param_groups]

        def take(_: Any, found: dict[str, Any]) -> dict[str, Any]:
            caller = f"{type(self).__name__}.load_state_dict"
            given.update(matched(caller, self._direction(), found, self.param_groups, self._routes, self._shapes))
            return given

        def put_back(_: Any) -> None:
            # torch casts the state to the parameter's dtype and shares its memory: put back a copy of what was saved.
            saved = (index for group in given["param_groups"] for index in group["params"])
            params = (p for group in self.param_groups for p in group["params"])
            states = {p: given["state"][i] for p, i in zip(params, saved, strict=True) if i in given["state"]}
            matrices = {p: s for p, s in states.items() if self._routes[p].layout}
            for p, state in self._sharding.collect(matrices).items():
                self.state[p] = {name: value.to(placement.local(p).device) for name, value in state.items()}
            for p, saved_state in states.items():
                if "usual" in saved_state:  # in float32 for parameters of fewer bits
                    self.state[p]["usual"] = saved_state["usual"]
                self.state[p] = {name: _copy(value, p) for name, value in self.state[p].items()}
            self._plans.clear()
            for group, known in zip(self.param_groups, names, strict=True):
                if known is not None:  # those of the model, whatever the state calls them
                    group["param_names"] = known

        # After the user's hooks before loading, and before those after it.
        hooks = (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put_back, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _empty(self, r: Route, group: Mapping[str, Any]) -> State:
        """The initial state of one matrix of a route, for its names and shapes."""
        assert r.layout is not None
        return self._initial(torch.empty(1, *r.layout.matrices[-2:], device="meta"), group)

    def _initial(self, m: Tensor, group: Mapping[str, Any]) -> State:
        """The state before the first step of matrices like `m`: the direction's own, and that of the guard."""
        return self.recipe.init(m, group) | guard.init(m)

    def _shapes(self, r: Route, group: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The shape of each buffer of a parameter, with the options of a saved group."""
        if r.layout is None:
            return dict.fromkeys(("exp_avg", "exp_avg_sq"), tuple(r.parameter.shape))
        stacked = r.layout.matrices[:-2]
        return {k: (*stacked, *v.shape[1:]) for k, v in self._empty(r, {**self._options, **group}).items()}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: self.__dict__[name] for name in _KEPT}

    def __deepcopy__(self, memo: dict[int, Any]) -> Saved:
        """A copy; it belongs to the copy of the model if that was made before it, as in `deepcopy((model, self))`."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        model = memo.get(id(self._model())) if self._model is not None else None
        copied._model = None if model is None else weakref.ref(model)
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}
        if "_routes" in state:  # a copy, or read from a pickle: it knows no model
            self._model, self._known = None, {}
        for group in self.param_groups:  # a state saved by an earlier version may lack newer options
            for key, value in self._options.items():
                group.setdefault(key, value)


_KEPT = (
    "_routes", "_left_out", "_num_matrices", "_fades", "_options", "_built", "_named", "_sharding", "_clock",
    "_skipped", "_num_missing", "_layouts",
)  # fmt: skip
"""What a copy takes along beside torch's own."""


def _copy(value: Any, p: Tensor) -> Tensor:
    """A copy of an entry of a state; AdamW's number of steps may be saved as a plain number."""
    if isinstance(value, Tensor):
        return value.clone()
    return torch.tensor(float(value), dtype=torch.float32, device=placement.locals_of([p])[0].device)
