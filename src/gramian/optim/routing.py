"""Which parameters step as matrices, and which by AdamW."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    layout of the matrices that it holds. `role` is the block's in the model. `shape` is the parameter's at the start.
    A parameter that is not `named` is called by its number.
    """

    name: str
    parameter: Tensor
    layout: Layout | None
    reason: str
    whole: Layout | None = None
    role: Role = "hidden"
    named: bool = True
    shape: tuple[int, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        shape = None if is_lazy(self.parameter) else tuple(self.parameter.shape)
        object.__setattr__(self, "shape", shape)

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
        if self.layout is None:
            return self
        whole = self.whole or self.layout
        return replace(self, layout=in_parts(whole, size), whole=whole)


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
    _warn_of_matrices_left(others, list(overridden.values()), model=bool(known))
    return [([overridden.get(r.parameter, r) for r in members], own) for members, own in groups]


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
    shown = [next(r for r in left if fnmatch.fnmatchcase(r.name, pattern)) for pattern in patterns[:3]]
    biases = {r.name: tuple(r.parameter.shape) for r in routes}
    found = {p: _layouts(r, biases) for p, r in zip(patterns, shown, strict=False)}
    layouts = ", ".join(f"{p!r}: {repr(options[0]) if len(options) == 1 else OPEN}" for p, options in found.items())
    write = f"layouts={{{layouts}{', …' if len(patterns) > 3 else ''}}}"
    undecided = next((options for options in found.values() if len(options) > 1), None)
    tell = f" ({_how_to_tell(undecided)})" if undecided else ""
    warnings.warn(
        f"{num_left / (num_left + matrices):.0%} of the hidden parameters step by AdamW, since nothing tells which "
        f"matrices they hold: {some([r.name for r in left])}. Pass "
        f"{write if model else f'the model, and where its classes do not tell, {write}'}, which says how they "
        f"lie{tell}, see gm.blocks; or, where AdamW is right, routes={{{patterns[0]!r}: 'adamw'}}",
        GramianWarning,
        stacklevel=5,
    )


OPEN = "LAYOUT"
"""What stands for a layout that nothing tells: code that is pasted with it does not run, rather than transpose."""


def _layouts(route: Route, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The layouts that a stack of matrices may have: the one that its bias tells, else (in, out) and (out, in).

    A bias has the length of the output: of the two last sizes, where they differ, the one that it shares is `out`.
    """
    shape = tuple(route.parameter.shape)
    stack = "".join(f"{axis} " for axis in "abcdefgh"[: len(shape) - 3] + "e"[: len(shape) - 2])
    both = [f"{stack}i o -> {stack}o i", f"{stack}o i -> {stack}o i"]
    module, dot, own = route.name.rpartition(".")
    names = [f"{own}_bias", own.replace("weight", "bias"), re.sub("^w", "b", own)]
    lengths = {shapes[module + dot + name][-1] for name in names if name != own and shapes.get(module + dot + name)}
    if len(lengths) == 1 and shape[-1] != shape[-2]:
        length = lengths.pop()
        if length in shape[-2:]:
            return [both[0] if length == shape[-1] else both[1]]
    return both


def _how_to_tell(layouts: Sequence[str]) -> str:
    """Which of two layouts is right, from what forward computes."""
    return f"{OPEN}: {layouts[0]!r} if forward computes x @ w[e], {layouts[1]!r} if it computes x @ w[e].T"


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
        layouts = _layouts(r, {})
        raise InputError(
            f"routes: {r.name!r} of shape {shape} is one matrix or several, and nothing tells which. In place of "
            f"routes={{{pattern!r}: 'matrix'}}, pass the model with layouts={{{pattern!r}: {OPEN}}} "
            f"({_how_to_tell(layouts)}); see gm.blocks"
        )
    return replace(r, layout=layout, reason=reason, whole=None, role="hidden")
