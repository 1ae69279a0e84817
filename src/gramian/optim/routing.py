"""Which parameters step as matrices, and which by AdamW."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from gramian.block import Layout, blocks
from gramian.checkpoint import clean_name
from gramian.errors import GramianWarning, InputError, some
from gramian.layers.listed import look_up_listed
from gramian.layers.lookup import is_lazy
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

    `whole` is the layout before large matrices were cut into parts; where a parameter steps by AdamW for its role, the
    layout of the matrices that it holds. `role` is the block's in the model.
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
    others = [r for r in routes if r.parameter not in overridden]
    _warn_of_matrices_left(others, list(overridden.values()), model=bool(known))
    return [([overridden.get(r.parameter, r) for r in members], own) for members, own in groups if members]


MOST_LEFT = 0.25
"""The largest share of the hidden parameters that may go to AdamW, for want of a layout, without a warning."""


def _warn_of_matrices_left(routes: Sequence[Route], overridden: Sequence[Route], *, model: bool) -> None:
    """Warns if more than `MOST_LEFT` of the hidden parameters step by AdamW since nothing tells their matrices.

    Hidden are the matrices, and what has two or more dimensions and is no table, head or elementwise weight. Frozen
    parameters, and those that `routes=` names, are as the user wants them. `model`: whether the model was asked.
    """
    trained = [r for r in routes if r.parameter.requires_grad and r.role == "hidden" and not is_lazy(r.parameter)]
    left = [r for r in trained if r.layout is None and sum(length > 1 for length in r.parameter.shape) >= 2]
    matrices = sum(r.parameter.numel() for r in (*trained, *overridden) if r.layout is not None)
    num_left = sum(r.parameter.numel() for r in left)
    if num_left <= MOST_LEFT * (num_left + matrices):
        return
    patterns = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", r.name) for r in left))
    layouts = ", ".join(f"{pattern!r}: {_example(left, pattern)!r}" for pattern in patterns[:3])
    write = f"layouts={{{layouts}{', …' if len(patterns) > 3 else ''}}}"
    warnings.warn(
        f"{num_left / (num_left + matrices):.0%} of the hidden parameters step by AdamW, since nothing tells which "
        f"matrices they hold: {some([r.name for r in left])}. Pass "
        f"{write if model else f'the model, and where its classes do not tell, {write}'}, which says how they lie: "
        "'e i o -> e o i' for e matrices stored as (in, out), 'e o i -> e o i' as (out, in), see gm.blocks; or, where "
        f"AdamW is right, routes={{{patterns[0]!r}: 'adamw'}}",
        GramianWarning,
        stacklevel=5,
    )


def _example(left: Sequence[Route], pattern: str) -> str:
    """A layout to start from, with as many dimensions as the first of these parameters that the pattern means."""
    ndim = next(r.parameter.ndim for r in left if fnmatch.fnmatchcase(r.name, pattern))
    stack = "".join(f"{axis} " for axis in "abcdefgh"[: ndim - 3] + "e"[: ndim - 2])
    return f"{stack}i o -> {stack}o i"


def routes_of_model(model: nn.Module, layouts: Mapping[str, Any] | None = None) -> list[Route]:
    """The routes of all parameters of a model, by their role in it."""
    found, rest = blocks(model, layouts)
    routes = [_by_role(b.name, b.parameter, b.layout, b.role, b.reason) for b in found]
    return routes + [
        Route(r.name, r.parameter, None, r.reason, role="elementwise" if r.elementwise else "hidden") for r in rest
    ]


def _by_role(name: str, parameter: Tensor, layout: Layout | None, role: Role, reason: str) -> Route:
    if layout is None or role == "hidden":
        return Route(name, parameter, layout, reason, role=role)
    # A depthwise kernel that is to be a matrix all the same is one, a row for each channel.
    whole = plain_layout(parameter) if role == "elementwise" else layout
    return Route(name, parameter, None, f"{_WHY_ADAMW.get(role, role)}: {reason}", whole, role)


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
            routes.append(_by_role(name, p, *told[name]))
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
    shape = tuple(r.parameter.shape)
    layout = r.layout or r.whole or (plain_layout(r.parameter) if len(shape) == 2 else None)
    if layout is None and len(shape) < 2:
        raise InputError(f"routes: {r.name!r} is a vector of shape {shape} and holds no matrix")
    if layout is None:
        raise InputError(
            f"routes: {r.name!r} of shape {shape} is one matrix or several, and nothing tells which. In place of "
            f"routes={{{pattern!r}: 'matrix'}}, pass the model with layouts={{{pattern!r}: 'e i o -> e o i'}} for e "
            "matrices stored as (in, out), 'e o i -> e o i' stored as (out, in); see gm.blocks"
        )
    return Route(r.name, r.parameter, layout, reason)
