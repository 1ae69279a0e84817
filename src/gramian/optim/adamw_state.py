"""Continuing from the state of an AdamW: what carries over to an optimizer of matrices, and what is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gramian import placement
from gramian.checkpoint import clean_name
from gramian.errors import InputError
from gramian.optim.recipe import AdamWPart
from gramian.optim.route import Route
from gramian.optim.sharding import Sharding, not_finite
from gramian.optim.stacks import State

__all__ = ["carry_over"]

SOURCE: dict[AdamWPart, str] = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "exp_avg_sq_weight": "step"}
"""The entry of AdamW's state that each part is made of."""

MISSING = {
    "exp_avg": "this direction keeps no running mean of the gradients",
    "exp_avg_sq": "this direction keeps no second moments of the gradients' single entries",
}
"""Why an entry that no buffer takes is lost."""


class Known(NamedTuple):
    """A parameter's state in an AdamW, and the options of its group."""

    state: Mapping[str, Any]
    group: Mapping[str, Any]


def carry_over(
    source: torch.optim.Optimizer | Mapping[str, Any],
    names: Sequence[str] | None,
    routes: Sequence[Route],
    sharding: Sharding,
    empty: Callable[[Route], State],
    wanted: Mapping[str, AdamWPart],
    maximize: Callable[[Route], bool],
) -> tuple[dict[Tensor, State], list[dict[str, str]]]:
    """The state of each parameter, as far as it carries over from `source`, and a row on each; see `load_adamw`.

    `empty` gives the initial state of one matrix of a route, for its names and shapes; `wanted` is `Recipe.adamw`,
    and `maximize` tells whether this optimizer ascends.
    """
    known = _match(source, names, routes)
    steady = _finite([(r, known[r.parameter]) for r in routes if r.parameter in known])
    states: dict[Tensor, State] = {}
    parts: dict[Tensor, State] = {}
    weights: dict[Tensor, dict[str, float]] = {}
    rows = []
    for r in routes:
        p = r.parameter
        entry = known.get(p)
        row = {"name": r.name, "direction": r.direction, "carried": "", "lost": "", "reason": ""}
        rows.append(row)
        if entry is None or not entry.state:
            row["reason"] = "not in the state" if entry is None else "AdamW had not stepped it"
            continue
        carried: list[str] = []
        if p not in steady:
            row["reason"] = "it holds NaN or infinity"
        elif r.layout is None:
            carried = ["exp_avg", "exp_avg_sq", "step"]
            states[p] = {key: _like(p, entry.state[key]) for key in carried[:2]}
            states[p]["step"] = torch.as_tensor(entry.state["step"], dtype=torch.float32).clone().to(p.device)
        else:
            sign = 1 if bool(entry.group.get("maximize", False)) == maximize(r) else -1
            taken: dict[str, AdamWPart] = {buffer: part for buffer, part in wanted.items() if buffer in empty(r)}
            parts[p], weights[p] = {}, {}
            for buffer, part in taken.items():
                if part == "exp_avg_sq_weight":
                    weights[p][buffer] = 1 - float(entry.group["betas"][1]) ** float(entry.state["step"])
                else:
                    parts[p][buffer] = (sign if part == "exp_avg" else 1) * _fit(p, entry.state[part])
            carried = [key for key in SOURCE.values() if key in {SOURCE[part] for part in taken.values()}]
            row["reason"] = "; ".join(why for key, why in MISSING.items() if key not in carried)
        lost = sorted(entry.state.keys() - set(carried))
        if "max_exp_avg_sq" in lost and not row["reason"]:
            row["reason"] = "amsgrad is not supported"
        row |= {"carried": ", ".join(carried), "lost": ", ".join(lost)}
    by_parameter = {r.parameter: r for r in routes}
    for p, whole in sharding.collect(parts).items():
        layout = by_parameter[p].layout
        assert layout is not None
        wide = torch.promote_types(p.dtype, torch.float32)
        states[p] = {name: layout.split(value).to(wide).contiguous().clone() for name, value in whole.items()}
        if sharding.computes(p):
            like = {"dtype": wide, "device": placement.local(p).device}
            for buffer, weight in weights[p].items():
                states[p][buffer] = torch.full((*layout.matrices[:-2], 1, 1), weight, **like)
    return states, rows


def _match(
    source: torch.optim.Optimizer | Mapping[str, Any], names: Sequence[str] | None, routes: Sequence[Route]
) -> dict[Tensor, Known]:
    """The state of each parameter: by identity, by name, or by order."""
    if isinstance(source, torch.optim.Optimizer):
        found = {p: Known(source.state.get(p, {}), g) for g in source.param_groups for p in g["params"]}
        if any(r.parameter in found for r in routes):
            return _checked({r: found[r.parameter] for r in routes if r.parameter in found})
        source = source.state_dict()
    if "param_groups" not in source or "state" not in source:
        raise InputError("load_adamw: expected an optimizer or its state_dict(), with 'state' and 'param_groups'")
    keys = [(key, group) for group in source["param_groups"] for key in group["params"]]
    entries = [Known(source["state"].get(key, {}), group) for key, group in keys]
    found_names = list(names or (name for group in source["param_groups"] for name in group.get("param_names", ())))
    if not found_names and all(isinstance(key, str) for key, _ in keys):
        found_names = [key for key, _ in keys]  # as torch.distributed.checkpoint has it
    if found_names:
        if len(found_names) != len(entries):
            raise InputError(f"load_adamw: {len(found_names)} names for {len(entries)} parameters of the state")
        by_name = {clean_name(name): entry for name, entry in zip(found_names, entries, strict=True)}
        if not any(r.name in by_name for r in routes):
            raise InputError(
                f"load_adamw: the state's parameters have names like {found_names[0]!r}, the optimizer's like "
                f"{routes[0].name!r}, and none is in both; pass names= as the model has them"
            )
        return _checked({r: by_name[r.name] for r in routes if r.name in by_name})
    for chosen in (routes, [r for r in routes if r.parameter.requires_grad]):
        if len(chosen) == len(entries):
            return _checked(dict(zip(chosen, entries, strict=True)))
    raise InputError(
        f"load_adamw: the state has {len(entries)} parameters without names, the optimizer {len(routes)}; "
        "pass names=, those of the state's parameters in its order"
    )


def _checked(found: dict[Route, Known]) -> dict[Tensor, Known]:
    for r, entry in found.items():
        if entry.state and not {"exp_avg", "exp_avg_sq", "step"} <= entry.state.keys():
            raise InputError(
                f"load_adamw: the state of {r.name!r} holds {', '.join(entry.state)}; expected Adam's exp_avg, "
                "exp_avg_sq and step"
            )
        if entry.state and entry.state["exp_avg"].shape != r.parameter.shape:
            raise InputError(
                f"load_adamw: {r.name!r} has shape {tuple(r.parameter.shape)}, but the state at its place has shape "
                f"{tuple(entry.state['exp_avg'].shape)}. Pass names=, those of the state's parameters in its order"
            )
    return {r.parameter: entry for r, entry in found.items()}


def _finite(entries: Iterable[tuple[Route, Known]]) -> set[Tensor]:
    """The parameters whose moments are finite, the same on all ranks."""
    params = [r.parameter for r, entry in entries if entry.state]
    moments = [[entry.state[key] for _, entry in entries if entry.state] for key in ("exp_avg", "exp_avg_sq")]
    if not params:
        return set()
    bad = not_finite(moments[0]) | not_finite(moments[1])
    return {p for p, is_bad in zip(params, bad.tolist(), strict=True) if not is_bad}


def _fit(p: Tensor, value: Tensor) -> Tensor:
    """The value, whole for a whole parameter and sharded for a sharded one, on its device."""
    return (placement.whole(value) if not placement.is_sharded(p) else value).to(p.device)


def _like(p: Tensor, value: Tensor) -> Tensor:
    """A copy that is sharded as the parameter is."""
    copy = torch.zeros_like(p)
    if placement.is_sharded(p) and not placement.is_sharded(value):
        return placement.write_whole_(copy, value.to(placement.local(p).device))
    return copy.copy_(_fit(p, value))
