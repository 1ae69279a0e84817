"""The terms of which a loss is the sum: which have no gradient, and which are sums over the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gramian.batch import num_samples
from gramian.inspection.passes.gate_functions import ADDITIONS, DIFFERENCES, NEGATIONS, PRODUCTS, QUOTIENTS, REVERSED
from gramian.objective import Objective
from gramian.operators.cuts import nodes_of
from gramian.seeding import seed_torch

if TYPE_CHECKING:
    from gramian.inspection.experiments.replay import Asked

__all__ = ["Mixed", "Term", "Terms", "mixed_terms", "scalar_terms", "silent_terms"]

_MEANS = {torch.mean, Tensor.mean, torch.sum, Tensor.sum}
_LINEAR = ADDITIONS | DIFFERENCES | REVERSED | NEGATIONS | PRODUCTS | QUOTIENTS | _MEANS
# Samples of the halves; shares by which sums and means may miss theirs, the latter since noise is drawn anew.
ENOUGH, SUM, MEAN = 8, 0.02, 0.3
# Terms that are looked at.
MOST = 64
# How parameters are moved, and the share of a value that is no rounding.
MOVED, CHANGED = 0.05, 1e-5


@dataclass
class _Node:
    """A value of the loss, and the values of which it is the sum, up to factors."""

    value: Tensor
    parts: list[tuple[float, _Node]] = field(default_factory=list)


@dataclass(frozen=True)
class Term:
    """A term's values, without a graph, and whether a gradient of it reaches parameters."""

    value: Tensor
    is_reached: bool


class Terms(TorchFunctionMode):
    """Follows sums, differences and multiples, up to the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: dict[int, _Node] = {}

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        parts: list[tuple[float, _Node]] = []
        with suppress(RuntimeError):  # inside torch.vmap, where values cannot be read
            parts = self._parts(func, args) if func in _LINEAR else []
        made = func(*args, **kwargs)
        if isinstance(made, Tensor) and parts:
            self.nodes[id(made)] = _Node(made, parts)
        return made

    def _parts(self, func: Callable, args: tuple) -> list[tuple[float, _Node]]:
        """The values that a call adds up, with their factors; none, where it multiplies values of the network."""
        tensors = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        factors = [1.0] * len(tensors)
        if func in PRODUCTS | QUOTIENTS:
            free = [t for t in tensors if t.ndim or t.requires_grad]
            if len(free) != 1 or (func in QUOTIENTS and args[0] is not free[0]) or len(args) != 2:
                return []
            other = next(a for a in args if a is not free[0]) if args[0] is not args[1] else 1.0
            if isinstance(other, Tensor) and other.numel() != 1:
                return []
            tensors, factors = free, [float(other) if func in PRODUCTS else 1.0 / float(other or 1.0)]
        elif func in NEGATIONS:
            factors = [-1.0] * len(tensors)
        elif func in DIFFERENCES | REVERSED and len(args) == 2:
            signs = (1.0, -1.0) if func in DIFFERENCES else (-1.0, 1.0)
            factors = [s for s, a in zip(signs, args, strict=True) if any(a is t for t in tensors)]
        return [(f, self.nodes.get(id(t)) or _Node(t)) for f, t in zip(factors, tensors, strict=True)]

    def leaves(self, total: Tensor, *, are_scalars: bool) -> list[tuple[float, _Node]]:
        """The terms of the loss, with their factors.

        Args:
            total: the loss.
            are_scalars: whether only single numbers are taken apart.
        """
        node = self.nodes.get(id(total)) or _Node(total)
        found = list(islice(_leaves(node, are_scalars), MOST + 1))
        return found if len(found) <= MOST else [(1.0, _Node(total))]

    def read(self, total: Tensor, parameters: Iterable[Tensor]) -> list[Term]:
        """The terms down to tensors, without their graphs.

        Args:
            total: the loss.
            parameters: by which it may be differentiated.
        """
        wanted = {id(p) for p in parameters if p.requires_grad}
        leaves = self.leaves(total, are_scalars=False)
        return [Term(node.value.detach(), _reaches(node.value, wanted)) for _, node in leaves]


def _leaves(node: _Node, are_scalars: bool, factor: float = 1.0) -> Iterator[tuple[float, _Node]]:
    if not node.parts or (are_scalars and any(part.value.ndim for _, part in node.parts)):
        yield factor, node
        return
    for by, part in node.parts:
        yield from _leaves(part, are_scalars, factor * by)


def scalar_terms(run: Callable[[], Tensor]) -> list[tuple[float, float]]:
    """The single numbers of which a loss is the sum, each with its factor.

    Args:
        run: computes the loss.

    Returns: factors and terms, of which there may be one.
    Raises: what `run` raises.
    Cost: that of the loss.
    """
    with Terms() as terms:
        total = run()
        return [(f, float(node.value.detach())) for f, node in terms.leaves(total, are_scalars=True)]


def _terms(
    model: nn.Module, batch: Any, objective: Objective, *, are_scalars: bool = False
) -> list[tuple[float, Tensor]]:
    """The terms of the loss of a batch, each with its factor."""
    seed_torch(0)
    with Terms() as terms, torch.enable_grad():
        total, _ = objective.loss(model, batch)
        return [(factor, node.value) for factor, node in terms.leaves(total, are_scalars=are_scalars)]


def silent_terms(asked: Asked) -> tuple[int, int, float] | None:
    """Terms that depend on the parameters, and that no gradient reaches.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: how many, of how many terms, and the first one's mean; `None` where there are none.
    Raises: what the model raises.
    Cost: a forward pass of 16 samples where there are some.
    """
    terms = asked.replay.parts
    silent = [i for i, t in enumerate(terms) if not t.is_reached and t.value.numel()]
    if not silent or not any(t.is_reached for t in terms):
        return None
    # x − x.detach() is zero, and has a gradient on purpose.
    silent = [i for i in silent if not any(j != i and _is_equal(terms[i].value, t.value) for j, t in enumerate(terms))]
    if not silent:
        return None
    parameters = [p for p in asked.model.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for p in parameters:
                noise = torch.randn(p.shape, generator=generator).to(p)
                p.add_(noise * (p.square().mean().sqrt() + 1e-3), alpha=MOVED)
        again = _terms(asked.model, asked.batch, asked.objective)
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)
    if len(again) != len(terms):
        return None
    pairs = ((terms[i].value, again[i][1].detach()) for i in silent)
    moved = [a for a, b in pairs if float((b - a).abs().max()) > CHANGED * float(a.abs().max() + 1e-12)]
    return (len(moved), len(terms), float(moved[0].float().mean())) if moved else None


def _reaches(value: Tensor, wanted: set[int]) -> bool:
    """Whether the graph of a value has one of these parameters."""
    if id(value) in wanted:
        return True
    for node in nodes_of(value):
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in wanted:
            return True
        if not node.next_functions and variable is None:
            return True  # a function of the user's own, which may run a backward pass inside
    return False


def _is_equal(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one.detach().abs(), two.detach().abs())


@dataclass(frozen=True)
class Mixed:
    """A loss of which one term is a sum over the samples and another their mean.

    Attributes:
        num: samples of a batch.
        ratio: the gradient's size of the summed terms over that of the others, on the first batch.
    """

    num: int
    ratio: float


def mixed_terms(asked: Asked) -> Mixed | None:
    """Look for a loss of sums and means.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: a `Mixed`, or `None`.
    Raises: what the model raises.
    Cost: three evaluations of the loss where it has several terms; a training step or two where these are mixed.
    """
    num = num_samples(asked.seen.batches[0])
    if num < ENOUGH or asked.replay.num_terms < 2:
        return None

    def kind(whole: float, one: float, two: float) -> str:
        ratio = (one + two) / whole if abs(whole) > 1e-8 else 0.0
        is_sum = abs(ratio - 1) < SUM and min(abs(one), abs(two)) > SUM * abs(whole)
        is_mean = abs(ratio - 2) < MEAN and one != two
        return "sum" if is_sum else "mean" if is_mean else ""

    halves = (slice(0, ENOUGH // 2), slice(ENOUGH // 2, ENOUGH))
    # Each with its factor, which makes a mean of a sum where it is one over how many count in the batch.
    runs = [[f * v for f, v in scalar_terms(asked.of_part(rows))] for rows in (slice(0, ENOUGH), *halves)]
    if len({len(run) for run in runs}) > 1:
        return None
    found = [kind(*values) for values in zip(*runs, strict=True)]
    if not {"sum", "mean"} <= set(found):
        return None
    terms = _terms(asked.model, asked.seen.batches[0], asked.objective, are_scalars=True)
    if len(terms) != len(found):
        return None
    parameters = [p for p in asked.model.parameters() if p.requires_grad]

    def size(kind: str) -> float:
        chosen = [f * t for (f, t), k in zip(terms, found, strict=True) if k == kind and t.requires_grad]
        if not chosen:
            return 0.0
        grads = torch.autograd.grad(torch.stack(chosen).sum(), parameters, retain_graph=True, allow_unused=True)
        return sum(float(g.double().square().sum()) for g in grads if g is not None) ** 0.5

    summed, averaged = size("sum"), size("mean")
    return Mixed(num, summed / averaged) if averaged > 0 else None
