"""Parameters that meet other values entry by entry, and in no product of matrices: state matrices, gains, offsets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gramian.inspection.passes.gate_functions import (
    ADDCMUL,
    ADDITIONS,
    DIFFERENCES,
    LERP,
    PRODUCTS,
    QUOTIENTS,
    REVERSED,
)
from gramian.inspection.passes.observed import Observed

__all__ = ["ElementWise"]

_BY_ENTRY = (
    ADDITIONS | PRODUCTS | DIFFERENCES | REVERSED | QUOTIENTS | LERP | ADDCMUL | {Tensor.__rtruediv__, torch.where}
)
# Functions that take a matrix as one; also those with names that begin like a convolution's.
_AS_MATRIX = frozenset((
    "linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "addbmm", "baddbmm",
    "addmv", "einsum", "tensordot", "chain_matmul", "multi_dot", "embedding", "embedding_bag", "cdist",
    "scaled_dot_product_attention", "cosine_similarity",
))  # fmt: skip


class ElementWise:
    """Follows values that are made of parameters alone, up to the first functions that take others beside them.

    Args:
        names: of the model's parameters, by id.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self.names = names
        self.made: dict[int, tuple[Tensor, frozenset[str]]] = {}  # tensors are kept, so that no id is used twice

    def clear(self) -> None:
        """Lets all tensors go."""
        self.made.clear()

    def see(self, seen: Observed, func: Callable, given: Sequence[Tensor], made: Tensor) -> None:
        """An operation took `given` and made `made`: keeps how it takes values of parameters."""
        of = [self._parameters(t) for t in given]
        if not any(of):
            return
        function = getattr(func, "__name__", "")
        if function in _AS_MATRIX or function.startswith("conv"):
            seen.multiplied |= frozenset().union(*of)
        elif all(of):
            self.made[id(made)] = made, frozenset().union(*of)
        elif func in _BY_ENTRY:
            one = [parameters for t, parameters in zip(given, of, strict=True) if parameters]
            seen.by_entry |= frozenset().union(*one)

    def _parameters(self, t: Tensor) -> frozenset[str]:
        if id(t) in self.names:
            return frozenset((self.names[id(t)],))
        return self.made[id(t)][1] if id(t) in self.made else frozenset()
