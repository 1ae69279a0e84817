"""Gram matrices that stream, and the functions of them that every verb uses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gramian import linalg
from gramian.errors import InputError, ShapeError

__all__ = ["DiagonalGram", "Gram", "Site", "Statistics"]


class Gram:
    """A second moment `M = (1/n) Σ xᵢ xᵢᵀ` of vectors of length `dim`, with their mean, that streams.

    Sums are kept in float64, each update scaled to its largest element first, so that vectors near 1e-30 (a vanishing
    gradient) do not square to zero. `merge` of parts equals the whole to rounding.

    >>> gram = Gram(2)
    >>> gram.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).update(torch.tensor([[1.0, 1.0]]))
    Gram(dim=2, count=3)
    >>> gram.matrix
    tensor([[0.6667, 0.3333],
            [0.3333, 0.6667]], dtype=torch.float64)
    """

    def __init__(self, dim: int, *, device: torch.device | str | None = None) -> None:
        self.dim = dim
        self.total = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.count = 0.0

    def update(self, x: Float[Tensor, "*rows dim"], count: float | None = None) -> Gram:
        """Adds the rows of `x`. `count` replaces the number of rows in the denominator (units of a loss)."""
        if x.shape[-1:] != (self.dim,):
            raise ShapeError(f"Gram.update: expected (..., {self.dim}), got {tuple(x.shape)}")
        x = x.detach().reshape(math.prod(x.shape[:-1]), self.dim)
        x = x if x.dtype == torch.float64 else x.float()
        scale = _power_of_two(x)
        x = x / scale
        wide = scale.double()
        self.total += linalg.syrk(x).double() * wide * wide
        self.sum += x.sum(0, dtype=torch.float64) * wide
        self.count += len(x) if count is None else count
        return self

    def merge(self, other: Gram) -> Gram:
        """Adds another Gram's sums: the Gram of both sets of vectors together."""
        if other.dim != self.dim:
            raise ShapeError(f"Gram.merge: dimensions differ: {self.dim} and {other.dim}")
        self.total += other.total
        self.sum += other.sum
        self.count += other.count
        return self

    @property
    def matrix(self) -> Float[Tensor, "dim dim"]:
        """`M = (1/n) Σ xᵢ xᵢᵀ` in float64; zeros before the first update."""
        return self.total / (self.count or 1.0)

    @property
    def mean(self) -> Float[Tensor, " dim"]:
        """`(1/n) Σ xᵢ` in float64."""
        return self.sum / (self.count or 1.0)

    @property
    def covariance(self) -> Float[Tensor, "dim dim"]:
        """`M − mean meanᵀ`. Where the mean dominates, what is below its rounding is lost, as it is to a layer."""
        mean = self.mean
        return self.matrix - torch.outer(mean, mean)

    @property
    def rms(self) -> float:
        """Root mean square of one element: `√(tr M / dim)`."""
        return float((self.matrix.diagonal().mean() if self.dim else self.matrix.sum()).clamp_min(0).sqrt())

    def __repr__(self) -> str:
        return f"Gram(dim={self.dim}, count={self.count:g})"


class DiagonalGram:
    """The diagonal of a second moment, for inputs that are indices (an embedding's one-hot rows).

    `M` is diagonal there: `M[v, v]` is the share of index `v`.
    """

    def __init__(self, dim: int, *, device: torch.device | str | None = None) -> None:
        self.dim = dim
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.count = 0.0

    def update(self, index: Tensor) -> DiagonalGram:
        """Adds one-hot vectors, given as indices of any shape."""
        self.total += torch.bincount(index.detach().flatten(), minlength=self.dim)
        self.count += index.numel()
        return self

    def merge(self, other: DiagonalGram) -> DiagonalGram:
        """Adds another's sums."""
        if other.dim != self.dim:
            raise ShapeError(f"DiagonalGram.merge: dimensions differ: {self.dim} and {other.dim}")
        self.total += other.total
        self.count += other.count
        return self

    @property
    def diagonal(self) -> Float[Tensor, " dim"]:
        """The diagonal of `M`."""
        return self.total / (self.count or 1.0)

    def __repr__(self) -> str:
        return f"DiagonalGram(dim={self.dim}, count={self.count:g})"


def _power_of_two(x: Tensor) -> Tensor:
    """The power of two at the largest finite magnitude of `x`; dividing by it is exact. One where `x` is zero."""
    if x.numel() == 0:
        return x.new_ones(())
    largest = x.abs().amax()
    # Kept within what float32 can hold as a normal number together with its inverse.
    exponent = torch.frexp(largest).exponent.clamp(-120, 120).to(x.dtype)
    return torch.where(torch.isfinite(largest) & (largest > 0), torch.exp2(exponent), torch.ones_like(largest))


@dataclass
class Site:
    """One use of a block in the forward pass: `A`, the second moment of its inputs; `G`, of its output gradients.

    `A` is over rows (samples, tokens, patches), `G` over the loss's units: `G = (1/units) Σ_rows g gᵀ`. Either is
    `None`, with `reason`, where it does not exist. `calls` counts the forward calls that were seen.
    """

    A: Gram | DiagonalGram | None = None
    G: Gram | None = None
    reason: str = ""
    calls: int = 0


@dataclass
class Statistics(Mapping[str, Site]):
    """The sites of a model by block name, in the order of the forward pass.

    `loss` is the mean loss per unit, `units` the number of units seen, `fisher` which second moment `G` is.
    """

    sites: dict[str, Site] = field(default_factory=dict)
    fisher: str = "empirical"
    units: float = 0.0
    loss: float = float("nan")

    def __getitem__(self, name: str) -> Site:
        if name not in self.sites:
            known = ", ".join(list(self.sites)[:5])
            raise InputError(f"statistics: no block is named {name!r}; the first are {known or 'none'}")
        return self.sites[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The site of a block, or `default`."""
        return self.sites.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self.sites

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)
