"""Data on its way to the first layers: which tensors are made of the inputs and of constants, and of no parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gramian.inspection.passes.batch_roles import key
from gramian.inspection.passes.moments import packed
from gramian.inspection.passes.records import Raw
from gramian.inspection.passes.step_records import Observed
from gramian.recording.tracking import tensors_of

__all__ = ["RawData"]

# Products with weights; the features are in the last dimension of what they take, or, of convolutions, in the second.
_PRODUCTS = frozenset((
    "linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "einsum", "bilinear", "lstm", "gru", "rnn_tanh", "rnn_relu",
))  # fmt: skip
_JOINS = frozenset(("cat", "concat", "concatenate", "hstack"))
# Rows of a layer's data that are kept, and layers.
MOST_ROWS, MOST_LAYERS = 65_536, 32


class RawData:
    """Follows the inputs of a forward pass up to the first products with parameters.

    Args:
        names: of the model's parameters, by id.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self.names = names
        self.raw: dict[int, Tensor] = {}  # kept, so that no id is used twice
        self.joined: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self.made: set[int] = set()  # ids of what parameters have made; one that is used again hides data, and no more

    def start(self, inputs: Iterable[Tensor]) -> None:
        """The model is called with these."""
        self.raw |= {id(t): t for t in inputs}

    def clear(self) -> None:
        """Lets all tensors go."""
        self.raw.clear()
        self.joined.clear()
        self.made.clear()

    def follow(
        self, seen: Observed, place: str, func: Callable, args: tuple, given: Sequence[Tensor], output: Any
    ) -> None:
        """An operation in module `place` took `given`: keeps what it makes of data, and data that meet weights."""
        if not self.raw:
            return
        function = getattr(func, "__name__", "")
        weights = [t for t in given if id(t) in self.names and t.ndim > 1]
        if weights and (function in _PRODUCTS or "conv" in function) and len(seen.raw) < MOST_LAYERS:
            for t in given:
                pieces = [t] if id(t) in self.raw else self.joined.get(id(t), (t, []))[1]
                seen.raw += [Raw(place, _rows(one, function), key(one)) for one in pieces if one.is_floating_point()]
        outputs = list(tensors_of((output,)))
        data = [t for t in given if id(t) in self.raw]
        if not data:
            if any(self._is_made(t) for t in given):
                self.made |= {id(t) for t in outputs}
        elif any(self._is_made(t) for t in given):
            self.made |= {id(t) for t in outputs}
            if function in _JOINS and outputs:
                self.joined[id(outputs[0])] = (outputs[0], data)
        else:
            self.raw |= {id(t): t for t in outputs}

    def _is_made(self, t: Tensor) -> bool:
        """Whether parameters have made a value, or may have."""
        return id(t) not in self.raw and (id(t) in self.names or id(t) in self.made or t.requires_grad)


def _rows(t: Tensor, function: str) -> Tensor:
    """The data as (rows, features)."""
    wide = packed(t.detach())
    if "conv" in function:
        wide = wide.movedim(1, -1) if wide.ndim > 2 else wide
    rows = wide.reshape(-1, wide.shape[-1] if wide.ndim > 1 else 1)
    return rows[:MOST_ROWS].to(torch.float32)
