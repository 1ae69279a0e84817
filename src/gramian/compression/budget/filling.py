"""Filling: which layer gets how many ranks, where a layer may also stay dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Candidates", "fill", "uniform"]


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a layer can become: its ranks below break-even, each with a price and what it loses; or dense.

    Args:
        losses: entry r is the loss at rank r, `Σ_{j>r} σ_j²`: one more entry than singular values.
        shape: (m, n) of the matrix.
        dense: parameters of the layer where it stays as it is.
        most: the largest rank that is allowed; `None` for any below break-even.
    """

    losses: Tensor  # float64, in memory
    shape: tuple[int, int]
    dense: int
    most: int | None = None

    @property
    def price(self) -> int:
        """Parameters that one rank costs."""
        return sum(self.shape)

    @property
    def top(self) -> int:
        """The largest rank that is allowed and whose factors are smaller than the matrix; 0 where there is none."""
        smaller = (self.dense - 1) // self.price
        return smaller if self.most is None else min(smaller, self.most)

    @cached_property
    def steps(self) -> tuple[Tensor, Tensor]:
        """The hull's steps, single ranks from 1 on and the jump to dense: loss saved per parameter, and price."""
        ranks = torch.arange(1, self.top + 1, dtype=torch.float64)
        slopes = self.losses[1 : self.top + 1] / (self.dense - ranks * self.price)
        at = int(slopes.argmin()) + 1  # the line from there to dense lies below every other rank
        saved = (self.losses[1:at] - self.losses[2 : at + 1]) / self.price
        # Rounding must not put the jump before the ranks that it starts from.
        jump = slopes[at - 1 : at] if at == 1 else torch.minimum(slopes[at - 1 : at], saved[-1:])
        price = torch.full((at,), self.price)
        price[-1] = self.dense - at * self.price
        return torch.cat([saved, jump]), price


def fill(layers: Sequence[Candidates], budget: int) -> list[int | None]:
    """The ranks, `None` where dense, that lose least within a budget of parameters for these layers.

    The loss of a layer over its price is convex along the ranks and then falls to zero at the dense layer. Its convex
    hull leaves out the ranks near break-even, which cost nearly as much as the dense layer and lose something. The
    steps of all hulls are taken by loss saved per parameter, and each set of the first steps is the best there is at
    its price. Where the next step is a jump to dense that no longer fits, what is left buys single ranks.

    Args:
        layers: with at least one rank below break-even each.
        budget: parameters, at least rank 1 everywhere.

    Returns:
        For each layer a rank, or `None` for dense.

    Cost: one sort of all singular values.
    Source: the greedy algorithm for the multiple-choice knapsack problem (Sinha & Zoltners 1979).

    >>> losses = torch.tensor([3.0, 2.0, 1.5, 1.2, 1.1, 0.0], dtype=torch.float64)
    >>> fill([Candidates(losses, (12, 12), 144)], 143), fill([Candidates(losses, (12, 12), 144)], 144)
    ([5], [None])
    """
    spent = sum(layer.price for layer in layers)
    worth, price = (torch.cat(parts) for parts in zip(*(layer.steps for layer in layers), strict=True))
    lengths = [len(layer.steps[1]) for layer in layers]
    owner = torch.repeat_interleave(torch.tensor(lengths))
    order = worth.argsort(descending=True, stable=True)
    total = price[order].cumsum(0)
    taken = int((total <= budget - spent).sum())
    steps = owner[order[:taken]].bincount(minlength=len(layers)).tolist()
    ranks: list[int | None] = [None if n == all_ else 1 + n for n, all_ in zip(steps, lengths, strict=True)]
    left = budget - spent - (int(total[taken - 1]) if taken else 0)
    return _with_the_rest(layers, ranks, left)


def _with_the_rest(layers: Sequence[Candidates], ranks: list[int | None], left: int) -> list[int | None]:
    """The ranks with more of them, by loss saved per parameter, for what is left of the budget."""
    entries = []
    for i, (layer, rank) in enumerate(zip(layers, ranks, strict=True)):
        if rank is not None:
            num = min(layer.top - rank, left // layer.price + 1)  # one that does not fit ends the filling
            saved = (layer.losses[rank : rank + num] - layer.losses[rank + 1 : rank + num + 1]) / layer.price
            entries += [(-w, i, layer.price) for w in saved.tolist()]
    filled = list(ranks)
    for _, i, price in sorted(entries):
        if price > left:
            break  # and no further: more budget never loses more
        rank = filled[i]
        assert rank is not None
        filled[i], left = rank + 1, left - price
    return filled


def uniform(layers: Sequence[Candidates], budget: int) -> list[int | None]:
    """The same share of its parameters for each layer, where nothing tells which matter more.

    Args:
        layers: as in `fill`.
        budget: parameters.

    Returns:
        For each layer a rank; all `None` where the budget holds all of them dense.

    Cost: none to speak of.
    Source: the definition.

    >>> uniform([Candidates(torch.ones(13), (12, 12), 144), Candidates(torch.ones(5), (4, 20), 80)], 150)
    [4, 2]
    """
    total = sum(layer.dense for layer in layers)
    if budget >= total:
        return [None] * len(layers)
    share = budget / total
    ranks = [max(1, min(layer.top, int(share * layer.dense) // layer.price)) for layer in layers]
    over = sum(r * layer.price for r, layer in zip(ranks, layers, strict=True)) - budget
    while over > 0:  # small layers at rank 1 may cost more than their share
        i = max(range(len(layers)), key=lambda i: (ranks[i] > 1, ranks[i] * layers[i].price))
        ranks[i] -= 1
        over -= layers[i].price
    return list(ranks)
