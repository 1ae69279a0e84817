"""What passes from part to part of a model in shards: batches, what blocks are called with, and gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gramian.batch import mapped
from gramian.errors import UnsupportedError

__all__ = ["HIDDEN", "Arguments", "Call", "Item", "Kept", "filled", "gradient", "hidden_of"]

Arguments = tuple[tuple, dict]


class Place:
    """Where a tensor of a call belongs that waits in the spool."""

    def __init__(self, name: str) -> None:
        self.name = name


HIDDEN = Place("hidden")
"""The place of the hidden states."""


@dataclass(eq=False)
class Item:
    """A batch on its way through the model.

    Args:
        name: in the spool.
        batch: as it came.
        back: whether gradients come back for it.
        draws: of an item that only corrects: how often labels are drawn for it; each draw gives one gradient.

    Attributes:
        calls: what each block is called with, with places for tensors.
        units: of its loss.
        loss: the sum.
    """

    name: str
    batch: Any
    back: bool = True
    draws: int | None = None
    calls: list[Any] = field(default_factory=list)
    units: float = 0.0
    loss: float = 0.0


@dataclass(eq=False)
class Call:
    """A call of a part of the model, as a batch.

    Args:
        item: whose.
        given: what the part is called with, the hidden states' place empty.
        hidden: the hidden states that enter it; for what is outside of the blocks, those that leave the last one.
        gradients: that came back, one for each loss.
        turn: the next of these, where one is used at a time.
    """

    item: Item
    given: Arguments
    hidden: Tensor
    gradients: Tensor
    turn: int = 0


class Kept:
    """Tensors that several calls share, each under one name, and the calls without them.

    Args:
        hidden: what is not kept here.
    """

    def __init__(self, hidden: Tensor) -> None:
        self.hidden, self.tensors = hidden, dict[str, Tensor]()
        self._places: dict[int, Place] = {}

    def without(self, call: Arguments) -> Arguments:
        """A call with places for its tensors."""
        return mapped(call, self._place)

    def _place(self, tensor: Tensor) -> Place:
        if tensor is self.hidden:
            return HIDDEN
        if id(tensor) not in self._places:
            place = self._places[id(tensor)] = Place(str(len(self._places)))
            self.tensors[place.name] = tensor
        return self._places[id(tensor)]


def filled(call: Arguments, tensors: Mapping[str, Tensor]) -> Arguments:
    """A call with the tensors whose names are given in their places."""

    def fill(value: Any) -> Any:
        return tensors[value.name] if isinstance(value, Place) and value.name in tensors else value

    return mapped(call, lambda tensor: tensor, fill)


def gradient(loss: Tensor, leaf: Tensor, *, last: bool) -> Tensor:
    """The gradient of a loss; zero where it does not depend on the leaf. The graph stays unless this is the last."""
    if not loss.requires_grad:
        return torch.zeros_like(leaf)
    (found,) = torch.autograd.grad(loss, leaf, retain_graph=not last, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found


def hidden_of(args: tuple, kwargs: dict) -> Tensor:
    """The hidden states that a block is called with.

    Raises:
        UnsupportedError: the first argument is no tensor.
    """
    found = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(found, Tensor):
        raise UnsupportedError(
            "compress: a block is not called with hidden states first, so that blocks cannot run one by one. Load the "
            "model with from_pretrained, and give that"
        )
    return found
