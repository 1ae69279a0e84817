"""Whether labels depend on inputs at all: tests against shuffled labels, and whether they could have seen it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gramian.alignment import labels_of
from gramian.batch import main_input
from gramian.errors import GramianError

__all__ = ["Dependence", "labels_depend"]

# Samples from which on the test is made, and up to which it is.
LEAST, MOST = 100, 1024
NEIGHBORS, NUM_SHUFFLES = 5, 50
# Below this p-value of any of the statistics, the labels depend on the inputs.
LEVEL = 0.02
# Labels that are made up, a quarter of them noise. Nothing is said unless the tests see nearly all of them.
NUM_MADE_UP, POWER = 20, 0.9


@dataclass(frozen=True)
class Dependence:
    """What the tests say of the labels.

    Attributes:
        p_value: the smallest of the statistics, times their number.
        level: below it, labels count as dependent.
        power: the share of labels that are made up, with a dependence, that the tests see; 1.0 where they see the own.
        evidence: in words.
    """

    p_value: float
    level: float
    power: float
    evidence: str

    @property
    def are_independent(self) -> bool:
        """Whether no dependence is seen, and one would have been."""
        return self.p_value > self.level and self.power >= POWER


def labels_depend(batches: Sequence[Any]) -> Dependence | None:
    """Test whether the labels depend on the inputs: do neighbors, and linear scores, agree more than by chance?

    Two statistics of all samples: how often the nearest neighbors of a sample have its label, and the squared
    correlation of the labels with inputs along the leading principal directions. Their distribution without dependence
    is that under shuffled labels, of which the mean and deviation of 50 are taken.

    That none is seen says nothing where none could be: few samples of many independent features are all alike. So the
    tests are also given labels that are made up of these inputs (of tokens' counts): the largest of as many random
    linear functions as there are classes, a quarter of them replaced by others' at random.

    Args:
        batches: with inputs and one class label for each sample.

    Returns: the test; `None` where there are too few samples, or the labels are not one class for each.
    Raises: nothing of its own.
    Cost: O(N² d) for N ≤ 1,024 samples of d features.
    Source: nearest-neighbor two-sample tests, Schilling 1986; permutation tests, Good 2005. The power is this library's
        own.
    """
    rows: list[Tensor] = []
    classes: list[Tensor] = []
    simple = 0
    for batch in batches:
        try:
            x, y = main_input(batch), labels_of(batch)
        except (GramianError, TypeError, ValueError, KeyError, IndexError):
            return None
        if y.is_floating_point() or y.ndim != 1 or len(x) != len(y):
            return None
        features, simple = _features(x.detach().cpu())
        rows.append(features)
        classes.append(y.detach().cpu())
    if not rows or any(r.shape[1] != rows[0].shape[1] for r in rows):
        return None
    x, y = torch.cat(rows)[:MOST], torch.cat(classes)[:MOST]
    num = int(y.max()) + 1 if len(y) else 0
    if len(y) < LEAST or num < 2 or num > len(y) // 5 or int(y.min()) < 0 or not bool(x.isfinite().all()):
        return None
    generator = torch.Generator().manual_seed(0)
    x = _standardized(x)
    graph, linear = _neighbors(x), _principal(x)

    def tested(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of labels (K, N), the statistics, those of the first shuffled, and the p-values times their number."""
        shuffled = [labels[0][torch.randperm(len(x), generator=generator)] for _ in range(NUM_SHUFFLES)]
        own, chance = (_statistics(graph, linear, of, num) for of in (labels, torch.stack(shuffled)))
        z = (own - chance.mean(0)) / chance.std(0).clamp(min=1e-9)
        return own, chance, (torch.special.erfc(z.amax(1) / 2**0.5) / 2 * z.shape[1]).clamp(max=1.0)

    (found,), chance, (p,) = tested(y[None])
    p, power = float(p), 1.0
    if p > LEVEL:
        made_up = _made_up(x[:, :simple], num, generator)
        power = float((tested(made_up)[2] < LEVEL).float().mean())
    return Dependence(
        p,
        LEVEL,
        power,
        f"of {len(y)} samples, the {NEIGHBORS} nearest neighbors share the label in {float(found[0]):.1%} of cases, "
        f"{float(chance[:, 0].mean()):.1%} if labels are shuffled (p = {p:.2g} for dependence; of labels made "
        f"up of these inputs, a quarter of them noise, {power:.0%} are seen)",
    )


def _made_up(x: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Labels (K, N) that depend on the inputs linearly, a quarter of them shuffled."""
    labels = []
    for _ in range(NUM_MADE_UP):
        y = (x @ torch.randn(x.shape[1], num, generator=generator)).argmax(1)
        order = torch.randperm(len(y), generator=generator)
        y[order[::4]] = y[order[::4]][torch.randperm(len(order[::4]), generator=generator)]
        labels.append(y)
    return torch.stack(labels)


def _features(x: Tensor) -> tuple[Tensor, int]:
    """One row of standardizable features for each sample, and how many of the first are simple.

    Tokens count in all, which is simple, and by position.
    """
    if x.is_floating_point():
        x = x.float().flatten(1)
        return x, x.shape[1]
    flat = x.flatten(1).long().clamp(min=0)
    num = min(int(flat.max()) + 1, 512)
    one_hot = torch.nn.functional.one_hot(flat.clamp(max=num - 1), num).float()
    counts = one_hot.sum(1)
    return torch.cat((counts, one_hot.flatten(1)[:, :4096]), 1), num


def _standardized(x: Tensor) -> Tensor:
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6 * float(x.std(0).amax() + 1e-30))
    return x.clamp(-5, 5)


def _neighbors(x: Tensor) -> Tensor:
    """Indices (N, k) of the nearest other samples."""
    distances = torch.cdist(x, x)
    distances.fill_diagonal_(float("inf"))
    return distances.topk(NEIGHBORS, largest=False).indices


def _principal(x: Tensor) -> Tensor:
    """Coordinates (N, r) along the leading principal directions, of unit length."""
    rank = max(1, min(x.shape[0] // 10, x.shape[1], 32))
    x = (x - x.mean(0)).double()
    if x.shape[0] < x.shape[1]:
        return torch.linalg.eigh(x @ x.T)[1][:, -rank:].float()
    u = x @ torch.linalg.eigh(x.T @ x)[1][:, -rank:]
    return (u / u.norm(dim=0).clamp(min=1e-12)).float()


def _statistics(graph: Tensor, linear: Tensor, labels: Tensor, num: int) -> Tensor:
    """The two statistics (K, 2) of each row of `labels` (K, N)."""
    agreement = (labels[:, graph] == labels[:, :, None]).float().mean((1, 2))
    one_hot = torch.nn.functional.one_hot(labels, num).float()
    fitted = (linear.T @ (one_hot - one_hot.mean(1, keepdim=True))).square().sum((1, 2))
    return torch.stack((agreement, fitted), dim=1)
