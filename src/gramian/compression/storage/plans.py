"""Plans in files: calibrate once, and choose the share later or elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gramian.batch import described
from gramian.calls import as_model, unwrapped
from gramian.checkpoint import clean_name, load_tree, open_checkpoint, save_tree
from gramian.checkpoint.names import as_path
from gramian.checkpoint.trees import TREE
from gramian.compression.budget.mixing import Form
from gramian.compression.budget.optimism import Kept
from gramian.compression.budget.plan import Plan
from gramian.compression.budget.points import Point
from gramian.compression.budget.predicting import Rises
from gramian.compression.budget.weighted import WeightedSVD
from gramian.compression.layers.feedback import Feedback
from gramian.compression.layers.modules import copied, submodule
from gramian.compression.layers.opening import open_
from gramian.compression.storage.hooks import warn_of_hooks
from gramian.compression.units.flow import Part, Units
from gramian.compression.units.narrow_plan import Narrowed, NarrowPlan
from gramian.errors import CheckpointError, InputError, some

__all__ = ["AnyPlan", "load_plan", "packed", "save_plan", "unpacked"]

AnyPlan = Plan | NarrowPlan

PLANS = (Plan, NarrowPlan)
STORED: dict[str, type] = {
    cls.__name__: cls for cls in (*PLANS, WeightedSVD, Feedback, Form, Point, Kept, Rises, Narrowed, Units, Part)
}
"""The classes that a plan consists of, whose fields are written by name."""

CLASS = "class"


def save_plan(plan: AnyPlan, path: str | Path) -> None:
    """Writes a plan as safetensors: what the layers lose at each size, what is chosen, and the reasons.

    The model is not written; of each layer that may become smaller there is a checksum, so that the plan is used only
    with the weights that it was made from.

    Args:
        plan: from `gm.compress` or `gm.narrow`.
        path: the file to write or replace.

    Raises:
        InputError: it is no plan, or the folder is missing.
        CheckpointError: the file cannot be written.

    Cost: one write: for a layer (m, n) about (m + n) · min(m, n) numbers of float64.
    Source: this library's own.

    >>> import tempfile, gramian as gm
    >>> net, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2)), torch.randn(64, 16)
    >>> plan = gm.compress(net, batches=[(x, x[:, :2])], objective=gm.Objective.regression(), keep=0.6)
    >>> path = tempfile.mkdtemp() + "/plan.safetensors"
    >>> save_plan(plan, path)
    >>> load_plan(net, path).at(keep=0.5).parameters < plan.parameters
    True
    """
    if not isinstance(plan, (Plan, NarrowPlan)):
        raise InputError(f"save_plan: expected a plan of gm.compress or gm.narrow, got {described(plan)}")
    path = as_path(path, "save_plan")
    warn_of_hooks(plan.model, "save_plan")
    names = plan.ranks if isinstance(plan, Plan) else plan.modules
    digests = {name: _digest(submodule(plan.model, name)) for name in names}
    save_tree(path, {"plan": packed(plan), "shapes": _shapes(plan.model), "digests": digests})


def load_plan(model: nn.Module, path: str | Path) -> AnyPlan:
    """The plan from a file of `save_plan`, for the model that it was made from.

    Args:
        model: dense, with the weights that the plan was made from.
        path: the file.

    Returns:
        The plan, of the kind that was saved: `load_plan(model, path).at(keep=0.4).apply()`.

    Raises:
        CheckpointError: the file is no plan, or one for another model or for other weights; the message names the
            first layers that differ.

    Cost: one read, and a checksum of the weights.
    Source: this library's own.

    >>> import tempfile
    >>> from gramian.checkpoint import save_tensors
    >>> path = tempfile.mkdtemp() + "/plan.safetensors"
    >>> save_tensors(path, {"w": torch.ones(2)})
    >>> load_plan(nn.Linear(2, 2), path)
    Traceback (most recent call last):
    gramian.errors.CheckpointError: ...plan.safetensors was not written by save_plan. Give the file of a plan.
    """
    model, path = unwrapped(as_model(model, "load_plan")), as_path(path, "load_plan")
    tree = load_tree(path) if TREE in open_checkpoint(path, stored=True).metadata else None
    if not isinstance(tree, dict) or tree.keys() != {"plan", "shapes", "digests"}:
        raise CheckpointError(f"{path} was not written by save_plan. Give the file of a plan.")
    model = copied(model)  # which training on does not change
    open_(model, tree["digests"])
    shapes, planned = _shapes(model), tree["shapes"]
    wrong = [
        f"{name} is {shapes.get(name, 'missing')}, planned {planned.get(name, 'missing')}"
        for name in sorted(shapes.keys() | planned.keys())
        if shapes.get(name) != planned.get(name)
    ]
    if wrong:
        raise CheckpointError(f"{path} is a plan for another model than {type(model).__name__}: {some(wrong, 2, '; ')}")
    moved = [name for name, digest in tree["digests"].items() if _digest(submodule(model, name)) != digest]
    if moved:
        raise CheckpointError(
            f"{path} is a plan for other weights: {some(moved)} changed since it was made (trained on, cast or "
            "initialized again). Load those weights, or make the plan again."
        )
    try:
        return unpacked(tree["plan"], model)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: a plan of another version of gramian ({type(error).__name__}: {error}). Make the plan again."
        ) from None


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {clean_name(name): list(parameter.shape) for name, parameter in model.named_parameters()}


def packed(value: Any) -> Any:
    """The value as a tree that `save_tree` takes: an object of STORED as its fields, without the model."""
    value = value.settled() if isinstance(value, (*PLANS, WeightedSVD)) else value
    name = type(value).__name__
    if STORED.get(name) is type(value):
        held = [(key, getattr(value, key)) for key in type(value).__annotations__]
        return {CLASS: name, **{key: packed(item) for key, item in held if not isinstance(item, nn.Module)}}
    if isinstance(value, Mapping):
        return {"items": {key: packed(item) for key, item in value.items()}}
    if type(value) in (list, tuple):
        return type(value)(packed(item) for item in value)
    return value


def unpacked(value: Any, model: nn.Module | None = None) -> Any:
    """What `packed` was given, with the model in the plans in it."""
    if isinstance(value, (list, tuple)):
        return type(value)(unpacked(item, model) for item in value)
    if not isinstance(value, dict):
        return value
    if CLASS not in value:
        return {key: unpacked(item, model) for key, item in value["items"].items()}
    held = {key: unpacked(item, model) for key, item in value.items() if key != CLASS}
    cls = STORED[value[CLASS]]
    return cls(**held, **({"model": model} if cls in PLANS else {}))


def _digest(layer: nn.Module) -> str:
    """A checksum of a layer's numbers, in their own type."""
    digest = hashlib.sha256()
    for _, parameter in sorted(layer.named_parameters()):
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
