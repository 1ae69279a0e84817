"""What a direction is: two functions of stacked matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from gramian.optim.batches import State

__all__ = ["Recipe", "Turn"]


@dataclass(frozen=True)
class Turn:
    """What a direction's update is told besides gradient and state.

    Args:
        alive: (K, 1, 1): one, or zero for a matrix whose gradient is missing or not finite: its state is to stay.
        all_alive: whether that is known to be one for all, without waiting for the device.
        due: indices of the matrices whose costly parts are to be made anew in this step; `None` for all.
        options: the parameter group.
    """

    alive: Tensor
    all_alive: bool
    due: Tensor | None
    options: Mapping[str, Any]


class Recipe(NamedTuple):
    """A direction: two functions of stacked matrices `(K, m, n)`, which know nothing of models.

    `init(m, options)` gives the state of matrices shaped as `m`, tensors whose first dimension is K.
    `update(g, state, turn)` takes finite gradients, changes the state in place and returns the direction, of Frobenius
    norm √min(m, n) or less. It may use `g` as a buffer. A part of the state that `init` does not name any more (for
    other options) is dropped, and a matrix that lacks one is `due`.
    """

    init: Callable[[Tensor, Mapping[str, Any]], State]
    update: Callable[[Tensor, State, Turn], Tensor]
