"""Gates: values between zero and an end that multiply others, however they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.inspection.passes.gate_functions import (
    ADDCMUL,
    ADDITIONS,
    DIFFERENCES,
    FUNCTIONS,
    LERP,
    MOVES,
    NEGATIONS,
    PRODUCTS,
    QUOTIENTS,
    REVERSED,
    SELF_GATED,
    SUMS,
)
from gramian.inspection.passes.parameter_sources import trace
from gramian.inspection.passes.records import Gate
from gramian.inspection.passes.step_records import Observed

__all__ = ["Gating"]

# Products looked at in a pass: of a long recurrence, those of the first steps.
MOST_GATES = 256

# An end counts as zero within this share of the range.
ZERO = 1e-3


@dataclass(frozen=True)
class Bounded:
    """Values with ends.

    Attributes:
        values: themselves.
        before: the input of the function that made them.
        order, function: of it.
        low, high: their ends.
        is_flipped: whether they fall where the input grows.
        gate: for a self-gated unit, the gate as a function of the input.
    """

    values: Tensor
    before: Tensor
    order: int
    function: str
    low: float
    high: float
    is_flipped: bool = False
    gate: Callable[[Tensor], Tensor] | None = None

    @property
    def end(self) -> float:
        """The end that is not zero, or 0.0 where none is zero."""
        near, far = sorted((self.low, self.high), key=abs)
        return far if abs(near) <= ZERO * abs(far) else 0.0

    def moved(self, values: Tensor, factor: float = 1.0, shift: float = 0.0) -> Bounded:
        """The same after a function factor · v + shift."""
        ends = sorted((factor * self.low + shift, factor * self.high + shift))
        return replace(self, values=values, low=ends[0], high=ends[1], is_flipped=self.is_flipped ^ (factor < 0))


@dataclass(frozen=True)
class Passed:
    """Values that gates have passed, and, for a product, what was multiplied."""

    values: Tensor
    gates: list[Gate]
    given: Tensor | None = None


class Gating:
    """Finds the gates among the operations of a forward pass, and adds them to an `Observed`.

    Args:
        seen: gets them.
        names: of the model's parameters, by id.
        read: gives the numbers of scalars on the device to a function.
        live: whether the pass is one of the user's own, in which nothing may synchronize.
    """

    def __init__(self, seen: Observed, names: Mapping[int, str], read: Callable, *, live: bool) -> None:
        self.seen, self.names, self.read, self.live = seen, names, read, live
        self.clear()

    def clear(self) -> None:
        """Lets go of the pass's tensors."""
        self.bounded: dict[int, Bounded] = {}
        self.differences: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.products: dict[int, Passed] = {}
        self.sums: dict[int, Passed] = {}
        self.singles: list[Gate] = []  # those that are one number for all features

    def see(
        self,
        name: str,
        order: int,
        func: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        given: Sequence[Tensor],
        made: Tensor,
    ) -> None:
        """Keeps what an operation shows of gates; its arguments are those of `Operations.see`."""
        if not made.is_floating_point() or not given:
            return
        if func in FUNCTIONS:
            self._keep(Bounded(made, given[0], order, *FUNCTIONS[func]))
        elif func in SELF_GATED:
            function, gate = SELF_GATED[func]
            self._keep(Bounded(made, given[0], order, function, 0.0, 1.0, gate=gate))
        elif func is F.glu:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            half = given[0].shape[dim] // 2
            value, before = given[0].narrow(dim, 0, half), given[0].narrow(dim, half, half)
            gate = Bounded(before.detach().sigmoid(), before, order, "sigmoid", 0.0, 1.0)
            self._product(name, order, gate, value, made)
        elif func in PRODUCTS and len(args) == 2:
            self._multiply(name, order, args, made)
        elif func in QUOTIENTS and len(args) == 2 and isinstance(args[1], (int, float)) and args[1]:
            self._scale(given[0], made, 1 / args[1])
        elif func in ADDITIONS and len(args) == 2:
            self._add(args, made)
        elif func in DIFFERENCES and len(args) == 2:
            self._subtract(args, made)
        elif func in REVERSED and len(args) == 2:
            self._subtract(args[::-1], made)
        elif func in NEGATIONS:
            self._scale(given[0], made, -1.0)
        elif func in MOVES:
            self.divided(func, given, (made,))
        elif func in SUMS:
            self._sum(given[0], made)
        elif func in LERP and len(given) == 3 and id(given[2]) in self.bounded:
            start, end, weight = given
            for gate in self._product(name, order, self.bounded[id(weight)], end, made):
                self._pair(gate, start, end)
        elif func in ADDCMUL and len(given) == 3:
            self._multiply(name, order, given[1:], made)
            self._add_to(made, given[0], made)

    def divided(self, func: Callable, given: Sequence[Tensor], parts: Any) -> None:
        """Keeps that an operation's results, one or several, are parts of what it was given."""
        if func not in MOVES or not given or not isinstance(parts, (tuple, list)):
            return
        for kept in (self.products, self.sums):
            if id(given[0]) in kept:
                whole = kept[id(given[0])]
                kept |= {id(part): replace(whole, values=part) for part in parts if isinstance(part, Tensor)}
        if id(given[0]) in self.bounded:
            for part in parts:
                if isinstance(part, Tensor):
                    self._keep(self.bounded[id(given[0])].moved(part))

    def _keep(self, bounded: Bounded) -> None:
        self.bounded[id(bounded.values)] = bounded

    def _scale(self, given: Tensor, made: Tensor, factor: float, shift: float = 0.0) -> None:
        if id(given) in self.bounded:
            self._keep(self.bounded[id(given)].moved(made, factor, shift))
        if id(given) in self.products and not shift:
            self.products[id(made)] = replace(self.products[id(given)], values=made, given=None)

    def _multiply(self, name: str, order: int, factors: Sequence[Any], made: Tensor) -> None:
        for one, other in (factors, factors[::-1]):
            if not isinstance(one, Tensor):
                continue
            if isinstance(other, (int, float)):
                self._scale(one, made, float(other))
            elif isinstance(other, Tensor) and id(one) in self.bounded and id(other) not in self.names:
                gate = self.bounded[id(one)]
                if self._is_mask(other):
                    self._keep(gate.moved(made))
                elif gate.end:
                    self._product(name, order, gate, other, made)

    def _is_mask(self, other: Tensor) -> bool:
        """Whether a factor is 0 or 1, or may be: in the user's own pass its values are not waited for."""
        if other.requires_grad or id(other) in self.bounded:
            return False
        if self.live or not other.is_floating_point():
            return True
        return bool(((other == 0) | (other == 1)).all() & other.any())  # all zero is a state at the first step

    def _product(self, name: str, order: int, gate: Bounded, value: Tensor, made: Tensor) -> list[Gate]:
        """Keeps a gate and what it multiplies; returns it, or nothing where values multiply a function of their own."""
        self.seen.weighing.add(gate.order)
        if len(self.seen.gates) >= MOST_GATES:
            return []
        found, other = (
            trace(gate.before if gate.gate else _with_graph(gate), self.names),
            trace(value, self.names, is_before=True),
        )
        if value is gate.before or (found.ends and found.ends == other.ends) or not value.is_floating_point():
            return []
        kept = Gate(name, gate.order, order, gate.function, found.sources, gate.is_flipped, found.depends)
        kept.weighs = id(value) in self.bounded and self.bounded[id(value)].end != 0.0
        kept.carries = any(_same(kept, before) for before in self._behind(self.sums, value))
        minuend = self.differences.get(id(value))
        if minuend is not None:
            kept.carries |= any(_same(kept, before) for before in self._behind(self.sums, minuend[1]))
        self._measure(kept, gate, value)
        self.seen.gates.append(kept)
        self.products[id(made)] = Passed(made, [*self._behind(self.products, made), kept], value)
        return [kept]

    def _measure(self, kept: Gate, gate: Bounded, value: Tensor) -> None:
        values = (gate.values.detach().float() / gate.end) if gate.gate is None else gate.gate(gate.before.detach())
        before = gate.before.detach().float()
        counts = values != 0 if gate.function != "hardsigmoid" else torch.ones_like(values, dtype=torch.bool)
        number = counts.sum().clamp(min=1)
        level = before.mean() if before.numel() == values.numel() else values.clamp(1e-30, 1 - 1e-7).logit().mean()
        is_level_flipped = gate.is_flipped and before.numel() != values.numel()

        def keep(mean: float, opened: float, level: float, size: float) -> None:
            kept.mean, kept.opened, kept.size = mean, opened, size**0.5
            kept.level = -level if is_level_flipped else level

        self.read(
            (
                (values * counts).sum() / number,
                (values > 0.5).sum() / number,
                level,
                value.detach().float().square().mean(),
            ),
            keep,
        )
        if values.shape[-1:] == (1,) and value.ndim == values.ndim:
            self.singles.append(kept)

    def _add(self, args: Sequence[Any], made: Tensor) -> None:
        for one, other in (args, args[::-1]):
            if not isinstance(one, Tensor):
                continue
            if isinstance(other, (int, float)):
                self._scale(one, made, 1.0, float(other))
            elif isinstance(other, Tensor):
                self._add_to(one, other, made)

    def _add_to(self, product: Tensor, other: Tensor, made: Tensor) -> None:
        """A sum of what gates pass and another value."""
        gates, others = self._behind(self.products, product), self._behind(self.products, other)
        if not gates:
            return
        for gate in gates:
            gate.has_skip |= not others
            gate.is_partnered |= any(_same(gate, o) and gate.is_flipped != o.is_flipped for o in others)
        given = self.products[id(product)].given
        if id(given) in self.differences and self.differences[id(given)][2] is other and len(gates) == 1:
            self._pair(gates[0], other, self.differences[id(given)][1])
        self.sums[id(made)] = Passed(made, [*self._behind(self.sums, made), *gates])

    def _pair(self, gate: Gate, other: Tensor, value: Tensor) -> None:
        """Keeps that a gate g makes other + g (value − other): it passes the value, and 1 − g the other."""
        partner = replace(gate, is_flipped=not gate.is_flipped, is_partnered=True, has_skip=False)
        partner.carries = any(_same(gate, before) for before in self._behind(self.sums, other))
        gate.is_partnered, gate.has_skip = True, False
        self.seen.gates.append(partner)

        def keep(size: float, other: float) -> None:
            partner.mean, partner.opened, partner.level = 1 - gate.mean, 1 - gate.opened, gate.level
            gate.size, partner.size = size**0.5, other**0.5

        self.read([t.detach().float().square().mean() for t in (value, other)], keep)

    def _subtract(self, args: Sequence[Any], made: Tensor) -> None:
        left, right = args
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            self.differences[id(made)] = made, left, right
        elif isinstance(left, Tensor) and isinstance(right, (int, float)):
            self._scale(left, made, 1.0, -float(right))
        elif isinstance(right, Tensor) and isinstance(left, (int, float)):
            self._scale(right, made, -1.0, float(left))

    def _sum(self, given: Tensor, made: Tensor) -> None:
        for gate in self._behind(self.products, given):
            if any(gate is single for single in self.singles):
                gate.times = max(1, given.numel() // max(1, made.numel()))

    def _behind(self, kept: Mapping[int, Passed], t: Tensor) -> list[Gate]:
        return kept[id(t)].gates if id(t) in kept else []


def _with_graph(gate: Bounded) -> Tensor:
    """The gate's values, or its pre-activations where they were computed without a graph."""
    return gate.values if gate.values.grad_fn is not None else gate.before


def _same(one: Gate, other: Gate) -> bool:
    """Whether two gates are made with the same parameters by the same function."""
    if one.sources or other.sources:
        return one.sources == other.sources and one.function == other.function
    return one.order == other.order
