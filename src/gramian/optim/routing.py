"""Which parameters step as matrices, and which by AdamW."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from gramian.block import Layout, blocks
from gramian.checkpoint import clean_name
from gramian.errors import GramianWarning, InputError
from gramian.layers.listed import look_up_listed
from gramian.layers.roles import Role
from gramian.optim.parts import in_parts

__all__ = ["Direction", "Group", "Route", "plain_layout", "route_groups", "routes_of_model"]

Direction = Literal["matrix", "adamw"]

_WHY_ADAMW = {
    "embedding": "embedding, whose rows are looked up one by one",
    "head": "head, whose rows are the scores of single outputs",
    "elementwise": "elementwise, each weight acts on one channel alone",
}
"""By a block's role: why it has no use for the direction of a matrix."""


@dataclass(frozen=True, eq=False)
class Route:
    """How one parameter is stepped, and why: as the matrices of `layout`, or by AdamW where that is `None`.

    `whole` is the layout before large matrices were cut into parts. `role` is the block's in the model.
    """

    name: str
    parameter: Tensor
    layout: Layout | None
    reason: str
    whole: Layout | None = None
    role: Role = "hidden"

    @property
    def direction(self) -> Direction:
        """`"matrix"` or `"adamw"`."""
        return "adamw" if self.layout is None else "matrix"

    @property
    def matrices(self) -> tuple[int, ...]:
        """The shape `(..., m, n)` of the whole matrices."""
        layout = self.whole or self.layout
        assert layout is not None
        return layout.matrices

    def cut(self, size: int | None) -> Route:
        """The same route with large matrices in parts, of at most `size` on the smaller side."""
        return self if self.layout is None else replace(self, layout=in_parts(self.layout, size), whole=self.layout)


Group = tuple[list[Route], dict[str, Any]]
"""The routes of a parameter group, and the options of that group."""


def route_groups(
    params: nn.Module | Iterable[Any],
    overrides: Mapping[str, Direction] | None = None,
    known: Mapping[Tensor, Route] | None = None,
    first: int = 0,
) -> list[Group]:
    """The routes of each parameter group; usually one group without options.

    The hidden matrices of a model step as matrices; everything else (embeddings, heads, elementwise weights, norms,
    biases) by AdamW. Which are which, the model tells best; then the names; and shapes alone tell nothing: a tensor of
    two or more dimensions is a matrix `(out, in·…)`, and `GramianWarning` says what to write. `overrides`, by name
    pattern, win.

    Args:
        params: a model, its parameters, pairs of names and parameters, or groups of these.
        known: routes by parameter, those of the model.
        first: the number that the first parameter without a name is called by.
    """
    if isinstance(params, nn.Module):
        groups: list[Group] = [(routes_of_model(params), {})] if known is None else [(list(known.values()), {})]
    else:
        groups = _routes_of_groups(list(params), known or {}, first)
    routes = [r for members, _ in groups for r in members]
    if not routes:
        raise InputError("the optimizer got an empty parameter list; pass a model, or its parameters() as a list")
    chosen = {r.parameter: pattern for r in routes if (pattern := _pattern(r.name, overrides or {})) is not None}
    for pattern in overrides or {}:
        if pattern not in chosen.values():
            raise InputError(f"routes: {pattern!r} matches no parameter; names are like {routes[0].name!r}")
    guessed = [r for r in routes if r.reason == _BY_SHAPE and r.layout is not None and r.parameter not in chosen]
    if guessed and len(routes) > 1:
        warnings.warn(
            f"{len(guessed)} parameters without names step as matrices by their shape alone, be they hidden layers, "
            "embeddings or heads. Pass the model itself, model.named_parameters(), or the groups together with "
            'model=model; or say routes={"*": "matrix"} where all are hidden matrices',
            GramianWarning,
            stacklevel=4,
        )
    overridden = {
        p: _override(r, chosen[p], (overrides or {})[chosen[p]]) for r in routes if (p := r.parameter) in chosen
    }
    return [([overridden.get(r.parameter, r) for r in members], own) for members, own in groups if members]


def routes_of_model(model: nn.Module, layouts: Mapping[str, Any] | None = None) -> list[Route]:
    """The routes of all parameters of a model, by their role in it."""
    found, rest = blocks(model, layouts)
    routes = [_by_role(b.name, b.parameter, b.layout, b.role, b.reason) for b in found]
    return routes + [Route(r.name, r.parameter, None, r.reason) for r in rest]


def _by_role(name: str, parameter: Tensor, layout: Layout | None, role: Role, reason: str) -> Route:
    if layout is None or role == "hidden":
        return Route(name, parameter, layout, reason)
    return Route(name, parameter, None, f"{_WHY_ADAMW.get(role, role)}: {reason}", role=role)


_BY_SHAPE = "given without a name: routed by its shape"


def _routes_of_groups(items: Sequence[Any], known: Mapping[Tensor, Route], first: int) -> list[Group]:
    grouped = bool(items) and isinstance(items[0], dict)
    groups: list[tuple[list[tuple[str, Tensor]], dict[str, Any]]] = []
    for group in items if grouped else [{"params": items}]:
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        own = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        groups.append((list(map(_named, members, group.get("param_names") or [""] * len(members))), own))
    flat = [pair for members, _ in groups for pair in members]
    if known and not first and not any(p in known for _, p in flat):
        raise InputError(
            "model= has none of the parameters that the optimizer was given; pass the model that they are of"
        )
    for what, keys in (("parameters", [id(p) for _, p in flat]), ("names", [name for name, _ in flat if name])):
        if len(set(keys)) < len(keys):
            raise InputError(f"two of the {what} that the optimizer was given are the same; give each once")
    told = look_up_listed({name: tuple(p.shape) for name, p in flat if name})
    routes = []
    for i, (name, p) in enumerate(flat, first):
        if p in known:
            routes.append(known[p])
        elif name:
            routes.append(_by_role(name, p, *told[name][:3]))
        else:
            routes.append(Route(str(i), p, plain_layout(p), _BY_SHAPE))
    numbered = iter(routes)
    return [([next(numbered) for _ in members], own) for members, own in groups]


def _named(item: Any, name: str = "") -> tuple[str, Tensor]:
    name, parameter = item if isinstance(item, tuple) else (name, item)
    if not isinstance(parameter, Tensor):
        raise InputError(
            f"expected a model, parameters, (name, parameter) pairs or parameter groups; got {type(parameter).__name__}"
        )
    return clean_name(name), parameter


def plain_layout(parameter: Tensor) -> Layout | None:
    """One matrix (out, in·…), or `None` for a vector."""
    if parameter.ndim < 2:
        return None
    axes = " ".join(f"k{i}" for i in range(parameter.ndim - 1))
    columns = f"({axes})" if parameter.ndim > 2 else axes
    return Layout(f"o {axes} -> o {columns}", tuple(parameter.shape))


def _pattern(name: str, overrides: Mapping[str, Any]) -> str | None:
    return next((pattern for pattern in overrides if fnmatch.fnmatchcase(name, pattern)), None)


def _override(r: Route, pattern: str, direction: Direction) -> Route:
    reason = f"routes[{pattern!r}]"
    if direction == "adamw":
        return Route(r.name, r.parameter, None, reason)
    if direction != "matrix":
        raise InputError(f"routes[{pattern!r}]: expected 'matrix' or 'adamw', got {direction!r}")
    layout = r.layout or plain_layout(r.parameter)
    if layout is None:
        raise InputError(f"routes: {r.name!r} is a vector of shape {tuple(r.parameter.shape)} and holds no matrix")
    return Route(r.name, r.parameter, layout, reason)
