"""Whether the rows of a batch's tensors belong together: how alike samples are in one, and in the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice

import torch
from torch import Tensor

from gramian.inspection.causes.sample_similarity import is_sequence, kernels, simple_features

__all__ = ["CERTAIN", "LEAST", "NOISE", "UNSEEN", "Join", "follows", "power", "relations", "sees_views"]

# Samples from which on the tests are made, and up to which they are; of other orders fewer.
LEAST, MOST, MOST_SHIFTED = 100, 512, 256
# Above this p-value a relation is not seen; in another order it is, below that one and at so many deviations.
UNSEEN, CERTAIN, FAR = 0.005, 1e-10, 8.0
# Above this one a relation may be one of margins and masks alone, if the rows belong together that many times as much
# elsewhere.
FAINT, TIMES = 1e-20, 3.0
# Below this one, rows are related to those a few rows on.
FOLLOWS = 1e-4
# Rows by which a tensor may be shifted; random orders that must be far from what a shift shows.
SHIFTS, NUM_SHUFFLES = 8, 20
# Labels that are made up, and the share of them that is noise: linear ones of tables, which often say little, products,
# and those of sequences.
NUM_MADE_UP, OF_TABLES, OF_PRODUCTS, OF_SEQUENCES = 20, 3 / 4, 1 / 2, 1 / 4
# Features for each sample beyond which products of two are not seen.
MOST_FEATURES = 1 / 3
# What is noise of the variance of a view that is made up: strong crops and colors leave little that simple tests see.
NOISE = 0.95
# Shares of the deviation by which means and deviations of two views differ at most, on average.
KIND = 0.25
# Ways to be alike that are tried for the rest of the batch.
MOST_WAYS = 40


@dataclass(frozen=True)
class Join:
    """What the tests say of the rows of one tensor beside those of the others.

    Attributes:
        p_value: the smallest of all ways to be alike, times their number.
        deviations: above chance, there.
        shift: by how many rows it would have to move to belong to the others; 0 where they are as good in order.
        shifted: the p-value there.
        num: of samples.
    """

    p_value: float
    deviations: float = 0.0
    shift: int = 0
    shifted: float = 1.0
    num: int = 0

    @property
    def is_unseen(self) -> bool:
        return self.p_value > UNSEEN


@dataclass(frozen=True)
class _Centered:
    """Centered kernels (K, N, N), and what of them the distribution under random orders takes (K,)."""

    values: Tensor
    trace: Tensor
    squares: Tensor
    diagonal: Tensor

    @classmethod
    def of(cls, kernels: Sequence[Tensor]) -> _Centered:
        k = torch.stack([one.float() for one in kernels])
        k = k - k.mean(1, keepdim=True)
        k -= k.mean(2, keepdim=True)
        diagonal = k.diagonal(dim1=1, dim2=2).double()
        return cls(k, diagonal.sum(1), k.flatten(1).norm(dim=1).double().square(), diagonal.square().sum(1))

    def ordered(self, order: Tensor) -> _Centered:
        return self._with(self.values[:, order][:, :, order])

    def rolled(self, by: int) -> _Centered:
        """In the order of rows so many places on."""
        return self._with(self.values.roll((by, by), (1, 2)))

    def _with(self, values: Tensor) -> _Centered:
        return _Centered(values, self.trace, self.squares, self.diagonal)


def relations(tensors: Mapping[str, Tensor]) -> dict[str, Join]:
    """Test for each tensor whether its rows are related to those of the others, in this order or a few rows on.

    The statistic is the sum over pairs of samples of how alike they are in this tensor and in the others (one of them,
    or both of two at once, which sees what two inputs make only together), as in the Hilbert–Schmidt independence
    criterion. Its mean and deviation under random orders of the rows are known; a gamma distribution with these gives
    p-values. A shift counts where nothing is seen in order, and much is there, of which random orders show nothing.

    Args:
        tensors: by name, (N, …) with one row for each of N samples, finite.

    Returns: a `Join` for each; none where there are fewer than 100 samples.
    Cost: O(N²) for each two ways to be alike, N ≤ 512; 16 times as many of 256 samples where nothing is seen.
    Source: Gretton et al. 2005 and 2008 for the criterion and the gamma approximation; Kazi-Aoual et al. 1995 for the
        moments under permutations.
    """
    num = min(map(len, tensors.values()), default=0)
    if num < LEAST:
        return {}
    tensors = {name: t[:MOST] for name, t in tensors.items()}
    ways = {name: kernels(t) for name, t in tensors.items()}
    found: dict[str, Join] = {}
    for name in tensors:
        if found and len(tensors) == 2:  # the same, seen from the other side
            (join,) = found.values()
            found[name] = replace(join, shift=-join.shift)
            break
        rest = [ways[n] for n in tensors if n != name]
        around = _around(rest)
        join = Join(*_test(_Centered.of(ways[name]), around), num=min(num, MOST))
        found[name] = _shifted(join, ways[name], rest) if join.p_value > FAINT else join
    return found


def follows(t: Tensor, shift: int) -> bool:
    """Whether rows are related to those a few rows on, as in the order of time.

    Args:
        t: (N, …).
        shift: by how many.

    Returns: true where they are.
    Cost: O(N²) for each two ways to be alike, N ≤ 256.
    Source: as for `relations`.
    """
    own = _Centered.of(kernels(t[:MOST_SHIFTED]))
    return _test(own.rolled(shift), own)[0] <= FOLLOWS


def power(label: Tensor, inputs: Sequence[Tensor], *, beside: Tensor | None = None) -> tuple[float, float] | None:
    """The shares of labels made up of these inputs, linearly and by products of two, that the tests see.

    Three quarters of the linear ones are noise, half of the products and of what one input is missed in, and a quarter
    of all of sequences. There are as many classes as in the label, four where it is numbers.

    Args:
        label: (N, …).
        inputs: numbers, or codes.
        beside: one of the inputs: whether it is seen to belong to the labels and the others. Else all together.

    Returns: the two shares; `None` for images, of which there are more kinds of labels than these, and where samples
        are too few for so many features.
    Cost: that of 40 tests.
    """
    made = [simple_features(t[:MOST]) for t in inputs]
    features = [t for t in made if t is not None]
    of_sequences = any(map(is_sequence, inputs))
    if not features or len(features) < len(made):
        return None
    x = torch.cat(features, 1)
    if x.shape[1] > MOST_FEATURES * len(x):
        return None
    label = label[:MOST]
    classes = len(label.unique()) if label[0].numel() == 1 and not label.is_floating_point() else 4
    rest = [kernels(t[:MOST]) for t in inputs if t is not beside]
    tested = _Centered.of(kernels(label if beside is None else beside[:MOST]))
    around = _around(rest)
    generator = torch.Generator().manual_seed(0)

    def is_seen(y: Tensor) -> bool:
        own = kernels(y)
        if beside is not None:
            return _test(tested, _around([own, *rest]))[0] <= UNSEEN
        return _test(_Centered.of(own), around)[0] <= UNSEEN

    def seen(*, are_products: bool) -> float:
        strong = are_products or beside is not None  # where the labels are seen to depend on the other inputs
        num, share = 0, OF_SEQUENCES if of_sequences else OF_PRODUCTS if strong else OF_TABLES
        for _ in range(NUM_MADE_UP):
            scores = _drawn(x, classes, generator)
            y = (scores * _drawn(x, classes, generator) if are_products else scores).argmax(1)
            order = torch.randperm(len(y), generator=generator)
            noisy = order[: int(share * len(order))]
            y[noisy] = y[noisy][torch.randperm(len(noisy), generator=generator)]
            num += is_seen(y)
        return num / NUM_MADE_UP

    return seen(are_products=False), seen(are_products=True)


def sees_views(one: Tensor, other: Tensor) -> bool:
    """Whether two inputs are of one kind, and the tests would see that they are views of the same samples.

    Of one kind are numbers in the same places with about the same means and deviations over the samples. A view is
    made up of each: the sample itself, with noise that is most of the variance.

    Args:
        one, other: (N, …), of the same shape.

    Returns: whether.
    Cost: that of a test of each.
    """
    one, other = one[:MOST], other[:MOST]
    if one.shape != other.shape or not (one.is_floating_point() and other.is_floating_point()):
        return False
    a, b = (t.double().flatten(1) for t in (one, other))
    size = torch.cat((a, b)).std(0).clamp(min=1e-12)
    if float(((a.mean(0) - b.mean(0)) / size).abs().mean()) > KIND or float((a.std(0) / size - 1).abs().mean()) > KIND:
        return False
    generator = torch.Generator().manual_seed(0)
    for t in (one, other):
        noise = torch.randn(t.shape, generator=generator, dtype=torch.float64) * t.double().std(0)
        if (
            _test(_Centered.of(kernels(t.double() + (NOISE / (1 - NOISE)) ** 0.5 * noise)), _around([kernels(t)]))[0]
            > UNSEEN
        ):
            return False
    return True


def _drawn(x: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    return x @ torch.randn(x.shape[1], classes, generator=generator, dtype=x.dtype)


def _around(rest: Sequence[Sequence[Tensor]]) -> _Centered:
    """How alike samples are in one of the other tensors, and in both of two: by their products, or nearby."""
    single = [k for of in rest for k in of]
    ends = [[of[0], of[-1]] if len(of) > 1 else of for of in rest]
    both = (a * b for one, two in combinations(ends, 2) for a in one for b in two)
    return _Centered.of([*single, *islice(both, max(0, MOST_WAYS - len(single)))])


def _chance(own: _Centered, around: _Centered) -> tuple[Tensor, Tensor]:
    """The mean and the variance of the statistic of each two kernels under random orders, the same for all orders."""
    n = own.values.shape[1]
    a, b = ((k.trace, k.squares, k.diagonal) for k in (own, around))
    mean = a[0][:, None] * b[0] / (n - 1)
    spread = [(n - 1) * squares - trace**2 for trace, squares, _ in (a, b)]
    peak = [n * (n + 1) * top - (n - 1) * (trace**2 + 2 * squares) for trace, squares, top in (a, b)]
    variance = 2 * spread[0][:, None] * spread[1] / ((n - 1) ** 2 * (n + 1) * (n - 2))
    return mean, variance + peak[0][:, None] * peak[1] / ((n + 1) * n * (n - 1) * (n - 2) * (n - 3))


def _test(own: _Centered, around: _Centered, chance: tuple[Tensor, Tensor] | None = None) -> tuple[float, float]:
    """The smallest p-value that samples are alike in both no more than by chance, and by how many deviations they are.

    The p-value is multiplied by the number of pairs of kernels. Of other orders of the same, `chance` is known.
    """
    mean, variance = _chance(own, around) if chance is None else chance
    found = (own.values.flatten(1) @ around.values.flatten(1).T).double()
    is_one = (mean > 0) & (variance > 0)
    mean, variance = mean.clamp(min=1e-300), variance.clamp(min=1e-300)
    p = torch.special.gammaincc(mean**2 / variance, found.clamp(min=0) * mean / variance)
    p = torch.where(is_one, p, 1.0).flatten()
    best = int(p.argmin())
    z = ((found - mean) / variance.sqrt()).flatten()[best]
    return min(1.0, float(p[best]) * len(p)), float(z) if float(p[best]) < 1.0 else 0.0


def _shifted(join: Join, own: Sequence[Tensor], rest: Sequence[Sequence[Tensor]]) -> Join:
    """The join, with the shift at which the rows clearly belong together."""
    num = min(join.num, MOST_SHIFTED)
    mine = _Centered.of([k[:num, :num] for k in own])
    around = _around([[k[:num, :num] for k in of] for of in rest])
    known = _chance(mine, around)

    def test(by: int) -> tuple[float, float]:
        if len(mine.values) <= len(around.values):
            return _test(mine.rolled(by), around, known)
        return _test(mine, around.rolled(-by), known)  # the same, with fewer kernels to roll

    tried = {by: test(by) for by in (*range(1, SHIFTS + 1), *range(-SHIFTS, 0))}
    by, (p, z) = min(tried.items(), key=lambda item: item[1][0])
    if p > min(CERTAIN, join.p_value**2) or z < max(FAR, TIMES * join.deviations):
        return join
    generator = torch.Generator().manual_seed(0)
    orders = (torch.randperm(num, generator=generator) for _ in range(NUM_SHUFFLES))
    chance = min(_test(mine.ordered(order), around, known)[0] for order in orders)
    return Join(join.p_value, join.deviations, by, p, join.num) if p < chance**3 else join
