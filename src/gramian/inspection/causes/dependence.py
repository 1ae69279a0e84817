"""Whether labels depend on inputs at all: tests against shuffled labels, and whether they could have seen it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gramian.inspection.passes.moments import all_finite
from gramian.linalg.engine.precision import in_full_precision

__all__ = ["DEPENDENCE", "LEAST", "POWER", "Dependence", "labels_depend"]

DEPENDENCE = "whether labels depend on inputs"
"""What a report says was not looked at where no test could tell."""

# Samples from which on the test is made, and up to which it is.
LEAST, MOST = 100, 1024
NEIGHBORS, NUM_SHUFFLES = 5, 50
# Below this p-value of any of the statistics, the labels depend on the inputs.
LEVEL = 0.02
# Labels that are made up, a quarter of them noise. Nothing is said unless the tests see nearly all of them.
NUM_MADE_UP, POWER, MOST_DRAWN = 20, 0.9, 2**18  # and so many numbers are drawn at once
# Features up to which products of two are looked at; columns of codes that count each for itself; numbers that count as
# classes.
MOST_FACTORS, FEW_COLUMNS, MOST_VALUES = 40, 8, 10
# Columns of codes up to which labels may depend on pairs of them alone, as ratings do on who rates what.
MOST_PAIRED = 3
# Samples are few beside so many times as many features.
FEW = 8
PART = 2048  # rows or columns that are multiplied at a time
ROWS = 128  # of samples whose neighbors are looked for at a time, so that the products stay in the cache
EULER = 0.5772156649
# Directions that count as the inputs' structure, and how far beyond the edge of noise their variances are. The rest is
# noise if its fourth moments, and how much the samples differ in it, are no larger than a Gaussian's by these factors.
MOST_DIRECTIONS, BEYOND = 32, 1.2
ROUNDING = 1e-6  # directions with less of the variance than this are none, but rounding
TAILS, UNEVEN = 1.1, 2.0
# Samples from which on, and p-value above which, products of the structure that are not seen are not there.
ENOUGH, CLEARLY = 1000, 0.1


@dataclass(frozen=True)
class Dependence:
    """What the tests say of the labels.

    Attributes:
        p_value: the smallest of the statistics, times their number.
        level: below it, labels count as dependent.
        power: the share of labels that are made up, with a dependence, that the tests see, of the kind that they see
            less of; 1.0 where they see the own.
        evidence: in words.
        linear_power: that share of the linear ones alone.
    """

    p_value: float
    level: float
    power: float
    evidence: str
    linear_power: float = 1.0

    @property
    def are_independent(self) -> bool:
        """Whether no dependence is seen, and one would have been."""
        return self.p_value > self.level and self.power >= POWER


def labels_depend(inputs: Sequence[Sequence[Tensor]], labels: Sequence[Tensor]) -> Dependence | None:
    """Test whether the labels depend on the inputs: do neighbors, and linear scores, agree more than by chance?

    Statistics of all samples: how often the nearest neighbors of a sample have its label, the squared correlation of
    the labels with inputs along the leading principal directions, and the largest with a product of two of few
    features. Of many features that are noise but for a few directions, the structure, two more: neighbors and all
    products there. Their distribution without dependence is that under shuffled labels, of which the mean and deviation
    of 50 are taken.

    That none is seen says nothing where none could be: few samples of many independent features are all alike. So the
    tests are also given labels that are made up of these inputs (of tokens' counts): the largest of as many random
    linear functions as there are classes, and of as many products of two; a quarter replaced by others' at random.
    Whether two inputs are alike, or which of them is marked, is such a product: nothing is said where these are missed.
    Where all but the structure is noise, of which no one learns products, those of the structure alone are asked, from
    1,000 samples on. Where inputs are two or three columns of codes, as of users and items, labels are also made up of
    products of one column's function and another's.

    Numbers to be predicted count as four classes, by the quarter of their range of ranks; of several, the first.

    Args:
        inputs: of each batch, all tensors that the model is called with.
        labels: of each batch, one for each sample.

    Returns: the test; `None` where there are too few samples, or not one label, or row of an input, for each.
    Cost: O(N² d) for N ≤ 1,024 samples of d features.
    Source: nearest-neighbor two-sample tests, Schilling 1986; permutation tests, Good 2005. The power is this library's
        own.
    """
    if not labels or len(inputs) != len(labels) or any(y.ndim not in (1, 2) for y in labels):
        return None
    if any(not given or any(len(x) != len(y) for x in given) for given, y in zip(inputs, labels, strict=True)):
        return None
    tensors = list(zip(*inputs, strict=False))
    if any(t.is_complex() or t.shape[1:] != of[0].shape[1:] for of in tensors for t in of):
        return None
    found = [_features(torch.cat([t.detach().cpu() for t in of])[:MOST]) for of in tensors]
    num_simple = sum(few.shape[1] for few, _ in found)
    kept = [t for kind in zip(*found, strict=True) for t in kind if t.shape[1]]
    x, y = kept[0] if len(kept) == 1 else torch.cat(kept, 1), _classes(labels)[:MOST]
    del found, kept
    num = int(y.max()) + 1 if len(y) else 0
    if len(y) < LEAST or num < 2 or num > len(y) // 5 or int(y.min()) < 0 or not all_finite(x):
        return None
    generator = torch.Generator().manual_seed(0)
    x = _standardized(x)
    gram = _gram(x)
    few, structure = _products(x[:, :num_simple]), _structure(x, gram) if num_simple > MOST_FACTORS else None
    known = _Known([_neighbors(x, gram if len(x) < x.shape[1] else None)], _principal(x, gram), few)
    if structure is not None:
        graphs = [*known.graphs, _neighbors(structure)]
        known = _Known(graphs, known.linear, _products(_standardized(structure)))

    def shuffled(labels: Tensor) -> Tensor:
        """The statistics of one tensor of labels (N,) in random orders."""
        orders = [torch.randperm(len(x), generator=generator) for _ in range(NUM_SHUFFLES)]
        return _statistics(known, labels[torch.stack(orders)], num)

    chance, own = shuffled(y), _statistics(known, y[None], num)
    p, power, linear_power, seen = float(_least(_p_values(own, chance))), 1.0, 1.0, ""
    if p > LEVEL:
        simple = x[:, :num_simple]
        if FEW * len(x) < num_simple == x.shape[1]:
            # Scores x r with a Gaussian r have the covariance x xᵀ: so have those of its root, with a shorter r.
            squares, u = torch.linalg.eigh(gram)
            simple = (u * squares.clamp(min=0).sqrt()).float()

        def share_seen(*factors: Tensor) -> float:
            of, labels = factors[0], _made_up(factors, num, generator)
            against = shuffled(labels[0])
            found = _p_values(_statistics(known, labels, num), against)
            return float((_least(found if of is structure else found[:, :3]) < LEVEL).float().mean())

        power = linear_power = share_seen(simple)
        seen = f"; of labels made up of these inputs, a quarter of them noise, {linear_power:.0%} are seen where they "
        seen += "are linear"
        if linear_power >= POWER:  # else nothing is said, whatever the products are
            of_products = share_seen(simple, simple)
            seen += f", and {of_products:.0%} where they are products"
            if of_products < POWER and structure is not None and len(y) >= ENOUGH and p > CLEARLY:
                of_products = share_seen(structure, structure)
                seen += f", {of_products:.0%} of those of their {structure.shape[1]} leading directions"
            power = min(linear_power, of_products)
            columns = _columns(tensors) if power >= POWER else []
            if 2 <= len(columns) <= MOST_PAIRED:
                of_pairs = min(share_seen(a, b) for a, b in itertools.combinations(columns, 2))
                seen += f", and {of_pairs:.0%} where they are products of a function of one column and one of another"
                power = min(power, of_pairs)
    return Dependence(
        p,
        LEVEL,
        power,
        f"of {len(y)} samples, the {NEIGHBORS} nearest neighbors share the label in {float(own[0, 0]):.1%} of cases, "
        f"{float(chance[:, 0].mean()):.1%} if labels are shuffled (p = {p:.2g} for dependence{seen})",
        linear_power,
    )


def _p_values(own: Tensor, chance: Tensor) -> Tensor:
    """The p-values (K, S) of statistics, from those of labels without dependence."""
    z = (own - chance.mean(0)) / chance.std(0).clamp(min=1e-9)
    p = torch.special.erfc(z / 2**0.5) / 2
    p[:, 2] = -torch.expm1(-torch.exp(-(z[:, 2] * math.pi / 6**0.5 + EULER)))  # a maximum: Gumbel's law
    if own.shape[1] > 4:  # a sum of squares of few kinds: a gamma distribution
        rate = chance[:, 4].mean() / chance[:, 4].var()
        p[:, 4] = torch.special.gammaincc(rate * chance[:, 4].mean(), rate * own[:, 4])
    return p


def _least(p: Tensor) -> Tensor:
    """The smallest p-value of each row, times their number."""
    return (p.amin(1) * p.shape[1]).clamp(max=1.0)


def _columns(tensors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The columns of codes, each as a matrix (N, codes) of ones and zeros."""
    found = []
    for of in tensors:
        if not of[0].is_floating_point() and math.prod(of[0].shape[1:]) <= FEW_COLUMNS:
            codes = torch.cat([t.detach().cpu().reshape(len(t), -1) for t in of])[:MOST]
            found += [torch.nn.functional.one_hot(column.unique(return_inverse=True)[1]).float() for column in codes.T]
    return found


def _made_up(factors: Sequence[Tensor], num: int, generator: torch.Generator) -> Tensor:
    """Labels (K, N) that depend on products of linear functions of each factor (N, d), a quarter shuffled."""
    labels, x = [], factors[0]
    at_once = max(1, MOST_DRAWN // (max(t.shape[1] for t in factors) * num))
    for first in range(0, NUM_MADE_UP, at_once):
        drawn, shuffles = [], []
        for _ in range(min(at_once, NUM_MADE_UP - first)):
            drawn.append([torch.randn(t.shape[1], num, generator=generator) for t in factors])
            rows = torch.randperm(len(x), generator=generator)[::4]
            shuffles.append((rows, rows[torch.randperm(len(rows), generator=generator)]))
        of_each = (t @ torch.cat(of, 1) for t, of in zip(factors, zip(*drawn, strict=True), strict=True))
        scores = math.prod(of_each, start=torch.ones(()))
        made = scores.view(len(x), -1, num).argmax(2).T.contiguous()
        for y, (rows, of) in zip(made, shuffles, strict=True):
            y[rows] = y[of]
        labels.append(made)
    return torch.cat(labels)


def _classes(labels: Sequence[Tensor]) -> Tensor:
    """The labels as classes: as they are, or by their quarter where they are numbers."""
    y = torch.cat([one.detach().cpu().reshape(len(one), -1)[:, 0] for one in labels])
    if not y.is_floating_point():
        several = any(one.ndim > 1 and one.shape[1] > 1 for one in labels)
        return torch.full_like(y, -1) if several else y.long()
    values = y.unique()
    if len(values) <= MOST_VALUES:
        return torch.searchsorted(values, y)
    return torch.bucketize(y, torch.quantile(y.double(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.double)))


def _features(x: Tensor) -> tuple[Tensor, Tensor]:
    """One row of standardizable features for each sample: the simple ones, and others.

    Tokens count in all, which is simple, and by position; a few columns of codes count each for itself, and are simple.
    """
    if x.is_floating_point():
        x = x.float().reshape(len(x), -1)
        return x, x[:, :0]
    flat = x.reshape(len(x), -1).long().clamp(min=0)
    num = min(int(flat.max()) + 1, 512)
    if flat.shape[1] == 1 and num == 512:  # a count, or a time
        return flat.float(), flat[:, :0].float()
    one_hot = torch.nn.functional.one_hot(flat.clamp(max=num - 1), num).float()
    by_position = one_hot.flatten(1)[:, :4096]
    if flat.shape[1] <= FEW_COLUMNS:
        return by_position, by_position[:, :0]
    return one_hot.sum(1), by_position


def _products(x: Tensor) -> Tensor:
    """All products of two of few features, standardized, of unit length; an empty one where there are many."""
    if not 2 <= x.shape[1] <= MOST_FACTORS:
        return x.new_zeros(len(x), 1)
    first, second = torch.triu_indices(x.shape[1], x.shape[1])
    made = x[:, first] * x[:, second]
    made = made - made.mean(0)
    return made / made.norm(dim=0).clamp(min=1e-6)


def _standardized(x: Tensor) -> Tensor:
    x = x - x.mean(0)
    deviation = (x.square().sum(0) / (len(x) - 1)).sqrt()  # and not std, which takes ten times as long on a processor
    return x.div_(deviation.clamp(min=1e-6 * float(deviation.amax() + 1e-30))).clamp_(-5, 5)


def _neighbors(x: Tensor, products: Tensor | None = None) -> Tensor:
    """Indices (N, k) of the nearest other samples; `products` are x xᵀ, where these are known."""
    half = (x.square().sum(1) if products is None else products.diagonal()) / 2
    found, first = [], 0
    for part in (x if products is None else products).split(ROWS):
        # Less half the square of the distance, up to one number for each sample.
        nearness = (part @ x.T if products is None else part) - half
        nearness.diagonal(first).fill_(-math.inf)
        found.append(nearness.topk(NEIGHBORS).indices)
        first += len(part)
    return torch.cat(found)


@in_full_precision
def _gram(x: Tensor) -> Tensor:
    """The smaller of x xᵀ and xᵀ x: float32 products of parts of x, added up in float64."""
    tall = x.T if x.shape[0] < x.shape[1] else x
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for part in tall.split(PART):
        gram += part.T @ part
    return gram


def _principal(x: Tensor, gram: Tensor) -> Tensor:
    """Coordinates (N, r) along the leading principal directions, of mean zero and unit length; zero where none is left.

    In float32, which turns them a little towards each other: any directions that are found without the labels make a
    test of the right level.
    """
    n, d = x.shape
    rank = max(1, min(n // 10, d, 32))
    least = ROUNDING * float(gram.trace())
    if n < d:
        gram = gram - gram.mean(0)
        squares, u = torch.linalg.eigh((gram - gram.mean(1, keepdim=True)).float())
    else:
        mean = x.mean(0)
        squares, v = torch.linalg.eigh((gram - n * torch.outer(mean, mean)).float())
        u = (x - mean) @ v[:, -rank:]
    u = u[:, -rank:] * (squares[-rank:] > least)
    u = u - u.mean(0)
    return u / u.norm(dim=0).clamp(min=1e-12)


def _structure(x: Tensor, gram: Tensor) -> Tensor | None:
    """Coordinates (N, r) along directions beside which the inputs are independent noise; `None` where they are not.

    Source: Marchenko & Pastur 1967, for the edge of the variances of noise.
    """
    n, d = x.shape
    edge = float(gram.trace()) / (n * d) * (n**0.5 + d**0.5) ** 2
    above = BEYOND * edge
    if not int(torch.linalg.cholesky_ex(above * torch.eye(len(gram), dtype=gram.dtype) - gram).info):
        return None  # all are below: the difference is positive definite
    rank = int((torch.linalg.eigvalsh(gram) > above).sum())
    if not 2 <= rank <= min(MOST_DIRECTIONS, n // 10):
        return None
    x = x.double()
    squares, u = torch.linalg.eigh(gram)
    leading = u[:, -rank:]
    rest = x - (leading @ (leading.T @ x) if n < d else x @ leading @ leading.T)
    sizes = rest.square().mean(1)
    variance = float(sizes.mean())
    if float(rest.pow(4).mean()) > TAILS * 3 * variance**2:
        return None
    if float(sizes.var()) > UNEVEN * 2 * variance**2 / (d - rank):
        return None
    return (leading * squares[-rank:].sqrt() if n < d else x @ leading).float()


@dataclass(frozen=True)
class _Known:
    """What the inputs have that labels may go with: neighbors (N, k), directions (N, r) and products (N, p)."""

    graphs: list[Tensor]
    linear: Tensor
    products: Tensor


def _statistics(known: _Known, labels: Tensor, num: int) -> Tensor:
    """The three statistics (K, 3) of each row of `labels` (K, N); five where the inputs have a structure."""
    rows = labels.T.to(torch.uint8).contiguous()  # classes are fewer than a fifth of the samples
    agreements = []
    for graph in known.graphs:
        alike = torch.zeros_like(rows)
        for neighbor in graph.T:
            alike += rows.index_select(0, neighbor) == rows
        agreements.append(alike.float().mean(0) / graph.shape[1])
    one_hot = torch.zeros(len(labels), num, labels.shape[1]).scatter_(1, labels[:, None], 1.0)
    # Directions and products have mean zero, so that classes need not be centered.
    fitted = (one_hot.flatten(0, 1) @ known.linear).view(len(labels), -1).square().sum(1)
    products = (one_hot.flatten(0, 1) @ known.products).view(len(labels), -1)
    of_all = [products.square().sum(1)] if len(known.graphs) > 1 else []
    return torch.stack((agreements[0], fitted, products.abs().amax(1), *agreements[1:], *of_all), dim=1)
