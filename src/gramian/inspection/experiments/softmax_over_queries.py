"""Attention whose weights sum to one over the queries, and are then used as weights of the keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.inspection.passes.step_records import Observed

__all__ = ["OverQueries"]

_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_MOVES = {
    F.dropout, torch.dropout, Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type,
    Tensor.type_as, Tensor.contiguous, Tensor.clone, Tensor.nan_to_num, torch.nan_to_num, Tensor.nan_to_num_,
    torch.nan_to_num_, Tensor.masked_fill, torch.masked_fill, Tensor.masked_fill_,
}  # fmt: skip
# Nodes that may stand between a parameter and a product, as its expansion for each sample.
NEAR = 4


class OverQueries:
    """Finds them, and adds the module to an `Observed`.

    Args:
        seen: gets it.
    """

    def __init__(self, seen: Observed) -> None:
        self.seen = seen
        self.products: dict[int, Tensor] = {}
        self.weights: dict[int, Tensor] = {}

    def clear(self) -> None:
        """Lets go of the pass's tensors."""
        self.products.clear()
        self.weights.clear()

    def see(
        self, name: str, func: Callable, args: tuple, kwargs: Mapping[str, Any], given: Sequence[Tensor], made: Tensor
    ) -> None:
        """Keeps what an operation shows; its arguments are those of `Operations.see`."""
        if made.ndim < 3:
            return
        if func in _PRODUCTS and len(given) == 2:
            if id(given[0]) in self.weights:
                self.seen.over_queries.setdefault(name, tuple(given[0].shape))
            elif all(t.requires_grad and not _is_parameter(t) for t in given):
                self.products[id(made)] = made  # scores, by queries and keys
        elif func in _SOFTMAX and given and id(given[0]) in self.products:
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            if dim in (-2, made.ndim - 2) and made.shape[-1] > 1:
                self.weights[id(made)] = made
        elif func in _MOVES and given and id(given[0]) in self.weights and given[0].shape == made.shape:
            self.weights[id(made)] = made
        elif func not in _SOFTMAX and any(id(t) in self.products and t.shape == made.shape for t in given):
            self.products[id(made)] = made  # scaled, or masked


def _is_parameter(t: Tensor) -> bool:
    """Whether values are those of a parameter, seen or repeated, as learned queries are."""
    node = t.grad_fn
    for _ in range(NEAR):
        if node is None or hasattr(node, "variable"):
            return True
        if "Embedding" in node.name():  # rows that the tokens choose
            return False
        if len(node.next_functions) != 1:
            return False
        node = node.next_functions[0][0]
    return False
