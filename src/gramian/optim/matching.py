"""A saved state, matched to the parameters of an optimizer: by name, or by order, and refused where neither fits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gramian.checkpoint import clean_name
from gramian.errors import GramianWarning, InputError, some
from gramian.optim.route import Route

__all__ = ["matched"]

Shapes = Mapping[str, Sequence[int]]


def matched(
    caller: str,
    direction: str,
    found: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    routes: Mapping[Tensor, Route],
    shapes: Callable[[Route, Mapping[str, Any]], Shapes],
) -> dict[str, Any]:
    """The state with its parameters in the order of this optimizer's groups.

    Args:
        caller: of the error messages.
        direction: whose states this optimizer takes.
        found: the `state_dict()`.
        groups: of this optimizer.
        routes: of its parameters.
        shapes: `shapes(route, group)`: the shape of each buffer of a parameter, with the options of a saved group.

    Raises `InputError` for the state of another optimizer or direction, for names that belong to other places, and for
    buffers of other shapes.
    """
    if not isinstance(found, Mapping) or not {"state", "param_groups"} <= found.keys():
        raise InputError(f"{caller}: expected a state_dict() of this optimizer, with 'state' and 'param_groups'")
    saved = list(found["param_groups"])
    _check_kind(caller, direction, found, saved)
    if len(saved) != len(groups):
        raise InputError(f"{caller}: the state has {len(saved)} parameter groups, and the optimizer {len(groups)}")
    saved = [_in_order(caller, theirs, ours) for theirs, ours in zip(saved, groups, strict=True)]
    state, lost = dict(found["state"]), []
    for theirs, ours in zip(saved, groups, strict=True):
        for key, p in zip(theirs["params"], ours["params"], strict=True):
            kept = state.get(key, {})
            if kept and ("exp_avg" in kept) == (routes[p].layout is not None):
                lost.append(routes[p].name)
                del state[key]
            else:
                _check_shapes(caller, routes[p], kept, shapes(routes[p], theirs))
    if lost:
        warnings.warn(
            f"{caller}: the state of {some(lost)} is not loaded: a matrix has a state of its direction, and other "
            "parameters have AdamW's, and the optimizer that was saved routed them otherwise. Build both from the "
            "model, or both from its named parameters",
            GramianWarning,
            stacklevel=6,
        )
    return {**found, "state": state, "param_groups": saved}


def _check_kind(caller: str, direction: str, found: Mapping[str, Any], saved: Sequence[Mapping[str, Any]]) -> None:
    for group in saved:
        whose = group.get("direction")
        if whose is None:
            kept = {key for state in found["state"].values() for key in state}
            adam = "exp_avg_sq" in kept or {"betas", "eps"} <= group.keys()
            advice = (
                "Call load_adamw(state), which carries over what fits"
                if adam
                else "load_adamw takes the state of an Adam or AdamW; without one, start with an empty state"
            )
            raise InputError(
                f"{caller}: this is the state of another optimizer"
                + (f", with {', '.join(sorted(kept))}" if kept else "")
                + f". {advice}"
            )
        if whose != direction:
            raise InputError(
                f"{caller}: this is the state of another direction, {whose}, where {direction} is wanted. Load it into "
                "the optimizer that saved it"
            )


def _in_order(caller: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group with its parameters in the order of this optimizer's, told by name where both have names.

    Names that the two do not share may be new names of the same parameters: then the order tells, as in torch, as long
    as it does not contradict the names that they share.
    """
    if len(theirs["params"]) != len(ours["params"]):
        raise InputError(
            f"{caller}: a group of the state has {len(theirs['params'])} parameters, and the optimizer's has "
            f"{len(ours['params'])}"
        )
    names = [[clean_name(name) for name in group.get("param_names", ())] for group in (theirs, ours)]
    if not all(names):
        return dict(theirs)
    saved, own = ({name: i for i, name in enumerate(group)} for group in names)
    if saved.keys() == own.keys():
        order = [saved[name] for name in own]
        return {**theirs, "params": [theirs["params"][i] for i in order], "param_names": list(own)}
    moved = [name for name in own if name in saved and saved[name] != own[name]]
    if moved:
        missing, unknown = ([n for n in one if n not in other] for one, other in ((own, saved), (saved, own)))
        raise InputError(
            f"{caller}: the state has other parameters than the optimizer, in another order: it lacks {some(missing)} "
            f"and has {some(unknown)}. Load it into the optimizer of the model that it was saved with"
        )
    return {**theirs, "param_names": list(own)}


def _check_shapes(caller: str, r: Route, state: Mapping[str, Any], wanted: Shapes) -> None:
    for name, shape in wanted.items():
        value = state.get(name)
        if isinstance(value, Tensor) and value.shape != torch.Size(shape):
            raise InputError(
                f"{caller}: the state {name!r} of {r.name!r} has shape {tuple(value.shape)}, and {tuple(shape)} is "
                "wanted. Load the state of the same optimizer on the same model, with the same part_size; where a "
                "layer was added or removed, give the optimizer named parameters, so that names tell which is which"
            )
