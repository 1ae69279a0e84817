"""The weights in what a training loop saved: the model's state dict, taken out of the containers around it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from gramian.checkpoint.budgets import OverBudgetError, check_number, size_of
from gramian.checkpoint.faults import damaged, plain
from gramian.errors import CheckpointError, some

__all__ = ["Found", "Module", "find_state"]

# Training loops write their state dict under one of these keys, next to an optimizer and counters.
CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "params", "weights")

# Running averages of the weights; they are read only where the file has no other weights.
SHADOWS = ("ema", "ema_state_dict", "ema_model", "model_ema", "state_dict_ema", "params_ema", "ema_params", "g_ema")

_MOST = 64  # containers inside each other
_MOST_CHARACTERS = 1 << 26  # of all names: those of a container repeat its own
_LONGEST = 1000  # characters of a name


class Module(dict):  # type: ignore[type-arg]
    """A module's tensors and parts by name: what one of them is called does not make it a container."""


class Found(NamedTuple):
    """The tensors by dotted name, notes on what is around them, and the tensors there, such as an optimizer's."""

    state: dict[str, Any]
    notes: list[str]
    beside: dict[str, Any]


def find_state(file: Path, loaded: object, leaf: type = Tensor) -> Found:
    """The tensors by dotted name, taken out of the containers that training loops put around them.

    `leaf` is the class that stands for a tensor.
    """
    notes, under = [], []
    beside: dict[str, Any] = {}
    while isinstance(loaded, Mapping) and not isinstance(loaded, Module) and len(under) < _MOST:
        keys = [*CONTAINERS, *(SHADOWS if not _has_weights(loaded, leaf) else ())]
        inner = next((key for key in keys if isinstance(loaded.get(key), Mapping) and loaded[key]), None)
        if inner is None:  # a container of containers: {"app": {"model": …, "optim": …}}
            inner = next((key for key, held in loaded.items() if _is_loop(held)), None)
        if inner is None:
            break
        left_out = []
        seen: set[int] = set()  # what several keys share is visited once
        for key in loaded:
            if key != inner:
                held = dict(_tensors(".".join([*under, str(key)]), loaded[key], leaf, seen))
                beside |= held
                left_out.append(_told(key, loaded[key], len(held)))
        under.append(str(inner))
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
    try:
        _flatten("", loaded, leaf, state, others, beside, {}, [_MOST_CHARACTERS, size_of(file)])
    except OverBudgetError as error:
        raise damaged(file, error) from error
    if not state and _is_optimizer(loaded):
        raise CheckpointError(
            f"{file}: holds no tensors of a model, but an optimizer's state. Save model.state_dict()."
        )
    if others:
        notes.append(f"not tensors, left out: {some(others, 8)}")
    return Found(state, notes, beside)


def _has_weights(tree: Mapping[Any, Any], leaf: type) -> bool:
    """Whether there are tensors beside the running averages."""
    seen: set[int] = set()
    return any(
        isinstance(value, leaf)
        or (
            not (isinstance(value, Mapping) and _is_optimizer(value))
            and next(_tensors("", value, leaf, seen), None) is not None
        )
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


def _told(key: object, value: object, count: int) -> str:
    """A name that was left out, and what it holds where that is worth saying."""
    of = getattr(value, "of", "")
    if of or key in SHADOWS:
        return plain(key) + (f" ({plain(of)})" if of else " (a running average)")
    network = isinstance(value, Mapping) and count and not _is_optimizer(value)
    return plain(key) + (f" ({count} tensor{'s' * (count != 1)})" if network else "")


def _flatten(
    prefix: str,
    tree: object,
    leaf: type,
    state: dict[str, Any],
    others: list[str],
    beside: dict[str, Any],
    seen: dict[int, str],
    left: list[int],
    depth: int = 0,
) -> None:
    """Put the tensors of a dict or list into `state`, those of optimizers into `beside`, and name all else.

    `left` holds the number of characters that names may still have, and the bytes of the file.
    """
    for key, value in _parts(tree):
        name = f"{prefix}{key}"
        left[0] -= len(name)
        if left[0] < 0:
            raise OverBudgetError(f"names of more than {_MOST_CHARACTERS:,} characters together")
        if isinstance(key, str) and isinstance(value, leaf) and name not in state:
            state[name] = value
        elif isinstance(value, Mapping) and _is_optimizer(value):
            others.append(f"{plain(name)} (an optimizer's state)")
            beside.update(_tensors(name, value, leaf))
        elif id(value) in seen:
            others.append(plain(name) + f" (the same as {plain(seen[id(value)])})" * bool(seen[id(value)]))
        elif isinstance(key, str) and next(_tensors(name, value, leaf), None):
            if depth < _MOST:
                seen[id(value)] = name
                _flatten(f"{name}.", value, leaf, state, others, beside, seen, left, depth + 1)
            else:
                others.append(f"{plain(name)} (more than {_MOST} containers deep)")
        else:
            if isinstance(value, Mapping | list | tuple):
                seen[id(value)] = ""  # it holds no tensor, so that it need not be searched again
            of = getattr(value, "of", "")
            others.append(plain(name) + (f" ({plain(of)})" if of else ""))
        check_number(len(state) + len(beside), left[1])


def _parts(tree: object) -> Iterable[tuple[object, object]]:
    """What a dict or a list holds, by key or place."""
    if isinstance(tree, Mapping):
        return tree.items()
    return ((str(place), value) for place, value in enumerate(tree)) if isinstance(tree, list | tuple) else ()


def _tensors(name: str, tree: object, leaf: type, seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """The tensors in a value, at any depth, by name; each container once, and none of those in `seen`."""
    seen = set() if seen is None else seen
    waiting = [(name, tree)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, leaf):
            yield name, value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            # names of what is nested deeper than any network are cut, since each is as long as its depth
            start = name if len(name) < _LONGEST else f"{name[:_LONGEST]}…"
            waiting.extend((f"{start}.{key}", part) for key, part in _parts(value))
