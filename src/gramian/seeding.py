"""The global generators of torch, Python and NumPy: seeded, noted, and put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

__all__: list[str] = []  # for the library alone


@contextmanager
def kept_random() -> Iterator[None]:
    """A context after which torch's random state, of all devices, and Python's and NumPy's are what they were.

    Returns: the context manager.
    Cost: a copy of the states.

    >>> torch.manual_seed(0).initial_seed()
    0
    >>> with kept_random():
    ...     first = torch.rand(3), random.random()
    >>> torch.equal(first[0], torch.rand(3)), first[1] == random.random()
    (True, True)
    """
    put_back = noted_random()
    try:
        yield
    finally:
        put_back()


def noted_random() -> Callable[[], None]:
    """Notes the random states that `kept_random` keeps.

    Returns: a function that makes them what they are now.
    Cost: a copy of the states.

    >>> put_back = noted_random()
    >>> first = torch.rand(3)
    >>> put_back()
    >>> torch.equal(first, torch.rand(3))
    True
    """
    undo: list[Callable[[], Any]] = [partial(torch.set_rng_state, torch.get_rng_state())]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        undo.append(partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    if torch.backends.mps.is_available():
        undo.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
    undo.append(partial(random.setstate, random.getstate()))
    undo.append(partial(np.random.set_state, np.random.get_state()))  # noqa: NPY002 (the global one)

    def put_back() -> None:
        for one in undo:
            one()

    return put_back


def seed_torch(seed: int) -> None:
    """As `torch.manual_seed`, which without an accelerator takes a millisecond, and keeps a traceback of each call.

    Args:
        seed: of the generators of all devices.

    Source: torch.

    >>> with kept_random():
    ...     seed_torch(3)
    ...     torch.initial_seed()
    3
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context with the global generators of torch, Python and NumPy seeded; then they are what they were.

    Args:
        seed: of all of them.

    Returns: the context manager.
    Cost: a copy of the states.

    >>> with seeded(0):
    ...     first = torch.rand(3), random.random()
    >>> with seeded(0):
    ...     torch.equal(first[0], torch.rand(3)), first[1] == random.random()
    (True, True)
    """
    with kept_random():
        seed_all(seed)
        yield


def seed_all(seed: int) -> None:
    """Seed the global generators of torch, Python and NumPy.

    Args:
        seed: of all of them.

    >>> with kept_random():
    ...     seed_all(3)
    ...     torch.initial_seed()
    3
    """
    seed_torch(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (what the user's code draws from)
