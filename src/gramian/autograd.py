"""Functions of the user's where autograd is off, of which some differentiate on their way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gramian.seeding import noted_random

__all__ = ["CUT_OFF", "NO_GRAPH", "Ungraded"]

# Torch's words for a derivative of what has no graph, and for one by what the graph does not lead to.
NO_GRAPH, CUT_OFF = "does not require grad", "not have been used in the graph"


class Ungraded:
    """Calls a function without a graph where autograd is off, or with one that ends with the call where it needs it.

    A loss of derivatives by inputs (a physics-informed network, forces of an energy) cannot be evaluated under
    `torch.no_grad()`. That shows at its first call, which is made again with a graph and the same random numbers; later
    calls have one from the start.

    Raises: nothing of its own.
    Cost: of the first call without a graph where one is needed, another call; memory of a graph only there.
    Source: this library's own.

    >>> slope = lambda x: torch.autograd.grad(x.requires_grad_().square().sum(), x)[0]
    >>> with torch.no_grad():
    ...     found = Ungraded()(slope, torch.ones(2))
    >>> found, found.requires_grad
    (tensor([2., 2.]), False)
    """

    def __init__(self) -> None:
        self.needed = False

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function returns for the arguments."""
        if torch.is_grad_enabled():
            return function(*args)
        if not self.needed:
            put_back = noted_random()
            try:
                return function(*args)
            except RuntimeError as error:
                if NO_GRAPH not in str(error):
                    raise
            put_back()
            self.needed = True
        with torch.inference_mode(False), torch.enable_grad():
            return _detached(function(*args))


def _detached(value: Any) -> Any:
    """Tensors without their graph, in plain tuples, lists and dicts too; other objects as they are."""
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) in (tuple, list):
        return type(value)(_detached(one) for one in value)
    if type(value) is dict:
        return {key: _detached(one) for key, one in value.items()}
    return value
