"""The global generators of a run: torch's, Python's and numpy's, saved and restored.

The batches draw from a state of torch's generator that is their own (`Own`), so that what the model draws, as dropout
does, has no influence on the data, and a resumed run can draw the same batches again.
"""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gramian import placement
from gramian.errors import GramianWarning

__all__ = [
    "Own",
    "as_plain",
    "random_states",
    "restore_python",
    "restore_random_state",
    "state_of_python",
]


def state_of_python() -> tuple[Any, Any]:
    """The states of Python's and numpy's global generators."""
    return random.getstate(), np.random.get_state()  # noqa: NPY002


def as_plain(state: tuple[Any, Any]) -> list[Any]:
    """A state of `state_of_python` as numbers and text, for a file."""
    (version, numbers, gauss), (kind, keys, place, has_gauss, cached) = state
    own = [str(kind), [int(key) for key in keys], int(place), int(has_gauss), float(cached)]
    return [[version, list(numbers), gauss], own]


def restore_python(state: tuple[Any, Any] | list[Any]) -> None:
    """Set Python's and numpy's global generators to a state of `state_of_python`, or of `as_plain`."""
    (version, numbers, gauss), (kind, keys, place, has_gauss, cached) = state
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), place, has_gauss, cached))  # noqa: NPY002


class Own:
    """A context in which torch's global generator (the CPU's) goes on from a state of its own.

    >>> own = Own(torch.get_rng_state())
    >>> with own:
    ...     first = torch.rand(1)
    >>> torch.equal(first, torch.rand(1))  # outside, it goes on as if nothing had been drawn
    True
    """

    def __init__(self, state: Tensor) -> None:
        self.state = state

    def __enter__(self) -> Own:
        self._outside = torch.default_generator.get_state()
        torch.default_generator.set_state(self.state)
        return self

    def __exit__(self, *error: object) -> None:
        self.state = torch.default_generator.get_state()
        torch.default_generator.set_state(self._outside)


def random_states(device: torch.device) -> list[dict[str, Any]]:
    """Return the states of each rank's global generators, as text and numbers."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    own: dict[str, Any] = {name: bytes(state.tolist()).hex() for name, state in states.items()}
    return placement.exchange_json(own | {"python": as_plain(state_of_python())})


def restore_random_state(states: list[dict[str, Any]], device: torch.device, steps: int, *, same: bool = False) -> None:
    """Set this rank's global generators to their states from `random_states`; of a rank that was not there, seed them.

    Where the number of ranks has changed, a warning says so; not where they were the `same` on all ranks (slices).
    """
    rank, size = placement.world()
    if size != len(states) and rank == 0 and not same:
        warnings.warn(
            f"train: the run was on {len(states)} rank(s) and goes on with {size}, from step {steps:,}: within "
            "rounding, not bitwise, and with other dropout masks",
            GramianWarning,
            stacklevel=4,
        )
    own = dict(states[min(rank, len(states) - 1)])
    restore_python(own.pop("python"))
    if rank >= len(states) and not same:
        torch.manual_seed(1_000_003 * steps + rank)
        return
    tensors = {name: torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8) for name, text in own.items()}
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], device)
