"""Which parameters step as matrices, and which by AdamW."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from gramian.block import Layout, blocks
from gramian.calls import as_module
from gramian.checkpoint import clean_name
from gramian.errors import GramianWarning, InputError
from gramian.layers.listed import look_up_listed
from gramian.layers.roles import Role
from gramian.optim.route import Direction, Group, Route
from gramian.optim.unknown_stacks import OPEN, how_to_tell, possible_layouts, warn_of_matrices_left

__all__ = ["plain_layout", "route_groups", "routes_of_model"]

_WHY_ADAMW = {
    "embedding": "embedding, whose rows are looked up one by one",
    "head": "head, whose rows are the scores of single outputs",
    "elementwise": "elementwise, each weight acts on one channel alone",
}
"""By a block's role: why it has no use for the direction of a matrix."""


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
    if isinstance(params, nn.Module) or not isinstance(params, Iterable):
        params = as_module(params, "the optimizer")
        groups: list[Group] = [(routes_of_model(params), {})] if known is None else [(list(known.values()), {})]
    elif isinstance(params, Tensor):
        raise TypeError(
            "params argument given to the optimizer should be an iterable of Tensors or dicts, but got one tensor of "
            f"shape {tuple(params.shape)}; give [tensor]"
        )
    else:
        items = params if isinstance(params, (set, frozenset)) else list(params)
        if isinstance(items, list) and items and isinstance(items[0], dict):
            groups = _routes_of_groups(items, known or {}, first)
        else:
            groups = _routes_of_groups([{"params": items}], known or {}, first)
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
    warn_of_matrices_left(others, list(overridden.values()), model=bool(known))
    return [([overridden.get(r.parameter, r) for r in members], own) for members, own in groups]


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
    given = [_members(group) for group in items]
    flat = [pair for members, _ in given for pair in members]
    if known and not first and not any(p in known for _, p in flat):
        raise InputError(
            "model= has none of the parameters that the optimizer was given; pass the model that they are of"
        )
    if not known:
        _check_all_named([[name for name, _ in members] for members, _ in given])
    if len({id(p) for _, p in flat}) < len(flat):
        raise InputError("some parameters appear in more than one parameter group; give each once")
    names = [name for name, _ in flat if name]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"two of the parameters that the optimizer was given have the name {twice!r}; rename one")
    told = look_up_listed({name: tuple(p.shape) for name, p in flat if name})
    routes = []
    for i, (name, p) in enumerate(flat, first):
        if p in known:
            routes.append(known[p])
        elif name:
            routes.append(_by_role(name, p, *told[name]))
        else:
            routes.append(Route(str(i), p, plain_layout(p), _BY_SHAPE, named=False))
    numbered = iter(routes)
    return [([next(numbered) for _ in members], own) for members, own in given]


def _members(group: Any) -> tuple[list[tuple[str, Tensor]], dict[str, Any]]:
    """The named parameters of a group, each once, and what else it holds. Raises as torch's optimizers do."""
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError(f"a parameter group must be a dict with 'params', but got {group!r:.60}")
    params = group["params"]
    if isinstance(params, (set, frozenset)):
        raise TypeError(
            "optimizer parameters need to be organized in ordered collections, but the ordering of tensors in sets "
            "will change between runs. Please use a list instead."
        )
    members = [params] if isinstance(params, Tensor) else list(params)
    names = list(group.get("param_names") or [""] * len(members))
    if len(names) != len(members):
        raise InputError(f"a group has {len(members)} parameters and {len(names)} param_names; give one for each")
    found: dict[Tensor, str] = {}
    for item, name in zip(members, names, strict=True):
        name, p = _named(item, name)
        found.setdefault(p, name)
    if len(found) < len(members):
        warnings.warn(
            "the optimizer was given a parameter group with duplicate parameters; each is stepped once",
            GramianWarning,
            stacklevel=6,
        )
    own = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    return [(name, p) for p, name in found.items()], own


def _check_all_named(groups: Sequence[Sequence[str]]) -> None:
    """Raises `InputError` where some parameters have names and some have none, in torch's words."""
    if any(any(names) and not all(names) for names in groups):
        raise InputError("all optimizer params should be with/without names. Some param names are missing")
    if len({any(names) for names in groups if names}) > 1:
        raise InputError(
            "all optimizer param groups should be with/without names. cannot add param group with names to the "
            "optimizer beside one without"
        )


def _named(item: Any, name: str = "") -> tuple[str, Tensor]:
    name, parameter = item if isinstance(item, tuple) and len(item) == 2 else (name, item)
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
        return replace(r, layout=None, reason=reason, whole=None, role="hidden")
    if direction != "matrix":
        raise InputError(f"routes[{pattern!r}]: expected 'matrix' or 'adamw', got {direction!r}")
    shape = tuple(r.parameter.shape)
    layout = r.layout or r.whole or (plain_layout(r.parameter) if len(shape) == 2 else None)
    if layout is None and len(shape) < 2:
        raise InputError(f"routes: {r.name!r} is a vector of shape {shape} and holds no matrix")
    if layout is None:
        layouts = possible_layouts(r, {})
        raise InputError(
            f"routes: {r.name!r} of shape {shape} is one matrix or several, and nothing tells which. In place of "
            f"routes={{{pattern!r}: 'matrix'}}, pass the model with layouts={{{pattern!r}: {OPEN}}} "
            f"({how_to_tell(layouts)}); see gm.blocks"
        )
    return replace(r, layout=layout, reason=reason, whole=None, role="hidden")
