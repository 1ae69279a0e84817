"""Parameters that meet other values entry by entry, and in no product of matrices: state matrices, gains, offsets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
from gramian.inspection.passes.step_records import Observed
from gramian.recording.tracking import tensors_of

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
# Functions behind which a parameter is no matrix any more: its entries are logits, or logarithms of sizes.
_OF_ENTRIES = frozenset(("softmax", "log_softmax", "sigmoid", "tanh", "exp", "softplus"))


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

    def see(self, seen: Observed, func: Callable, args: tuple, given: Sequence[Tensor], made: Any) -> None:
        """An operation took `given` and made `made`, one tensor or several: keeps how it takes values of parameters."""
        of = [self._parameters(t) for t in given]
        if not any(of):
            return
        function = getattr(func, "__name__", "")
        if function in _AS_MATRIX or function.startswith("conv"):
            scaling = _scaling(args[0], of) if function == "einsum" and isinstance(args[0], str) else frozenset()
            seen.by_entry |= scaling
            seen.multiplied |= frozenset().union(*of) - scaling
        elif function in _OF_ENTRIES:
            seen.by_entry |= frozenset().union(*of)
        elif all(of):
            if len(of) == 2 and func in PRODUCTS | QUOTIENTS and given[0].shape == given[1].shape:
                seen.scaling |= of[0] | of[1]
            self.made |= {id(t): (t, frozenset().union(*of)) for t in tensors_of((made,))}
        elif func in _BY_ENTRY:
            one = [parameters for t, parameters in zip(given, of, strict=True) if parameters]
            seen.by_entry |= frozenset().union(*one)

    def _parameters(self, t: Tensor) -> frozenset[str]:
        if id(t) in self.names:
            return frozenset((self.names[id(t)],))
        return self.made[id(t)][1] if id(t) in self.made else frozenset()


def _scaling(equation: str, of: Sequence[frozenset[str]]) -> frozenset[str]:
    """The parameters of an einsum each entry of which multiplies entries of another operand, and sums up none."""
    operands = [set(letters) - set(" .") for letters in equation.partition("->")[0].split(",")]
    if len(operands) != len(of):
        return frozenset()
    inside = [any(mine <= other for j, other in enumerate(operands) if j != i) for i, mine in enumerate(operands)]
    return frozenset().union(*(names for names, is_inside in zip(of, inside, strict=True) if is_inside))
