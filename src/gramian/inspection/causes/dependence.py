"""Whether labels depend on inputs at all: a test by neighbors, against shuffled labels."""

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
NEIGHBORS = 5
# Below this p-value of any of the statistics, the labels depend on the inputs.
LEVEL = 0.02


@dataclass(frozen=True)
class Dependence:
    """The smallest p-value of the statistics, the level below which labels count as dependent, and the evidence."""

    p_value: float
    level: float
    evidence: str


def labels_depend(batches: Sequence[Any]) -> Dependence | None:
    """Test whether the labels depend on the inputs: do neighbors, and linear scores, agree more than by chance?

    Two statistics of all samples: how often the nearest neighbors of a sample have its label, and the squared
    correlation of the labels with inputs along the leading principal directions. Their distribution without dependence
    is that under shuffled labels, of which the mean and deviation of 50 are taken.

    Args:
        batches: with inputs and one class label for each sample.

    Returns: the test; `None` where there are too few samples, or the labels are not one class for each.
    Raises: nothing of its own.
    Cost: O(N² d) for N ≤ 1,024 samples of d features.
    Source: nearest-neighbor two-sample tests, Schilling 1986; permutation tests, Good 2005.
    """
    rows: list[Tensor] = []
    classes: list[Tensor] = []
    for batch in batches:
        try:
            x, y = main_input(batch), labels_of(batch)
        except (GramianError, TypeError, ValueError, KeyError, IndexError):
            return None
        if y.is_floating_point() or y.ndim != 1 or len(x) != len(y):
            return None
        rows.append(_features(x.detach().cpu()))
        classes.append(y.detach().cpu())
    if not rows or any(r.shape[1] != rows[0].shape[1] for r in rows):
        return None
    x, y = torch.cat(rows)[:MOST], torch.cat(classes)[:MOST]
    num = int(y.max()) + 1 if len(y) else 0
    if len(y) < LEAST or num < 2 or num > len(y) // 5 or int(y.min()) < 0 or not bool(x.isfinite().all()):
        return None
    generator = torch.Generator().manual_seed(0)
    shuffled = [y[torch.randperm(len(y), generator=generator)] for _ in range(50)]
    x = _standardized(x)
    found, *by_chance = _statistics(_neighbors(x), _principal(x), torch.stack((y, *shuffled)), num)
    by_chance = torch.stack(by_chance)
    z = (found - by_chance.mean(0)) / by_chance.std(0).clamp(min=1e-9)
    p = float(torch.special.erfc(z.max() / 2**0.5)) / 2 * len(z)
    return Dependence(
        min(p, 1.0),
        LEVEL,
        f"of {len(y)} samples, the {NEIGHBORS} nearest neighbors share the label in {float(found[0]):.1%} of cases, "
        f"{float(by_chance[:, 0].mean()):.1%} if labels are shuffled (p = {min(p, 1.0):.2g} for dependence)",
    )


def _features(x: Tensor) -> Tensor:
    """One row of standardizable features for each sample; tokens count by position and in all."""
    if x.is_floating_point():
        return x.float().flatten(1)
    flat = x.flatten(1).long().clamp(min=0)
    num = min(int(flat.max()) + 1, 512)
    one_hot = torch.nn.functional.one_hot(flat.clamp(max=num - 1), num).float()
    counts = one_hot.sum(1)
    return torch.cat((counts, one_hot.flatten(1)[:, :4096]), 1)


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
