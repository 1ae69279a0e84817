"""Mixtures whose weights sum to one over the samples, and are then summed up over the components."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.inspection.passes.gate_functions import ADDITIONS, PRODUCTS
from gramian.inspection.passes.step_records import Observed

__all__ = ["Mixtures"]

_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
_LOG_SOFTMAX = {F.log_softmax, torch.log_softmax, Tensor.log_softmax}
_SUMS = {torch.sum, Tensor.sum}
_LOG_SUMS = {torch.logsumexp, Tensor.logsumexp}


class Mixtures:
    """Finds them, and adds the shape of the weights to an `Observed`.

    Args:
        seen: gets it.
    """

    def __init__(self, seen: Observed) -> None:
        self.seen = seen
        self.weights: dict[int, tuple[Tensor, bool]] = {}  # and whether they are logarithms
        self.weighted: dict[int, tuple[Tensor, bool]] = {}

    def clear(self) -> None:
        """Lets go of the pass's tensors."""
        self.weights.clear()
        self.weighted.clear()

    def see(
        self, func: Callable, args: tuple, kwargs: Mapping[str, Any], given: Sequence[Tensor], made: Tensor
    ) -> None:
        """Keeps what an operation shows; its arguments are those of `Operations.see`."""
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if func in _SOFTMAX | _LOG_SOFTMAX:
            if made.ndim == 2 and min(made.shape) > 1 and made.requires_grad and dim in (0, -2):
                self.weights[id(made)] = made, func in _LOG_SOFTMAX
        elif func in ADDITIONS | PRODUCTS and len(given) == 2 and all(t.requires_grad for t in given):
            known = next((self.weights[id(t)] for t in given if id(t) in self.weights), None)
            if known is not None and known[1] == (func in ADDITIONS) and all(t.shape == made.shape for t in given):
                self.weighted[id(made)] = made, known[1]
        elif func in _SUMS | _LOG_SUMS and given and id(given[0]) in self.weighted:
            over = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
            if self.weighted[id(given[0])][1] == (func in _LOG_SUMS) and over in (1, -1):
                self.seen.mixture_over_samples = self.seen.mixture_over_samples or given[0].shape
