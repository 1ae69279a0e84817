"""Pruning: weights set to zero, those that remain moved to make up for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gramian.compression.layers.feedback import Feedback, settle
from gramian.errors import InputError

__all__ = ["Pattern", "expected_cost", "pattern_of", "pruned", "saliencies", "shares_of_zeros"]

MOST_ZEROS = 0.95
"""The largest share of zeros of a layer, which a raw limit would empty."""
STEP = 32
"""Columns among which zeros are chosen together."""


class Pattern(NamedTuple):
    """Of every `of` neighboring weights of a row at least `zeros` are zero.

    >>> str(Pattern(2, 4))
    '2:4'
    """

    zeros: int
    of: int

    def __str__(self) -> str:
        return f"{self.zeros}:{self.of}"


def pattern_of(text: str) -> Pattern:
    """The pattern that a text names, `"2:4"` or `"4:8"`.

    Raises:
        InputError: it names none.
    """
    parts = text.split(":")
    if len(parts) == 2 and all(part.isdigit() for part in parts):
        zeros, of = map(int, parts)
        if 0 < zeros < of <= 64:
            return Pattern(zeros, of)
    raise InputError(f"compress: a pattern of zeros is like '2:4', two of every four weights zero; got {text!r}")


def saliencies(w: Tensor, feedback: Feedback) -> Tensor:
    """What each weight's removal costs, if those that are settled after it make up for it: `½ g_i w_ij² / U_jj²`.

    Args:
        w: (m, n).
        feedback: of its layer.

    Returns:
        (m, n), in the unit of the loss.

    Cost: none to speak of.
    Source: the optimal brain surgeon's saliency (Hassibi & Stork 1992), along a fixed order.

    >>> one = torch.ones(2)
    >>> saliencies(torch.tensor([[1.0, 2.0]]), Feedback(torch.arange(2), one, one[:1]))
    tensor([[0.5000, 2.0000]])
    """
    return 0.5 * feedback.outputs[:, None].to(w.dtype) * w.square() * feedback.costs.to(w.dtype)


def shares_of_zeros(layers: Sequence[tuple[Tensor, Feedback]], share: float) -> list[float]:
    """The share of zeros of each layer, where a share of all weights goes by one limit on what their removal costs.

    Args:
        layers: matrices and their feedback.
        share: of all weights.

    Returns:
        A share for each layer; none above `MOST_ZEROS`, which the others make up for.

    Cost: a sort of all saliencies.
    Source: the definition.

    >>> one = torch.ones(4)
    >>> feedback = Feedback(torch.arange(4), one, one[:1])
    >>> shares_of_zeros([(torch.tensor([[1.0, 1, 1, 9]]), feedback), (torch.tensor([[2.0, 9, 9, 9]]), feedback)], 0.5)
    [0.75, 0.25]
    """
    each = [saliencies(w, feedback.by_groups(1, reverse=True)).flatten().double() for w, feedback in layers]
    counts = torch.tensor([len(one) for one in each])
    # The largest of a layer are never removed.
    kept = [
        one.sort().values.index_fill(0, torch.arange(int(MOST_ZEROS * len(one)), len(one)), torch.inf) for one in each
    ]
    owner = torch.repeat_interleave(torch.arange(len(each)), counts)
    lowest = torch.cat(kept).argsort(stable=True)[: round(share * int(counts.sum()))]
    zeros = owner[lowest].bincount(minlength=len(each))
    return (zeros.double() / counts).tolist()


def expected_cost(w: Tensor, share: float | str, feedback: Feedback) -> float:
    """The sum of the saliencies of the weights that `pruned` would remove as they are at first.

    Args:
        w: (m, n).
        share: of all weights, or a pattern.
        feedback: of its layer.
    """
    each = saliencies(w.double(), feedback.by_groups(1, reverse=True))
    if not isinstance(share, str):
        return float(each.flatten().sort().values[: round(share * each.numel())].sum())
    pattern = pattern_of(share)
    whole = each[:, : each.shape[1] // pattern.of * pattern.of].unflatten(1, (-1, pattern.of))
    return float(whole.sort(2).values[:, :, : pattern.zeros].sum())


def pruned(w: Tensor, share: float | Pattern, feedback: Feedback) -> Tensor:
    """The matrix with a share of its weights zero, and the others moved to make up for them.

    Args:
        w: (m, n).
        share: of all weights, or a pattern that every row has.
        feedback: of its layer.

    Returns:
        (m, n).

    Cost: `m n²` multiplications.
    Source: SparseGPT (Frantar & Alistarh 2301.00774), §3.3 and §3.4; here inputs of small moments are settled first,
    and rows compete by what their output counts.

    >>> one = torch.ones(4)
    >>> pruned(torch.tensor([[1.0, -3.0, 2.0, 4.0]]), Pattern(2, 4), Feedback(torch.arange(4), one, one[:1]))
    tensor([[ 0., -3.,  0.,  4.]])
    """
    # Where inputs of large moments come first, what makes up for them are large weights of inputs of small moments,
    # which then have to go too.
    size, step = (share.of, share.of) if isinstance(share, Pattern) else (1, STEP)
    feedback = feedback.by_groups(size, reverse=True)
    first = saliencies(w, feedback)[:, feedback.order]
    num_zeros = 0 if isinstance(share, Pattern) else round(share * first.numel())
    least = torch.zeros_like(first, dtype=torch.bool).flatten()
    least = least.scatter_(0, first.flatten().argsort(stable=True)[:num_zeros], True).view_as(first)

    def rule(columns: Tensor, diagonal: Tensor, place: slice) -> Callable[[Tensor, int], Tensor]:
        score = columns.square() / diagonal.square()
        if isinstance(share, Pattern):
            zeros = max(0, share.zeros - (share.of - columns.shape[1]))
            at = score.topk(zeros, dim=1, largest=False).indices
            kept = torch.ones_like(columns).scatter_(1, at, 0.0)
        else:  # as many as had the least saliency at first; which ones, is chosen as they are now
            score = (score * feedback.outputs[:, None].to(score.dtype)).flatten()
            num = int(least[:, place].sum())
            kept = torch.ones_like(score).scatter_(0, score.topk(num, largest=False).indices, 0.0).view_as(columns)
        return lambda column, j: column * kept[:, j]

    return settle(w, feedback, rule, step)[0]
