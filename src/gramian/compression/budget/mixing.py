"""Mixing: one budget of bytes, in which each layer takes the form that costs the loss least for its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gramian.compression.budget.weighted import WeightedSVD
from gramian.compression.layers.quantized import num_bytes_of
from gramian.compression.layers.rounding import BITS, GROUP

__all__ = ["Choices", "Form", "choices", "loss_of", "mix", "possible", "size_of"]


class Form(NamedTuple):
    """What a layer becomes; as it is where nothing is set.

    Attributes:
        rank: of two factors in its place.
        bits: of each integer in place of a weight, or of each entry of the factors.
        group: columns that share a scale below eight bits.
        zeros: the share of weights that are zero, or a pattern, `"2:4"`.

    >>> str(Form()), str(Form(12, 8)), str(Form(bits=4)), str(Form(zeros="2:4"))
    ('dense', 'rank 12, 8 bits', '4 bits', '2:4 zeros')
    """

    rank: int | None = None
    bits: int | None = None
    group: int = GROUP
    zeros: float | str | None = None

    def __str__(self) -> str:
        parts = [f"rank {self.rank}"] if self.rank is not None else []
        parts += [f"{self.bits} bits"] if self.bits is not None else []
        if self.zeros is not None:
            parts.append(f"{self.zeros if isinstance(self.zeros, str) else format(self.zeros, '.0%')} zeros")
        return ", ".join(parts) or "dense"

    def columns(self, n: int) -> int:
        """The columns, of n, that share a scale: all of them at eight bits, where more scales gain little."""
        return n if self.bits == 8 else min(self.group, n)


def possible(s: WeightedSVD, form: Form) -> Form:
    """The form, or of a layer that cannot have it what comes nearest: the rank alone, or dense.

    Args:
        s: the layer.
        form: any.
    """
    factored = form.rank is not None or s.dense != s.shape[0] * s.shape[1]
    if s.tied or (s.table and factored):
        return Form(form.rank)
    return form


class Choices(NamedTuple):
    """What a layer can become, with bytes and losses; those that another one beats at its bytes are left out.

    Attributes:
        forms: in the order of their bytes.
        sizes: bytes, ascending.
        losses: descending, and convex over the bytes.
    """

    forms: list[Form]
    sizes: list[int]
    losses: list[float]


def size_of(s: WeightedSVD, form: Form, itemsize: int) -> int:
    """Bytes of a layer's weight in a form.

    Args:
        s: the layer.
        form: without zeros, which are stored like any other number.
        itemsize: bytes of a number that is not quantized.
    """
    m, n = s.shape
    rank = form.rank if form.rank is not None or s.dense == m * n else len(s.values)  # factored already
    if form.bits is None:
        return itemsize * (s.dense if form.rank is None else form.rank * (m + n))
    if rank is None:
        return num_bytes_of((m, n), form.bits, form.columns(n))
    return num_bytes_of((rank, n), form.bits, form.columns(n)) + num_bytes_of((m, rank), form.bits, form.columns(rank))


def loss_of(s: WeightedSVD, form: Form) -> float:
    """The second-order estimate of what a form costs.

    Args:
        s: the layer.
        form: without zeros.
    """
    rank, bits = form.rank, form.bits
    cut = 0.0 if rank is None else 0.5 * float(s.candidates.losses[rank])
    if bits is None:
        return cut
    if rank is None and s.dense == s.shape[0] * s.shape[1]:
        return s.rounding[BITS.index(bits)]
    return cut + float(s.factor_noise[len(s.values) if rank is None else rank]) * 4.0 ** (8 - bits)


def choices(s: WeightedSVD, itemsize: int) -> Choices:
    """What a layer can become: each rank in floats and in 8 bits, each number of bits, and dense.

    Args:
        s: the layer.
        itemsize: bytes of a number that is not quantized.

    Returns:
        Those on the lower convex hull of losses over bytes.

    Cost: none to speak of.
    Source: the definition.
    """
    ranks = range(1, min(s.candidates.top, len(s.values)) + 1)
    every = [Form(), *(Form(bits=bits) for bits in BITS), *map(Form, ranks), *(Form(rank, 8) for rank in ranks)]
    forms = list(dict.fromkeys(possible(s, form) for form in every))
    priced = sorted((size_of(s, form, itemsize), loss_of(s, form), i) for i, form in enumerate(forms))
    hull: list[tuple[int, float, int]] = []
    for point in priced:
        if hull and point[1] >= hull[-1][1]:
            continue  # larger, and no better
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        if hull and hull[-1][0] == point[0]:
            hull.pop()
        hull.append(point)
    return Choices([forms[i] for _, _, i in hull], [size for size, _, _ in hull], [loss for _, loss, _ in hull])


def _above(left: tuple[int, float, int], middle: tuple[int, float, int], right: tuple[int, float, int]) -> bool:
    """Whether a point is on or above the line between its neighbors."""
    return (middle[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (middle[0] - left[0])


def mix(layers: Sequence[Choices], budget: int) -> list[Form]:
    """The forms that lose least within a budget of bytes for these layers.

    The steps along all hulls are taken by loss saved for each byte. One that no longer fits ends its layer's, and
    smaller ones of other layers follow.

    Args:
        layers: what each can become.
        budget: bytes; below the smallest form of each, these are returned.

    Returns:
        A form for each layer.

    Cost: one sort of all steps.
    Source: the greedy algorithm for the multiple-choice knapsack problem (Sinha & Zoltners 1979).

    >>> one = Choices([Form(bits=4), Form(bits=8), Form()], [50, 100, 400], [1.0, 0.01, 0.0])
    >>> [str(form) for form in mix([one, one], 210)]
    ['8 bits', '8 bits']
    """
    at = [0] * len(layers)
    left = budget - sum(layer.sizes[0] for layer in layers)
    steps = [
        ((layer.losses[k] - layer.losses[k + 1]) / (layer.sizes[k + 1] - layer.sizes[k]), -i, k)
        for i, layer in enumerate(layers)
        for k in range(len(layer.forms) - 1)
    ]
    for _, i, k in sorted(steps, key=lambda step: (-step[0], -step[1], step[2])):
        layer = layers[-i]
        price = layer.sizes[k + 1] - layer.sizes[k]
        if at[-i] == k and price <= left:
            at[-i], left = k + 1, left - price
    return [layer.forms[k] for layer, k in zip(layers, at, strict=True)]
