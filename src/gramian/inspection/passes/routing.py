"""What chooses among modules: softmaxes over what a matrix gives, and the largest of such scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.inspection.passes.parameter_sources import trace
from gramian.inspection.passes.records import Routing, Source
from gramian.inspection.passes.step_records import Observed

__all__ = ["SOFTMAX", "Routings"]

SOFTMAX = frozenset((F.softmax, torch.softmax, Tensor.softmax))
_LARGEST = frozenset((torch.topk, Tensor.topk, torch.argmax, Tensor.argmax, torch.max, Tensor.max))
# Scores up to which they may choose among modules.
MOST = 64


class Routings:
    """Adds to an `Observed` scores of few choices that are rows of a matrix, as those of experts are.

    Args:
        seen: gets them.
        names: of the model's parameters, by id.
    """

    def __init__(self, seen: Observed, names: Mapping[int, str]) -> None:
        self.seen, self.names = seen, names
        self.weights: dict[int, tuple[Tensor, tuple[Source, ...]]] = {}

    def clear(self) -> None:
        """Lets go of the pass's tensors."""
        self.weights.clear()

    def see(self, name: str, order: int, func: Callable, args: tuple, kwargs: Mapping[str, Any], made: Any) -> None:
        """Keeps what a softmax weighs and what a choice takes.

        Args:
            name, order: the module in which it is, and its place.
            func, args, kwargs: the call.
            made: its result.
        """
        if func not in SOFTMAX and func not in _LARGEST:
            return
        scores = args[0] if args else kwargs.get("input")
        if not isinstance(scores, Tensor) or scores.ndim not in (2, 3) or not scores.numel():
            return
        choices = scores.shape[-1]
        if not 2 <= choices <= MOST:
            return
        known = self.weights.get(id(scores))
        sources = known[1] if known is not None else trace(scores, self.names).sources
        if not sources:
            return
        rows = scores.numel() // choices
        if func in SOFTMAX:
            self.weights[id(made)] = made, sources
            largest = made.detach().float().flatten(0, -2).amax(0)
            self.seen.routings.append(Routing(name, order, sources, tuple(largest.tolist()), rows))
        elif (numbers := _numbers(func, args, kwargs, scores, made)) is not None:
            counts = torch.bincount(numbers.flatten(), minlength=choices)
            chosen = tuple((counts > 0).float().tolist())
            self.seen.routings.append(Routing(name, order, sources, chosen, rows, is_choice=True))


def _numbers(func: Callable, args: tuple, kwargs: Mapping[str, Any], scores: Tensor, made: Any) -> Tensor | None:
    """Which entries of the last dimension a call chooses; `None` where it chooses others."""
    is_topk = func in (torch.topk, Tensor.topk)
    dim = args[1 + is_topk] if len(args) > 1 + is_topk else kwargs.get("dim", -1 if is_topk else None)
    if not isinstance(dim, int) or dim not in (-1, scores.ndim - 1):
        return None
    return made if isinstance(made, Tensor) else made[1]
