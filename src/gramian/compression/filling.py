"""Filling: which layer gets how many ranks, where a layer may also stay dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Candidates", "fill", "uniform"]


class Candidates(NamedTuple):
    """What a layer can become: its ranks below break-even, each with a price and what it loses; or dense.

    Args:
        losses: entry r is the loss at rank r, `Σ_{j>r} σ_j²`: one more entry than singular values.
        shape: (m, n) of the matrix.
        dense: parameters of the layer where it stays as it is.
    """

    losses: Tensor  # float64, in memory
    shape: tuple[int, int]
    dense: int

    @property
    def price(self) -> int:
        """Parameters that one rank costs."""
        return sum(self.shape)

    @property
    def top(self) -> int:
        """The largest rank whose factors are smaller than the matrix; 0 where there is none."""
        return (self.dense - 1) // self.price

    def jump(self) -> tuple[int, float]:
        """The rank from which the hull goes straight to dense, and the loss saved per parameter on the way."""
        ranks = torch.arange(1, self.top + 1, dtype=torch.float64)
        slopes = self.losses[1 : self.top + 1] / (self.dense - ranks * self.price)
        best = int(slopes.argmax())
        return best + 1, float(slopes[best])


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

    Raises: nothing of its own.
    Cost: one sort of all singular values.
    Source: the greedy algorithm for the multiple-choice knapsack problem (Sinha & Zoltners 1979).

    >>> losses = torch.tensor([3.0, 2.0, 1.5, 1.2, 1.1, 0.0], dtype=torch.float64)
    >>> fill([Candidates(losses, (12, 12), 144)], 143), fill([Candidates(losses, (12, 12), 144)], 144)
    ([5], [None])
    """
    spent = sum(layer.price for layer in layers)
    worth: list[Tensor] = []
    price: list[Tensor] = []
    owner: list[Tensor] = []
    jumps = []
    for i, layer in enumerate(layers):
        at, slope = layer.jump()
        jumps.append(at)
        saved = (layer.losses[1:at] - layer.losses[2 : at + 1]) / layer.price
        # Rounding must not put a jump before the ranks that it starts from.
        slope = min(slope, float(saved.min())) if len(saved) else slope
        worth.append(torch.cat([saved, torch.tensor([slope], dtype=torch.float64)]))
        price.append(torch.tensor([layer.price] * (at - 1) + [layer.dense - at * layer.price]))
        owner.append(torch.full((at,), i))
    order = torch.cat(worth).argsort(descending=True, stable=True)
    prices, owners = torch.cat(price)[order], torch.cat(owner)[order]
    taken = int((prices.cumsum(0) <= budget - spent).sum())
    steps = owners[:taken].bincount(minlength=len(layers)).tolist()
    ranks: list[int | None] = [None if n == at else 1 + n for n, at in zip(steps, jumps, strict=True)]
    return _with_the_rest(layers, ranks, budget - spent - int(prices[:taken].sum()))


def _with_the_rest(layers: Sequence[Candidates], ranks: list[int | None], left: int) -> list[int | None]:
    """The ranks with more of them, by loss saved per parameter, for what is left of the budget."""
    entries = []
    for i, (layer, rank) in enumerate(zip(layers, ranks, strict=True)):
        if rank is not None:
            more = layer.losses[rank : layer.top] - layer.losses[rank + 1 : layer.top + 1]
            num = min(len(more), left // layer.price)
            entries += [(-w / layer.price, i, layer.price) for w in more[:num].tolist()]
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

    Raises: nothing of its own.
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
