"""Which parameters step as matrices, and which by AdamW."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from gramian.block import Layout, blocks
from gramian.checkpoint import clean_name
from gramian.errors import InputError
from gramian.optim.parts import in_parts

__all__ = ["Direction", "Route", "plain_layout", "route", "route_groups"]

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

    `whole` is the layout before large matrices were cut into parts.
    """

    name: str
    parameter: Tensor
    layout: Layout | None
    reason: str
    whole: Layout | None = None

    @property
    def direction(self) -> Direction:
        """`"matrix"` or `"adamw"`."""
        return "adamw" if self.layout is None else "matrix"

    @property
    def is_embedding(self) -> bool:
        """Whether AdamW steps it since it is an embedding."""
        return self.layout is None and self.reason.startswith(_WHY_ADAMW["embedding"])

    @property
    def matrices(self) -> tuple[int, ...]:
        """The shape `(..., m, n)` of the whole matrices."""
        layout = self.whole or self.layout
        assert layout is not None
        return layout.matrices

    def cut(self, size: int | None) -> Route:
        """The same route with large matrices in parts, of at most `size` on the smaller side."""
        return self if self.layout is None else replace(self, layout=in_parts(self.layout, size), whole=self.layout)


def route(
    params: nn.Module | Iterable[Any],
    overrides: Mapping[str, Direction] | None,
    layouts: Mapping[str, Any] | None,
    first: int = 0,
) -> list[Route]:
    """Routes every parameter: of a model by its role, of a list by its shape.

    The hidden matrices of a model step as matrices; everything else (embeddings, heads, elementwise weights, norms,
    biases) by AdamW. In a list, tensors of two or more dimensions are matrices `(out, in·…)`. `overrides`, by name
    pattern, win. A parameter without a name is called by its number, counted from `first`.
    """
    if isinstance(params, nn.Module):
        routes = _from_model(params, layouts)
    elif layouts:
        raise InputError("layouts= needs the model: pass it in place of its parameters")
    else:
        routes = _from_list(params, first)
    if not routes:
        raise InputError("the optimizer got an empty parameter list; pass a model, or its parameters() as a list")
    used = set()
    for i, r in enumerate(routes):
        for pattern, direction in (overrides or {}).items():
            if fnmatch.fnmatchcase(r.name, pattern):
                used.add(pattern)
                routes[i] = _override(r, pattern, direction)
                break
    for pattern in overrides or {}:
        if pattern not in used:
            raise InputError(f"routes: {pattern!r} matches no parameter; names are like {routes[0].name!r}")
    return routes


def route_groups(
    params: nn.Module | Iterable[Any],
    overrides: Mapping[str, Direction] | None,
    layouts: Mapping[str, Any] | None,
    first: int = 0,
) -> list[tuple[list[Route], dict[str, Any]]]:
    """The routes of each parameter group, with the options of that group; usually one group without options."""
    if isinstance(params, nn.Module):
        return [(route(params, overrides, layouts), {})]
    items = list(params)
    if not items or not isinstance(items[0], dict):
        return [(route(items, overrides, layouts, first), {})]
    groups = []
    for group in items:
        own = {key: value for key, value in group.items() if key != "params"}
        members = group["params"]
        routes = route([members] if isinstance(members, Tensor) else members, overrides, layouts, first)
        first += len(routes)
        groups.append((routes, own))
    return groups


def _from_model(model: nn.Module, layouts: Mapping[str, Any] | None) -> list[Route]:
    found, rest = blocks(model, layouts)
    routes = [
        Route(b.name, b.parameter, b.layout, b.reason)
        if b.role == "hidden"
        else Route(b.name, b.parameter, None, f"{_WHY_ADAMW.get(b.role, b.role)}: {b.reason}")
        for b in found
    ]
    return routes + [Route(r.name, r.parameter, None, r.reason) for r in rest]


def _from_list(params: Iterable[Any], first: int) -> list[Route]:
    routes = []
    for i, item in enumerate(params, first):
        name, parameter = item if isinstance(item, tuple) else (str(i), item)
        if not isinstance(parameter, Tensor):
            raise InputError(
                f"expected a model, parameters, (name, parameter) pairs or parameter groups; "
                f"got {type(parameter).__name__}"
            )
        layout = plain_layout(parameter)
        routes.append(Route(clean_name(name), parameter, layout, "given as a list: routed by its shape"))
    return routes


def plain_layout(parameter: Tensor) -> Layout | None:
    """One matrix (out, in·…), or `None` for a vector."""
    if parameter.ndim < 2:
        return None
    axes = " ".join(f"k{i}" for i in range(parameter.ndim - 1))
    columns = f"({axes})" if parameter.ndim > 2 else axes
    return Layout(f"o {axes} -> o {columns}", tuple(parameter.shape))


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
