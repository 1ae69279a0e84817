"""How alike the samples of a tensor are, in several ways: kernels of numbers, codes, sequences and images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gramian.linalg.engine.precision import in_full_precision

__all__ = ["is_sequence", "kernels", "simple_features"]

# Codes that count each for itself; values of a number up to which it counts as one; columns of a table of codes.
MOST_CODES, MOST_VALUES, FEW_COLUMNS = 64, 10, 8
# Numbers of a sample that are compared one by one; the side that images are made small to, and patches taken of them.
MOST_NUMBERS, SMALL, MOST_SIDE, NUM_PATCHES = 4096, 8, 32, 48
# Images that are compared with patches at once.
SOME = 8
# Neighbors whose distance is the width of the local kernel.
NEIGHBORS = 10
# Distances below so many times the largest square are rounding of products in float32.
ROUNDING = 4e-6


def kernels(t: Tensor) -> list[Tensor]:
    """How alike each two samples are.

    Codes are equal or not. Numbers are compared by their products, the squares of these, which are products of pairs
    of numbers, and within a neighborhood. Tokens are compared by how many of each there are, and place by place, by
    pairs of them too, those that do not count (below zero) aside; vectors of a sequence also by what they are on
    average, and at most; images also by how strongly small patches of some of them are found anywhere.

    Args:
        t: (N, …), finite.

    Returns: matrices (N, N) float32, none of which is negative somewhere but for means.
    Cost: O(N² d) for d numbers, at most 4,096.
    Source: convolutions with patches of the data, Coates and Ng 2011; the rest is usual.
    """
    t = t.detach().cpu()
    if _is_code(t):
        codes = t.reshape(len(t))
        return [(codes[:, None] == codes[None]).float()]
    if not t.is_floating_point() and t.ndim == 2 and len(t.unique()) <= MOST_CODES:
        found = _counted(t)
        both = [_products(_standardized(x)) for x in (found.sum(1), found.flatten(1)[:, :MOST_NUMBERS])]
        return [*both, *(k.square() for k in both)]
    if t.ndim == 4 and min(t.shape[2:]) >= SMALL:
        middle = _pooled(t, min(t.shape[2], MOST_SIDE), min(t.shape[3], MOST_SIDE))
        # Means of means are the means where the parts are equal.
        are_equal = all(side <= MOST_SIDE or side % MOST_SIDE == 0 for side in t.shape[2:])
        small = _pooled(middle if are_equal else t, SMALL, SMALL)
        return [_products(_standardized(small.flatten(1))), _products(_patches(middle.float()))]
    t = t.double()
    pooled = []
    if t.ndim == 3:
        parts = t.mean(1), t.square().mean(1), t.amax(1), t.amin(1)
        pooled = [_products(_standardized(torch.cat(parts, 1)))]
    x = t.reshape(len(t), -1)
    x = _ranked(x) if x.shape[1] == 1 else x[:, :: -(-x.shape[1] // MOST_NUMBERS)]
    x = _standardized(x)
    own = _products(x)
    if bool(((t == 0) | (t == 1)).all()):
        return [own, *pooled]
    return [own, own.square(), *(pooled or [_local(x.shape[1] * own)])]


def simple_features(t: Tensor) -> Tensor | None:
    """Numbers as they are, columns of codes one by one and counts of tokens, standardized (N, d); `None` for images."""
    t = t.detach().cpu()
    if t.is_floating_point() and not _is_code(t):
        return _standardized(t.double().reshape(len(t), -1)) if t.ndim < 4 else None
    if not _is_code(t) and (t.ndim != 2 or len(t.unique()) > MOST_CODES):
        return None
    found = _counted(t.reshape(len(t), -1))
    return _standardized(found.flatten(1) if found.shape[1] <= FEW_COLUMNS else found.sum(1))


def is_sequence(t: Tensor) -> bool:
    """Whether each sample has several tokens."""
    return t.ndim > 1 and not t.is_floating_point() and t[0].numel() > 1


def _is_code(t: Tensor) -> bool:
    """Whether each sample has one number, of few values for so many samples."""
    if t[0].numel() != 1:
        return False
    num = len(t.unique())
    return num <= MOST_VALUES or (not t.is_floating_point() and num <= len(t) // 2)


def _counted(t: Tensor) -> Tensor:
    """Tokens (N, T) as (N, T, C) of zeros and ones, less their mean at the place; zeros where they do not count."""
    counts = t >= 0
    codes = t[counts].unique()
    if not len(codes):
        return torch.zeros(*t.shape, 1, dtype=torch.float64)
    index = torch.searchsorted(codes, t.clamp(min=int(codes[0])))
    found = F.one_hot(index, len(codes)).double() * counts[..., None]
    mean = found.sum(0) / counts.sum(0).clamp(min=1)[:, None]
    return (found - mean) * counts[..., None]


def _standardized(x: Tensor) -> Tensor:
    x = x.double() - x.double().mean(0)
    deviation = x.square().mean(0).sqrt()
    return torch.where(deviation > 1e-6 * deviation.amax(), x / deviation.clamp(min=1e-30), 0).clamp(-5, 5)


def _ranked(x: Tensor) -> Tensor:
    """Single numbers by their ranks, as if they were normal: a few far ones would be all that counts."""
    ranks = x.argsort(0).argsort(0).double()
    return torch.special.ndtri((ranks + 0.5) / len(x))


@in_full_precision
def _products(x: Tensor) -> Tensor:
    x = x.float()
    return (x @ x.T).div_(x.shape[1])


def _local(products: Tensor) -> Tensor:
    """How near rows are to each other, from x xᵀ."""
    squares = products.diagonal()
    distances = (-2 * products).add_(squares).add_(squares[:, None])
    F.threshold(distances, ROUNDING * float(squares.amax()), 0.0, inplace=True)
    # And not kthvalue, which takes five times as long.
    nearest = distances.topk(min(NEIGHBORS, len(products) - 1) + 1, 1, largest=False)
    width = nearest.values[:, -1].median()
    return distances.div_(-width.clamp(min=1e-12)).exp_()


def _pooled(t: Tensor, height: int, width: int) -> Tensor:
    """Images made as small, in float64, as which few of the large ones are held at a time."""
    if t.shape[2:] == (height, width):
        return t.double()
    return torch.cat([F.adaptive_avg_pool2d(few.double(), (height, width)) for few in t.split(SOME)])


def _patches(t: Tensor) -> Tensor:
    """How strongly patches of some images are found in each: at most, on average, and as a power."""
    t = t - t.mean()
    t /= (t.norm() / t.numel() ** 0.5).clamp(min=1e-12)
    side = 5 if min(t.shape[2:]) >= 10 else 3
    generator = torch.Generator().manual_seed(0)
    taken = []
    for _ in range(NUM_PATCHES):
        ends = (len(t), t.shape[2] - side + 1, t.shape[3] - side + 1)
        sample, row, column = (int(torch.randint(end, (), generator=generator)) for end in ends)
        patch = t[sample, :, row : row + side, column : column + side]
        patch = patch - patch.mean()
        taken.append(patch / patch.norm().clamp(min=1e-6))
    patches, made = torch.stack(taken), []
    for few in t.split(SOME):  # whose results stay in the cache
        found = F.conv2d(few, patches)
        made.append(torch.cat((found.amax((2, 3)), found.relu().mean((2, 3)), found.square_().mean((2, 3))), 1))
    return _standardized(torch.cat(made))
