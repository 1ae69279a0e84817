"""Rounding a matrix to integers of few bits with a scale for each row, or for each group of columns of a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gramian.checkpoint.packing import spread
from gramian.compression.layers.feedback import Feedback, settle

__all__ = ["BITS", "GROUP", "Codes", "noise", "noises", "rounded", "scales_of"]

BITS = (2, 3, 4, 5, 6, 7, 8)
"""The numbers of bits that a code can have."""
GROUP = 64
"""Columns that share a scale below eight bits, where nothing else is asked for."""
SAMPLE = 32
"""Rows that are rounded to see what it costs."""
REACHES, EXCESS = (0.0, 0.5, 1.0), 1.3
"""How far scales are on the way from the one that loses least, were each weight rounded for itself, to the one that
reaches the largest weight; and how many times more than expected a row costs that the next of them is tried for."""
COARSE, FINE = tuple(2.0**-k for k in range(7)), (1.3, 1.14, 0.88, 0.8, 0.72)
"""Scales that are tried, as shares of the one that reaches the largest weight, and then of the best of these. Clipping
pays where bits are few, and where a column that counts little has a large weight."""


class Codes(NamedTuple):
    """Integers and scales: `W_ij ≈ c_ij s_ig`, where g is the group of column j.

    Attributes:
        codes: (m, n), int8, from `-2^(bits-1)` to `2^(bits-1) - 1`.
        scales: (m, number of groups), bfloat16; negative where the weight of largest magnitude is positive, since there
            is one more code below zero than above.
    """

    codes: Tensor
    scales: Tensor

    def matrix(self, group: int) -> Tensor:
        """W in float32, from groups of so many columns."""
        return self.codes.float() * spread(self.scales.float(), group, self.codes.shape[1])


def scales_of(w: Tensor, bits: int, group: int, costs: Tensor | None = None, reach: float = 0.0) -> Tensor:
    """The scale of each group of columns that loses least when every weight is rounded to the nearest code.

    Args:
        w: (m, n).
        bits: of a code.
        group: columns that share a scale; the last group may have fewer.
        costs: (n,), what a squared error in each column costs; all the same by default.
        reach: how far on the way, in logarithms, from that scale to the one that reaches the largest weight.

    Returns:
        (m, number of groups), bfloat16; zero where all weights are.

    Cost: twelve roundings of the matrix.
    Source: this library's own; the code for the largest magnitude is that of llama.cpp's Q4_0.

    >>> scales_of(torch.tensor([[1.0, -8.0, 3.0, 0.0]]), 4, 4)
    tensor([[1.]], dtype=torch.bfloat16)
    """
    m, n = w.shape
    num = -(-n // group)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    pad = num * group - n
    parts = torch.nn.functional.pad(w.float(), (0, pad)).reshape(m, num, group)
    weights = torch.ones(n, device=w.device) if costs is None else (costs / costs.max()).float()
    weights = torch.nn.functional.pad(weights, (0, pad)).reshape(num, group)
    largest = parts.gather(2, parts.abs().argmax(2, keepdim=True)) / low
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for round_ in (COARSE, FINE):
        start = largest if round_ is COARSE else best
        for share in round_:
            scale = (share * start).bfloat16().float()
            codes = torch.where(scale == 0, 0.0, parts / scale).round_().clamp_(low, high)
            lost = (weights * (parts - codes * scale).square_()).sum(2, keepdim=True)
            best, least = torch.where(lost < least, scale, best), torch.minimum(lost, least)
    if reach:  # both scales have the sign of the largest weight
        best = best * torch.where(best == 0, 1.0, largest / best) ** reach
    return best[..., 0].bfloat16()


def rounded(w: Tensor, bits: int, group: int, feedback: Feedback | None = None) -> Codes:
    """The matrix in codes of few bits: each weight's error is passed on to the weights that are not rounded yet.

    What makes up for a clipped weight are large changes of others, which can leave the codes' range and be clipped in
    their turn, and the last ones have nothing to pass their errors on to. A row where that happened is rounded again
    with scales that reach further. Where none of this is better, a row is rounded to the nearest codes.

    Args:
        w: (m, n).
        bits: of a code, 2 to 8.
        group: columns that share a scale, in the order of the matrix.
        feedback: of its layer; by default each weight is rounded to the nearest code.

    Returns:
        The codes and scales.

    Cost: `2 m n²` multiplications, and half as many for each time that a row is rounded again.
    Source: GPTQ (Frantar et al. 2210.17323), with scales that are fixed before, so that they do not depend on the
    order; damping by the number of rows in place of a fixed share of the mean diagonal.

    >>> codes = rounded(torch.tensor([[1.0, -8.0, 3.3, 0.0]]), 4, 4)
    >>> codes.codes, codes.matrix(4)
    (tensor([[ 1, -7,  3,  0]], dtype=torch.int8), tensor([[ 1.1406, -7.9844,  3.4219,  0.0000]]))
    """
    w, n = w.float(), w.shape[1]
    scales = scales_of(w, bits, group)
    best = Codes(_codes(w, spread(scales.float(), group, n), bits).to(torch.int8), scales)
    if feedback is None:
        return best
    if group < n:
        feedback = feedback.by_groups(group)
    lost, rows = feedback.quadratic(best.matrix(group) - w), torch.arange(len(w), device=w.device)
    for reach in REACHES:
        found, now = _passed_on(w[rows], bits, group, feedback.of_rows(rows), reach)
        better = now < lost[rows]
        at = rows[better]
        best.codes[at], best.scales[at], lost[at] = found.codes[better], found.scales[better], now[better]
        rows = rows[now > EXCESS * _spread_evenly(found.scales, group, feedback.costs)]
        if not len(rows):
            break
    return best


def _codes(columns: Tensor, scale: Tensor, bits: int) -> Tensor:
    return _nearest(columns, torch.where(scale == 0, torch.inf, scale), bits)


def _nearest(columns: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The codes, where a scale of zero is given as an infinite one."""
    return (columns / scale).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _passed_on(w: Tensor, bits: int, group: int, feedback: Feedback, reach: float) -> tuple[Codes, Tensor]:
    """The codes with errors passed on, and what each row costs, `e_iᵀ H e_i`."""
    n = w.shape[1]
    if group >= n:
        scales = scales_of(w, bits, group, feedback.costs, reach)
    else:
        scales = torch.empty(len(w), -(-n // group), dtype=torch.bfloat16, device=w.device)

    def rule(columns: Tensor, diagonal: Tensor, place: slice) -> Callable[[Tensor, int], Tensor]:
        scale = scales.float()
        if group < n:  # what came before was passed on to them: their range may be another
            scale = scales_of(columns, bits, group, diagonal.square().reciprocal(), reach).float()
            scales[:, feedback.order[place.start] // group] = scale[:, 0].bfloat16()
        one = scale[:, 0]
        divisor = torch.where(one == 0, torch.inf, one)
        return lambda column, j: _nearest(column, divisor, bits).mul_(one)

    settled, lost = settle(w, feedback, rule, group if group < n else 1)
    return Codes(_codes(settled, spread(scales.float(), group, n), bits).to(torch.int8), scales), lost.double()


def _spread_evenly(scales: Tensor, group: int, costs: Tensor) -> Tensor:
    """(m,), what each row is expected to cost, `Σ s_j² / (12 U_jj²)`, if errors spread evenly over a step."""
    each, costs = scales.double(), costs.double()
    if each.shape[1] == 1:
        summed = costs.sum()[None]
    else:
        summed = torch.nn.functional.pad(costs, (0, each.shape[1] * group - len(costs))).reshape(-1, group).sum(1)
    return each.square() @ summed / 12


def noise(w: Tensor, bits: int, group: int, feedback: Feedback) -> float:
    """What `rounded` is expected to cost, in the unit of the loss: `½ Σ g_i s_ij² / (12 U_jj²)`.

    Args:
        w: (m, n).
        bits, group: as in `rounded`.
        feedback: of its layer.

    Returns:
        The cost, if each error is spread evenly over a step between two codes.

    Cost: a search of scales.
    Source: the variance of a rounding error (Widrow 1956), and the cost of an error in `feedback` beside it.

    >>> one = torch.ones(64)
    >>> w = torch.linspace(-1, 1, 64)[None]
    >>> error = rounded(w, 4, 64).matrix(64) - w
    >>> feedback = Feedback(torch.arange(64), one, one[:1])
    >>> abs(noise(w, 4, 64, feedback) / float(feedback.cost(error)) - 1) < 0.1
    True
    """
    each = _spread_evenly(scales_of(w, bits, group, feedback.costs), group, feedback.costs)
    return float(0.5 * (feedback.outputs.double() * each).sum())


def noises(w: Tensor, feedback: Feedback) -> tuple[float, ...]:
    """What rounding is expected to cost for each number of BITS: eight in whole rows, fewer in groups of GROUP.

    It is found on some rows; the others are in proportion to their largest weights. Where codes are few, errors that
    are passed on push weights out of the codes' range. What that adds is measured for up to four bits; beyond, it
    halves with each bit.

    Args:
        w: (m, n).
        feedback: of its layer.

    Returns:
        A cost for each number of bits.

    Cost: a QR decomposition, and `n²` multiplications for each of `6 · SAMPLE` rows.

    >>> one = torch.ones(64)
    >>> found = noises(torch.linspace(-1, 1, 64)[None], Feedback(torch.arange(64), one, one[:1]))
    >>> all(more > fewer for more, fewer in zip(found, found[1:]))
    True
    """
    w, n = w.float(), w.shape[1]
    rows = torch.linspace(0, len(w) - 1, min(SAMPLE, len(w)), device=w.device).long()
    part = feedback.of_rows(rows)
    grouped = part.by_groups(GROUP)  # one decomposition for all numbers of bits
    reaches = {group: _at_full_reach(w, group, feedback) for group in (n, GROUP)}
    found, excess = [], 0.0
    for bits in BITS:
        group, here = (n, part) if bits == 8 else (GROUP, grouped)
        expected = noise(w[rows], bits, group, here)
        if bits <= 4:
            lost = float(here.cost(rounded(w[rows], bits, group, here).matrix(group) - w[rows]))
            excess = max(0.0, lost / expected - 1) if expected > 0 else 0.0
        each = reaches[group]
        share = float(each.sum() / each[rows].sum()) if bool(each[rows].any()) else 1.0
        found.append(expected * share * (1 + excess * 2.0 ** min(0, 4 - bits)))
    return tuple(found)


def _at_full_reach(w: Tensor, group: int, feedback: Feedback) -> Tensor:
    """(m,), in proportion to what rounding each row costs with scales that reach the largest weights."""
    padded = torch.nn.functional.pad(w.abs(), (0, -w.shape[1] % min(group, w.shape[1])))
    largest = padded.unflatten(1, (-1, min(group, w.shape[1]))).amax(2)
    return feedback.outputs.double() * _spread_evenly(largest, group, feedback.costs)
