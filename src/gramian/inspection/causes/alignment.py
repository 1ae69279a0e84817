"""Whether labels at the places of a sequence or image depend on what is there: tests against other samples' labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Alignment", "places_depend"]

# Samples, and places in all, from which on the test is made; places of a sample and samples up to which it is.
LEAST, LEAST_PLACES, MOST_PLACES, MOST = 30, 1000, 1024, 256
# Shuffles, and how many of their deviations a statistic must be above their mean: p < 0.02, and p < 1e-9.
NUM_SHUFFLES, DEPENDS, CERTAINLY = 50, 2.05, 6.0
# How many times as far above chance labels in another order are, where they count as the right ones.
TIMES = 2.0
# The median place's share of the mean dependence, from which on it counts as one at all places.
EVERYWHERE = 0.2
# Codes that count each for itself, and products of two of them.
MOST_CODES, MOST_PRODUCTS = 64, 512


@dataclass(frozen=True)
class Alignment:
    """What the tests say.

    Attributes:
        z: the largest of the statistics, in deviations of those with other samples' labels.
        num: samples and places.
        aligned: the order of the labels with which they clearly depend on the inputs, where they do not as they are.
    """

    z: float
    num: tuple[int, int]
    aligned: str = ""

    @property
    def are_independent(self) -> bool:
        """Whether no dependence is seen."""
        return self.z < DEPENDS or bool(self.aligned)


def places_depend(inputs: Sequence[Tensor], labels: Sequence[Tensor]) -> Alignment | None:
    """Test whether labels (N, T) or (N, …, H, W) depend on inputs of the same places.

    Statistics are squared covariances, over samples, of each place's label with what stands at the place, before and
    behind; with products of that and the label before; and of what a sample's labels are on average with what its
    inputs are. Means over samples are taken off at each place, so that what all samples have in common, as padding and
    margins, does not count. Under labels of other samples each has the distribution that shuffling samples gives.

    Args:
        inputs: of each batch, one tensor (N, T), (N, T, F), or (N, C, H, W).
        labels: of each batch.

    Returns: the test; `None` where shapes differ otherwise, or samples are few.
    Cost: 60 products of (places, features) with (places, classes), of at most 2¹⁸ places.
    Source: permutation tests, Good 2005.
    """
    if any(t.shape[1:] != of[0].shape[1:] for of in (inputs, labels) for t in of):
        return None
    x, y = (torch.cat([t.detach().cpu() for t in of])[:MOST] for of in (inputs, labels))
    if len(x) != len(y) or len(x) < LEAST:
        return None
    is_of_codes = x.ndim == 2 and not x.is_floating_point() and not y.is_floating_point()  # no periodic functions
    placed = _images(x, y) if x.ndim == 4 else _sequences(x, y)
    if placed is None:
        return None
    x, y, shape = placed
    if x.shape[0] * x.shape[1] < LEAST_PLACES or not bool(x.isfinite().all()) or not bool(y.isfinite().all()):
        return None
    x = _centered(x)
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.stack(
        [_statistics(x, y[torch.randperm(len(y), generator=generator)]) for _ in range(NUM_SHUFFLES)]
    )
    mean, deviation = shuffled.mean(0), shuffled.std(0).clamp(min=1e-12)

    def z(of: Tensor) -> Tensor:
        return (_statistics(x, of) - mean) / deviation

    own, num = z(y), (len(x), x.shape[1])
    if is_of_codes and (wrapped := _wrapped(x, y, float(own[0]))):
        return Alignment(float(own[0]), num, wrapped)
    for name, other in _other_orders(y, shape):
        if float(z(other)[0]) > max(CERTAINLY, TIMES * float(own[0])):
            return Alignment(float(own[0]), num, name)
    return Alignment(float(own.max()), num)


def _sequences(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]] | None:
    """Features (N, T, F) and labels (N, T, K)."""
    if y.ndim != 2 or x.ndim not in (2, 3) or x.shape[:2] != y.shape or y.shape[1] < 2:
        return None
    codes = _codes(x) if x.ndim == 2 else x.float()
    if codes is None or (found := _codes(y)) is None:
        return None
    around = [codes, F.pad(codes, (0, 0, 1, 0))[:, :-1], F.pad(codes, (0, 0, 0, 1))[:, 1:]]
    return torch.cat(around, 2), found, ()


def _images(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]] | None:
    """Features (N, HW, C) and labels (N, HW, K), of images that are made small."""
    y = y[:, None] if y.ndim == 3 else y
    if y.ndim == 4 and y.is_floating_point() and _is_larger(y, x):  # as in super-resolution
        y = F.adaptive_avg_pool2d(y.float(), (x.shape[2], x.shape[3]))
    if y.ndim != 4 or x.shape[2:] != y.shape[2:] or y.shape[2] * y.shape[3] < 16:
        return None
    step = max(1, math.ceil(math.sqrt(x.shape[2] * x.shape[3] / MOST_PLACES)))
    x, y = x[..., ::step, ::step].float(), y[..., ::step, ::step]
    shape = tuple(y.shape[2:])
    if not y.is_floating_point() and y.shape[1] == 1:
        found = _codes(y[:, 0].flatten(1))
        if found is None:
            return None
        y = found
    else:
        y = y.float().flatten(2).transpose(1, 2)
    return x.flatten(2).transpose(1, 2), y, shape


def _is_larger(y: Tensor, x: Tensor) -> bool:
    """Whether images are larger than others by one whole factor."""
    k = y.shape[2] // x.shape[2]
    return k > 1 and list(y.shape[2:]) == [k * side for side in x.shape[2:]]


def _codes(t: Tensor) -> Tensor | None:
    """One column for each code, or numbers as they are; `None` for too many codes."""
    if t.is_floating_point():
        return t.float()[..., None]
    codes = t.unique()
    if len(codes) > MOST_CODES:
        return None
    return F.one_hot(torch.searchsorted(codes, t), len(codes)).float()


def _centered(t: Tensor) -> Tensor:
    t = t - t.mean(0)
    return t / t.square().mean((0, 1)).sqrt().clamp(min=1e-6)


def _statistics(x: Tensor, y: Tensor) -> Tensor:
    """The three statistics, of centered features (N, P, F) and labels (N, P, K)."""
    y = _centered(y)
    at_place = (x.flatten(0, 1).T @ y.flatten(0, 1)).square().sum()
    as_whole = (x.mean(1).T @ y.mean(1)).square().sum()
    own = x[..., : max(1, x.shape[2] // 3)]
    with_last = torch.zeros(())
    if own.shape[2] * y.shape[2] <= MOST_PRODUCTS:
        last = F.pad(y, (0, 0, 1, 0))[:, :-1]
        product = (own[..., :, None] * last[..., None, :]).flatten(2)
        with_last = ((product - product.mean(0)).flatten(0, 1).T @ y.flatten(0, 1)).square().sum()
    return torch.stack((at_place, with_last, as_whole))


def _wrapped(x: Tensor, y: Tensor, own: float) -> str:
    """Some places on, where those that fall out at one end come in at the other: a roll in place of a shift.

    A label that comes later than what it stands for, as an echo does, has no such end.
    """
    features = x[..., : max(1, x.shape[2] // 3)]
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(y), generator=generator) for _ in range(NUM_SHUFFLES)]
    for by in range(2, x.shape[1] // 2 + 1):
        for turned in (by, -by):
            ends = slice(0, by) if turned > 0 else slice(-by, None)  # where those of the other end come in
            labels, there = y[:, ends], features.roll(turned, 1)[:, ends]
            chance = torch.stack([_covariance(there, labels[order]) for order in orders])
            at_end = float((_covariance(there, labels) - chance.mean()) / chance.std().clamp(min=1e-12))
            if at_end < CERTAINLY:
                continue
            whole = features.roll(turned, 1)
            chance = torch.stack([_covariance(whole, y[order]) for order in orders])
            found = float((_covariance(whole, y) - chance.mean()) / chance.std().clamp(min=1e-12))
            if found > max(CERTAINLY, TIMES * own) and _is_everywhere(whole, y):
                return f"{by} places {'before' if turned < 0 else 'behind'}, around the ends of the sequence"
    return ""


def _is_everywhere(x: Tensor, y: Tensor) -> bool:
    """Whether labels go with features at most places: of a sequence that is reversed, one or two meet in any roll."""
    y = _centered(y)
    at = torch.einsum("npf,npk->pfk", x, y).square().sum((1, 2))
    by_chance = torch.einsum("npf,npk->pfk", x.roll(1, 0), y).square().sum((1, 2))
    return float((at - by_chance).median()) > EVERYWHERE * float((at - by_chance).mean())


def _covariance(x: Tensor, y: Tensor) -> Tensor:
    """The squared covariance of features (N, P, F) and labels (N, P, K) at their places."""
    return (x.flatten(0, 1).T @ _centered(y).flatten(0, 1)).square().sum()


def _other_orders(y: Tensor, shape: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """Labels in orders in which they are often mistaken; of a sequence, another order of places may be the task."""
    for by in (1, -1, 2, -2):
        yield f"of the sample {abs(by)} {'before' if by > 0 else 'behind'}", y.roll(by, 0)
    if not shape:
        return
    pictures = y.unflatten(1, shape)
    yield "turned upside down", pictures.flip(1).flatten(1, 2)
    yield "mirrored", pictures.flip(2).flatten(1, 2)
    if shape[0] == shape[1]:
        yield "with height and width exchanged", pictures.transpose(1, 2).flatten(1, 2)
