"""Gram matrices that stream, and the functions of them that every verb uses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gramian import linalg
from gramian.errors import ShapeError

__all__ = ["At", "DiagonalGram", "Gram", "Sums", "power_of_two", "sums"]

_SAFE = 2.0**30
"""Magnitudes between 1/_SAFE and _SAFE are squared and summed in float32 as they are."""
_LOW, _HIGH = 1e-18, 1e30
"""Sums of squares between these have neither overflowed nor lost what matters beside the largest."""


@dataclass(frozen=True)
class At:
    """A place in a batch: entries `index` along dimension `axis`."""

    axis: int
    index: tuple[int, ...]


class _Moments:
    """What both kinds of second moment share: sums over vectors of length `dim`, one for each entry of `batch`."""

    total: Tensor
    sum: Tensor
    count: Tensor

    def __init__(self, dim: int, batch: tuple[int, ...] = (), *, device: torch.device | str | None = None) -> None:
        self.dim = dim
        self.batch = tuple(batch)
        self.sum = torch.zeros(*self.batch, dim, dtype=torch.float64, device=device)
        self.count = torch.zeros(self.batch, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, total: Tensor, sum: Tensor, count: Tensor) -> Any:
        """The second moment whose `tensors()` are these; they are not copied."""
        made = cls.__new__(cls)
        made.dim, made.batch = sum.shape[-1], tuple(sum.shape[:-1])
        made.total, made.sum, made.count = total, sum, count
        return made

    def _rows(self, x: Tensor, at: At | None = None) -> Tensor:
        """`x` (*batch, rows, dim) without gradient, in float32 or wider; without a batch, any leading dimensions."""
        batch = list(self.batch)
        if at is not None:
            batch[at.axis] = len(at.index)
        if x.ndim == 0 or x.shape[-1] != self.dim or (batch and list(x.shape[:-2]) != batch):
            wanted = "".join(f"{b}, " for b in batch) + "rows, " if batch else "..., "
            raise ShapeError(f"{type(self).__name__}.update: expected ({wanted}{self.dim}), got {tuple(x.shape)}")
        x = x.detach()
        x = x if x.dtype == torch.float64 else x.float()
        return x if batch else x.reshape(math.prod(x.shape[:-1]), self.dim)

    def add(
        self,
        total: Tensor,
        sum: Tensor,
        count: Tensor | float | int,
        scale: Tensor | None = None,
        at: At | None = None,
    ) -> Any:
        """Adds sums made elsewhere: of second moments, of vectors, and how many; vectors divided by `scale` before."""
        square = 1.0
        if scale is not None:
            wide = scale.double()
            sum = sum * wide
            if at is None and total.device.type == "cpu":
                square = float(wide) ** 2  # in the same pass as the addition
            else:
                total = total.double() * wide * wide
        if at is None:
            self.total.add_(total, alpha=square)
            self.sum += sum
            self.count += count
            return self
        index = torch.tensor(at.index, device=self.sum.device)
        self.total.index_add_(at.axis, index, total.double())
        self.sum.index_add_(at.axis, index, sum)
        shape = [len(at.index) if i == at.axis else size for i, size in enumerate(self.batch)]
        self.count.index_add_(at.axis, index, torch.as_tensor(count, device=self.sum.device).double().expand(shape))
        return self

    def merge(self, other: _Moments) -> Any:
        """Adds another's sums: the second moment of both sets of vectors together."""
        if type(other) is not type(self) or (other.dim, other.batch) != (self.dim, self.batch):
            raise ShapeError(
                f"{type(self).__name__}.merge: dimensions differ: {(*self.batch, self.dim)} and "
                f"{(*other.batch, other.dim)} of {type(other).__name__}"
            )
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine += theirs.to(mine.device)
        return self

    def decay(self, factor: float) -> Any:
        """Multiplies sums and counts, so that what comes later weighs more: an exponential moving average."""
        for tensor in self.tensors():
            tensor *= factor
        return self

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sums that merging, saving and reducing over ranks act on: second moment, first moment, count."""
        return self.total, self.sum, self.count

    @property
    def mean(self) -> Float[Tensor, "*batch dim"]:
        """`(1/n) Σ xᵢ` in float64."""
        return self.sum / self._count(1)

    @property
    def rms(self) -> float:
        """Root mean square of one element: `√(tr M / dim)`, over all of a batch."""
        diagonal = self.diagonal
        return float((diagonal.mean() if diagonal.numel() else diagonal.sum()).clamp_min(0).sqrt())

    @property
    def diagonal(self) -> Float[Tensor, "*batch dim"]:
        """The diagonal of `M`."""
        total = self.total if self.total.ndim == self.sum.ndim else self.total.diagonal(dim1=-2, dim2=-1)
        return total / self._count(1)

    def _count(self, dims: int) -> Tensor:
        count = torch.as_tensor(self.count, dtype=torch.float64)
        count = torch.where(count == 0, 1.0, count)
        return count.reshape(self.batch + (1,) * dims)

    def __repr__(self) -> str:
        batch = f"batch={self.batch}, " if self.batch else ""
        count = f"{self.count:g}" if not self.batch else f"{self.count.min():g}…{self.count.max():g}"
        return f"{type(self).__name__}({batch}dim={self.dim}, count={count})"


class Gram(_Moments):
    """A second moment `M = (1/n) Σ xᵢ xᵢᵀ` of vectors of length `dim`, with their mean, that streams.

    `batch` gives several at once: the heads of a projection, the groups of a convolution. Sums are kept in float64,
    each update scaled by a power of two where it needs it, so that vectors near 1e-30 (a vanishing gradient) do not
    square to zero. `merge` of parts equals the whole to rounding.

    >>> gram = Gram(2)
    >>> gram.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).update(torch.tensor([[1.0, 1.0]]))
    Gram(dim=2, count=3)
    >>> gram.matrix
    tensor([[0.6667, 0.3333],
            [0.3333, 0.6667]], dtype=torch.float64)
    >>> gram.inv(damping=1.0)
    tensor([[ 0.6250, -0.1250],
            [-0.1250,  0.6250]], dtype=torch.float64)
    """

    def __init__(self, dim: int, batch: tuple[int, ...] = (), *, device: torch.device | str | None = None) -> None:
        super().__init__(dim, batch, device=device)
        self.total = torch.zeros(*self.batch, dim, dim, dtype=torch.float64, device=device)

    def update(self, x: Float[Tensor, "*rows dim"], count: float | None = None, at: At | None = None) -> Gram:
        """Adds the rows of `x` `(*batch, rows, dim)`. `count` replaces the number of rows (units of a loss)."""
        total, first, rows, scale = sums(self._rows(x, at))
        return self.add(total, first, rows if count is None else count, scale, at)

    @property
    def matrix(self) -> Float[Tensor, "*batch dim dim"]:
        """`M = (1/n) Σ xᵢ xᵢᵀ` in float64; zeros before the first update."""
        return self.total / self._count(2)

    @property
    def covariance(self) -> Float[Tensor, "*batch dim dim"]:
        """`M − mean meanᵀ`. Where the mean dominates, what is below its rounding is lost, as it is to a layer."""
        mean = self.mean
        return self.matrix - mean.unsqueeze(-1) * mean.unsqueeze(-2)

    # Functions of M, certified by gm.linalg: each raises ConvergenceError where its answer does not exist.

    def inv(self, damping: float = 0.0) -> Float[Tensor, "*batch dim dim"]:
        """`(M + λI)⁻¹`."""
        return linalg.inv(self.matrix, damping)

    def solve(self, b: Float[Tensor, "*batch dim k"], damping: float = 0.0) -> Float[Tensor, "*batch dim k"]:
        """`(M + λI)⁻¹ b`."""
        return linalg.solve(self.matrix, b, damping)

    def inv_root(self, p: int, damping: float = 0.0) -> Float[Tensor, "*batch dim dim"]:
        """`(M + λI)^(-1/p)`."""
        return linalg.inv_root(self.matrix, p, damping)

    def sqrtm(self) -> Float[Tensor, "*batch dim dim"]:
        """`M^(1/2)`."""
        return linalg.sqrtm(self.matrix)

    def eigvalsh(self) -> Float[Tensor, "*batch dim"]:
        """The eigenvalues of `M`, ascending."""
        return linalg.svdvals(self.matrix).flip(-1)


class DiagonalGram(_Moments):
    """The diagonal of a second moment: where `M` is diagonal (one-hot inputs), or too wide to be kept whole.

    For indices, `M[v, v]` is the share of index `v`, and nothing is lost.

    >>> DiagonalGram(3).update(torch.tensor([0, 2, 2, 2])).diagonal
    tensor([0.2500, 0.0000, 0.7500], dtype=torch.float64)
    """

    def __init__(self, dim: int, batch: tuple[int, ...] = (), *, device: torch.device | str | None = None) -> None:
        super().__init__(dim, batch, device=device)
        self.total = torch.zeros_like(self.sum)

    def update(self, x: Tensor, count: float | None = None, at: At | None = None) -> DiagonalGram:
        """Adds rows `(*batch, rows, dim)`, or one-hot rows given as integer indices of any shape."""
        if not x.is_floating_point():
            shares = torch.bincount(x.detach().flatten(), minlength=self.dim).double()
            return self.add(shares, shares, x.numel() if count is None else count)
        x = self._rows(x, at)
        scale = power_of_two(x)
        x = x if scale is None else x / scale
        squares, first = x.square().sum(-2, dtype=torch.float64), x.sum(-2, dtype=torch.float64)
        return self.add(squares, first, x.shape[-2] if count is None else count, scale, at)


Sums = tuple[Tensor, Tensor, int, "Tensor | None"]


def sums(x: Float[Tensor, "*batch rows dim"], precision: str = "float32") -> Sums:
    """`Σ xxᵀ`, `Σ x`, their number, and the power of two that x was divided by first, if any: what `Gram.add` takes."""
    x = x if x.dtype == torch.float64 else x.float()
    if x.device.type == "cpu":
        # Whether a scale is needed shows on the diagonal, which is far smaller than x.
        total = linalg.syrk(x, precision=precision)
        diagonal = total.diagonal(dim1=-2, dim2=-1)
        if not diagonal.numel() or _LOW < float(diagonal.amax()) < _HIGH:
            return total, x.sum(-2).double(), x.shape[-2], None
    scale = power_of_two(x)
    if scale is not None:
        x = x / scale
    return linalg.syrk(x, precision=precision), x.sum(-2).double(), x.shape[-2], scale


def power_of_two(x: Tensor) -> Tensor | None:
    """The power of two at the largest finite magnitude of `x`; dividing by it is exact. `None` where it is not needed.

    On a GPU it is always taken: to know that it is not needed would be to wait for the device.
    """
    if x.numel() == 0:
        return None
    largest = torch.linalg.vector_norm(x, torch.inf)
    if x.device.type == "cpu" and (1 / _SAFE < float(largest) < _SAFE or x.dtype == torch.float64):
        return None
    # Kept within what float32 can hold as a normal number together with its inverse.
    exponent = torch.frexp(largest).exponent.clamp(-120, 120).to(x.dtype)
    return torch.where(torch.isfinite(largest) & (largest > 0), torch.exp2(exponent), torch.ones_like(largest))
