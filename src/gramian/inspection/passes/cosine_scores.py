"""Scores that are cosines: products of vectors of length one, which a loss is applied to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.inspection.passes.records import Cosines
from gramian.inspection.passes.step_records import Observed
from gramian.operators import leaves_of

__all__ = ["Heads"]

# Products that are remembered; those of a head are the last.
LAST = 8
# Lengths count as one this closely; more loosely in narrow dtypes.
UNIT, NARROW = 1e-3, 2e-2
# Scores below this are masked.
MASKED = -1e3

_DOTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, torch.einsum}
_COSINES = {F.cosine_similarity, torch.cosine_similarity}
_TIMES = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
_OVER = {torch.div, Tensor.div, Tensor.__truediv__}
_TRANSPOSES = [getattr(Tensor, name).__get__ for name in ("T", "mT")]  # as torch names its properties
_MOVES = {
    Tensor.t, torch.t, Tensor.transpose, torch.transpose, Tensor.squeeze, torch.squeeze, Tensor.view, Tensor.reshape,
    Tensor.flatten, Tensor.float, Tensor.to, Tensor.contiguous, Tensor.masked_fill, torch.masked_fill,
    Tensor.masked_fill_, *_TRANSPOSES, torch.neg, Tensor.neg, Tensor.__neg__,
}  # fmt: skip
_JOINS = {torch.cat, torch.concat}
_LOSSES = {F.cross_entropy, F.log_softmax, torch.log_softmax, Tensor.log_softmax}


@dataclass(frozen=True)
class Scored:
    """Products of vectors, times a number: the operands by which it is seen whether they are cosines."""

    values: Tensor
    operands: tuple[Tensor, ...]
    scale: float = 1.0
    learned: Tensor | None = None

    def times(self, values: Tensor, factor: _Factor) -> Scored:
        """The same, times a number."""
        return replace(
            self,
            values=values,
            scale=self.scale * factor.value,
            learned=self.learned if factor.learned is None else factor.learned,
        )


@dataclass(frozen=True)
class _Factor:
    """A number, and the tensor that it is, where training moves it."""

    value: float
    learned: Tensor | None


class Heads:
    """Finds scores that are cosines, and adds the last that a loss is applied to to an `Observed`.

    Args:
        seen: gets them.
        names: of the model's parameters, by id.
    """

    def __init__(self, seen: Observed, names: Mapping[int, str]) -> None:
        self.seen, self.names = seen, names
        self.clear()

    def clear(self) -> None:
        """Lets go of the pass's tensors."""
        self.scored: dict[int, Scored] = {}
        self.products: dict[int, Scored] = {}
        self.scaled: dict[int, Scored] = {}

    def see(
        self, func: Callable, args: tuple, kwargs: Mapping[str, Any], given: Sequence[Tensor], made: Tensor
    ) -> None:
        """Keeps what an operation shows of scores; its arguments are those of `Operations.see`."""
        before = self.scored.get(id(given[0])) if given else None
        if func in _LOSSES and before is not None:
            self._judge(before)
        elif func in _LOSSES and given and given[0].ndim > 1:  # cosines with a margin, say
            size = given[0].shape[1]
            self.seen.has_cosines |= any(
                all(map(_is_unit, one.operands)) for one in self.scored.values() if one.values.shape[-1] == size
            )
        elif (func is F.linear or func in _DOTS) and len(given) == 2 and made.ndim > 1:
            scaled = [self.scaled.get(id(t)) or Scored(t, (t,)) for t in given]
            operands = tuple(t for one in scaled for t in one.operands)
            learned = next((one.learned for one in scaled if one.learned is not None), None)
            self._keep(self.scored, Scored(made, operands, scaled[0].scale * scaled[1].scale, learned))
        elif func in _COSINES and made.ndim > 1:
            self._keep(self.scored, Scored(made, ()))
        elif func in (torch.sum, Tensor.sum) and given and id(given[0]) in self.products:
            self._keep(self.scored, replace(self.products[id(given[0])], values=made))
        elif func in _JOINS and all(id(t) in self.scored for t in given):
            parts = [self.scored[id(t)] for t in given]
            if len({part.scale for part in parts}) == 1:
                operands = tuple(t for part in parts for t in part.operands)
                self._keep(self.scored, replace(parts[0], values=made, operands=operands))
        elif before is not None and func in _MOVES:
            self._keep(self.scored, replace(before, values=made))
        elif func in _TIMES | _OVER and len(args) == 2 and (factor := _factor(func, args)) is not None:
            scaled = self.scored.get(id(factor[0]))
            if scaled is not None:
                self._keep(self.scored, scaled.times(made, factor[1]))
            elif made.ndim > 1:  # one of the vectors, before their product
                self._keep(self.scaled, Scored(made, (factor[0],)).times(made, factor[1]))
        elif func in _TIMES and len(given) == 2 and before is None and made.ndim > 2:
            self._keep(self.products, Scored(made, (given[0], given[1])))

    def _name(self, learned: Tensor | None) -> str:
        """The parameter that a number is made of."""
        if learned is None:
            return ""
        leaves = {id(learned), *leaves_of(learned)}
        return next((self.names[leaf] for leaf in leaves if leaf in self.names), "a parameter")

    def _keep(self, kept: dict[int, Scored], scored: Scored) -> None:
        kept[id(scored.values)] = scored
        while len(kept) > LAST:
            del kept[next(iter(kept))]

    def _judge(self, scored: Scored) -> None:
        scores, scale = scored.values.detach(), abs(scored.scale)
        kept = scores > MASKED
        if not all(map(_is_unit, scored.operands)) or not bool((scores[kept].abs() <= scale * (1 + NARROW)).all()):
            return
        rows = kept.movedim(1, -1) if scores.ndim > 1 else kept
        self.seen.cosines = Cosines(scale, int(rows.sum(-1).max()), self._name(scored.learned))


def _factor(func: Callable, args: tuple) -> tuple[Tensor, _Factor] | None:
    """The tensor that a product or quotient takes times a number, and that number."""
    for values, by in (args, args[::-1]):
        if isinstance(values, Tensor) and values.numel() > 1 and (number := _number(by)):
            learned = by if isinstance(by, Tensor) and by.requires_grad else None
            if func in _TIMES:
                return values, _Factor(number, learned)
            return (values, _Factor(1 / number, learned)) if values is args[0] else None
    return None


def _number(value: Any) -> float:
    """A factor, or 0.0 where it is none."""
    if isinstance(value, Tensor):
        return float(value.detach()) if value.numel() == 1 and value.is_floating_point() else 0.0
    return float(value) if isinstance(value, (int, float)) else 0.0


def _is_unit(t: Tensor) -> bool:
    """Whether the vectors along a dimension have length one."""
    values = t.detach().float()
    within = UNIT if t.dtype in (torch.float32, torch.float64) else NARROW
    return any(bool(((values.square().sum(dim).sqrt() - 1).abs() <= within).all()) for dim in range(t.ndim))
