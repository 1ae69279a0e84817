"""The weights in what a training loop saved: the model's state dict, taken out of the containers around it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gramian.checkpoint.faults import plain
from gramian.errors import CheckpointError

__all__ = ["Module", "find_state"]

# Training loops write their state dict under one of these keys, next to an optimizer and counters.
CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "params", "weights")

# Running averages of the weights; they are read only where the file has no other weights.
SHADOWS = ("ema", "ema_state_dict", "ema_model", "model_ema", "state_dict_ema", "params_ema", "ema_params", "g_ema")

_MOST, _MOST_TENSORS = 64, 1_000_000  # containers inside each other, and tensors


class Module(dict):  # type: ignore[type-arg]
    """A module's tensors and parts by name: what one of them is called does not make it a container."""


def find_state(file: Path, loaded: object, leaf: type = Tensor) -> tuple[dict[str, Any], list[str]]:
    """The tensors by dotted name, taken out of the containers that training loops put around them, and notes.

    `leaf` is the class that stands for a tensor.
    """
    notes, under = [], []
    while isinstance(loaded, Mapping) and not isinstance(loaded, Module) and len(under) < _MOST:
        keys = [*CONTAINERS, *(SHADOWS if not _has_weights(loaded, leaf) else ())]
        inner = next((key for key in keys if isinstance(loaded.get(key), Mapping) and loaded[key]), None)
        if inner is None:  # a container of containers: {"app": {"model": …, "optim": …}}
            inner = next((key for key, held in loaded.items() if _is_loop(held)), None)
        if inner is None:
            break
        under.append(str(inner))
        left_out = [_told(key, loaded[key]) for key in loaded if key != inner]
        note = f"weights found under {'.'.join(under)!r}"
        note += " (a running average)" if inner in SHADOWS else ""
        notes.append(note + (f"; left out: {', '.join(left_out)}" if left_out else ""))
        loaded = loaded[inner]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{file}: holds a {type(loaded).__name__}, wanted a state dict of tensors. Save model.state_dict()."
        )
    state: dict[str, Any] = {}
    others: list[str] = []
    _flatten("", loaded, leaf, state, others)
    if not state and _is_optimizer(loaded):
        raise CheckpointError(
            f"{file}: holds no tensors of a model, but an optimizer's state. Save model.state_dict()."
        )
    if others:
        notes.append(f"not tensors, left out: {', '.join(others[:8])}" + (", …" if len(others) > 8 else ""))
    return state, notes


def _has_weights(tree: Mapping[Any, Any], leaf: type) -> bool:
    """Whether there are tensors beside the running averages."""
    return any(
        isinstance(value, leaf)
        or (isinstance(value, Mapping) and not _is_optimizer(value) and _holds_tensors(value, leaf, set()))
        for key, value in tree.items()
        if isinstance(key, str) and key not in SHADOWS
    )


def _is_loop(held: object) -> bool:
    """Whether a dict is what a training loop saves: a model's state beside an optimizer's."""
    models = isinstance(held, Mapping) and any(isinstance(held.get(key), Mapping) and held[key] for key in CONTAINERS)
    return models and any(str(key).startswith("optim") for key in held)  # type: ignore[union-attr]


def _is_optimizer(tree: Mapping[Any, Any]) -> bool:
    """Whether a dict is the state of a `torch.optim.Optimizer`."""
    return isinstance(tree.get("state"), Mapping) and ("param_groups" in tree or not _string_keys(tree["state"]))


def _string_keys(tree: Mapping[Any, Any]) -> bool:
    return any(isinstance(key, str) for key in tree)


def _told(key: object, value: object) -> str:
    """A name that was left out, and what it holds where that is worth saying."""
    of = getattr(value, "of", "")
    return plain(key) + (f" ({plain(of)})" if of else " (a running average)" if key in SHADOWS else "")


def _flatten(
    prefix: str, tree: Mapping[Any, Any], leaf: type, state: dict[str, Any], others: list[str], depth: int = 0
) -> None:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(key, str) and isinstance(value, leaf) and name not in state:
            state[name] = value
        elif isinstance(value, Mapping) and _is_optimizer(value):
            others.append(f"{plain(name)} (an optimizer's state)")
        elif isinstance(key, str) and depth < _MOST and _holds_tensors(value, leaf, set()):
            _flatten(f"{name}.", value, leaf, state, others, depth + 1)
        else:
            of = getattr(value, "of", "")
            others.append(plain(name) + (f" ({plain(of)})" if of else ""))
    if len(state) > _MOST_TENSORS:  # a dict that holds another one many times, which holds a third one many times, …
        raise ValueError(f"more than {_MOST_TENSORS:,} tensors")


def _holds_tensors(tree: object, leaf: type, seen: set[int]) -> bool:
    """Whether there is a tensor in a dict, at any depth."""
    if not isinstance(tree, Mapping) or id(tree) in seen:
        return False
    seen.add(id(tree))
    return any(isinstance(value, leaf) or _holds_tensors(value, leaf, seen) for value in tree.values())
