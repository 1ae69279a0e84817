"""Second moments of streams of vectors, whole (`Gram`) or their diagonals (`DiagonalGram`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gramian import linalg
from gramian.errors import InputError, ShapeError
from gramian.linalg.engine.precision import in_full_precision
from gramian.linalg.engine.scaling import pow2

__all__ = ["At", "DiagonalGram", "Gram", "Sums", "power_of_two", "sums"]

_SAFE = 2.0**30
"""Magnitudes between 1/_SAFE and _SAFE are squared and summed in float32 without a scale."""
_LOW, _HIGH = 1e-18, 1e30
"""Sums of squares between these have not overflowed, and have lost nothing that counts beside the largest."""


@dataclass(frozen=True)
class At:
    """Some entries of a batch: those with the given indices along one dimension.

    Attributes:
        axis: a dimension of the batch.
        index: which entries along it.
    """

    axis: int
    index: tuple[int, ...]


class Sums(NamedTuple):
    """Sums over vectors x that were divided by `scale` first.

    Attributes:
        total: `(*batch, dim, dim)`, `Σ xxᵀ`, or its diagonal `(*batch, dim)`.
        first: `(*batch, dim)`, `Σ x`.
        num: the number of vectors.
        scale: a power of two, or `None` for one.
    """

    total: Tensor
    first: Tensor
    num: int
    scale: Tensor | None = None


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
        """The second moment with these sums, which are not copied: the inverse of `tensors`.

        Args:
            total: `Σ xxᵀ`, or its diagonal.
            sum: `Σ x`.
            count: the number of vectors.
        """
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
        """Adds sums that were computed elsewhere; `gram.add(*sums(x))` is `gram.update(x)`.

        Args:
            total: `Σ xxᵀ`, or its diagonal, over vectors that were divided by `scale`.
            sum: `Σ x`, likewise.
            count: the number of vectors.
            scale: a power of two, or `None` for one.
            at: which entries of the batch the sums are of; all by default.
        """
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
        """Adds another's sums, so that this is the second moment of both sets of vectors together."""
        if type(other) is not type(self) or (other.dim, other.batch) != (self.dim, self.batch):
            raise ShapeError(
                f"{type(self).__name__}.merge: dimensions differ: {(*self.batch, self.dim)} and "
                f"{(*other.batch, other.dim)} of {type(other).__name__}"
            )
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine += theirs.to(mine.device)
        return self

    def decay(self, factor: float) -> Any:
        """Multiplies sums and counts by a factor, so that later vectors weigh more: an exponential moving average."""
        for tensor in self.tensors():
            tensor *= factor
        return self

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sums `Σ xxᵀ` (or its diagonal) and `Σ x`, and the count: what is saved and added over ranks."""
        return self.total, self.sum, self.count

    @property
    def mean(self) -> Float[Tensor, "*batch dim"]:
        """`(1/n) Σ xᵢ` in float64."""
        return self.sum / self._count(1)

    @property
    def rms(self) -> float:
        """Root mean square of the vectors' elements: `√(tr M / dim)`, over the whole batch."""
        diagonal = self.diagonal
        return float((diagonal.mean() if diagonal.numel() else diagonal.sum()).clamp_min(0).sqrt())

    @property
    def diagonal(self) -> Float[Tensor, "*batch dim"]:
        """The diagonal of `M`, in float64."""
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
    """A second moment `M = (1/n) Σ xᵢ xᵢᵀ` of vectors that arrive in parts, with their mean.

    Sums are kept in float64. An update whose squares would underflow or overflow is divided by a power of two first:
    the gradients of an untrained deep network may be near 1e-30, and their squares do not exist in float32.

    Args:
        dim: the length of the vectors.
        batch: the shape of a batch of second moments, updated together: the heads of a projection, the groups of a
            convolution. One by default.
        device: of the sums.

    Raises: nothing of its own; `update` and `merge` raise ShapeError.
    Cost: an update takes `rows·dim²` operations; memory is 8 bytes times `dim²`. Accuracy: merging the second moments
    of parts gives that of the whole to rounding; products of float32 rows are summed in float32 within one update.
    Source: the definition.

    >>> gram = Gram(2)
    >>> gram.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).update(torch.tensor([[1.0, 1.0]]))
    Gram(dim=2, count=3)
    >>> gram.matrix
    tensor([[0.6667, 0.3333],
            [0.3333, 0.6667]], dtype=torch.float64)
    >>> root, inverse_root = gram.roots()
    >>> torch.dist(root @ root, gram.matrix) < 1e-12
    tensor(True)
    """

    def __init__(self, dim: int, batch: tuple[int, ...] = (), *, device: torch.device | str | None = None) -> None:
        super().__init__(dim, batch, device=device)
        self.total = torch.zeros(*self.batch, dim, dim, dtype=torch.float64, device=device)

    def update(self, x: Float[Tensor, "*rows dim"], count: float | None = None, at: At | None = None) -> Gram:
        """Adds the rows of a tensor, and returns this second moment.

        Args:
            x: `(*batch, rows, dim)`; without a batch, any leading dimensions.
            count: takes the place of the number of rows in n: a number of units of a loss.
            at: which entries of the batch the rows belong to; all by default.
        """
        total, first, num, scale = sums(self._rows(x, at))
        return self.add(total, first, num if count is None else count, scale, at)

    @property
    def matrix(self) -> Float[Tensor, "*batch dim dim"]:
        """`M = (1/n) Σ xᵢ xᵢᵀ` in float64; zeros before the first update."""
        return self.total / self._count(2)

    @property
    def covariance(self) -> Float[Tensor, "*batch dim dim"]:
        """`M − mean meanᵀ` in float64. A variance far below the squared mean is lost to rounding."""
        mean = self.mean
        return self.matrix - mean.unsqueeze(-1) * mean.unsqueeze(-2)

    def roots(self, damping: float = 0.0, *, centered: bool = False) -> tuple[Tensor, Tensor]:
        """The square root and the inverse square root, `M_λ^½` and `M_λ^-½`, of the damped second moment.

        `M_λ = M + λμI`, where μ is the mean eigenvalue of M, so that λ has no unit. Where M is zero, both roots are
        the identity. Without damping, the inverse root of a singular M is not finite.

        Args:
            damping: λ, at least 0.
            centered: whether M is the covariance in place of the second moment.

        Cost: one eigendecomposition in float64.
        """
        if not 0 <= damping < math.inf:
            raise InputError(f"Gram.roots: damping must be finite and not negative, got {damping}")
        m = self.covariance if centered else self.matrix
        level = m.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None]
        zero = level <= 0
        # Scaled first: the Gram of a vanishing gradient is near 1e-40. Eigenvalues below zero are rounding.
        level = torch.where(zero, 1.0, level)
        values, vectors = torch.linalg.eigh(m / level[..., None])
        root = ((values.clamp_min(0) + damping).sqrt() * level.sqrt())[..., None, :]
        eye = torch.eye(self.dim, dtype=m.dtype, device=m.device)
        return (
            torch.where(zero[..., None], eye, vectors * root @ vectors.mT),
            torch.where(zero[..., None], eye, vectors / root @ vectors.mT),
        )


class DiagonalGram(_Moments):
    """The diagonal of a second moment, for vectors too long for the whole of it, or one-hot ones.

    Of one-hot vectors, given by their indices, the second moment is diagonal: `M[v, v]` is the share of index v.

    Args:
        dim: the length of the vectors.
        batch: the shape of a batch of second moments; one by default.
        device: of the sums.

    Raises: nothing of its own; `update` and `merge` raise ShapeError.
    Cost: an update takes `rows·dim` operations; memory is 8 bytes times `dim`.
    Source: the definition.

    >>> DiagonalGram(3).update(torch.tensor([0, 2, 2, 2])).diagonal
    tensor([0.2500, 0.0000, 0.7500], dtype=torch.float64)
    """

    def __init__(self, dim: int, batch: tuple[int, ...] = (), *, device: torch.device | str | None = None) -> None:
        super().__init__(dim, batch, device=device)
        self.total = torch.zeros_like(self.sum)

    def update(self, x: Tensor, count: float | None = None, at: At | None = None) -> DiagonalGram:
        """Adds the rows of a tensor, and returns this second moment.

        Args:
            x: `(*batch, rows, dim)`; or integer indices of any shape, each a one-hot row.
            count: takes the place of the number of rows in n.
            at: which entries of the batch the rows belong to; all by default.
        """
        if not x.is_floating_point():
            shares = torch.bincount(x.detach().flatten(), minlength=self.dim).double()
            return self.add(shares, shares, x.numel() if count is None else count)
        x = self._rows(x, at)
        scale = power_of_two(x)
        x = x if scale is None else x / scale
        # torch sums float32 in pairs, and takes up to 280 times as long where it widens each entry first.
        squares, first = x.square().sum(-2).double(), x.sum(-2).double()
        return self.add(squares, first, x.shape[-2] if count is None else count, scale, at)


@in_full_precision
def sums(x: Float[Tensor, "*batch rows dim"], precision: str = "float32") -> Sums:
    """`Σ xxᵀ` and `Σ x` over the rows of a tensor, scaled so that squares neither underflow nor overflow.

    Args:
        x: `(..., rows, dim)`.
        precision: "float32", or "bfloat16" for products of float32 rows in that dtype, as in `gm.linalg.syrk`.

    Returns: the sums, the number of rows, and the scale: what `Gram.add` takes.
    Raises:
        InputError: another precision.
    Cost: `rows·dim²`. Accuracy: that of `gm.linalg.syrk`.
    Source: the definition.

    >>> total, first, num, scale = sums(torch.full((2, 1), 1e-30))
    >>> total.double() * scale.double() ** 2
    tensor([[2.0000e-60]], dtype=torch.float64)
    """
    x = x if x.dtype == torch.float64 else x.float()
    if x.device.type == "cpu":
        # The diagonal shows whether a scale is needed, and is far smaller than x.
        total = linalg.syrk(x, precision=precision)
        diagonal = total.diagonal(dim1=-2, dim2=-1)
        if not diagonal.numel() or _LOW < float(diagonal.amax()) < _HIGH:
            return Sums(total, x.sum(-2).double(), x.shape[-2], None)
    scale = power_of_two(x)
    if scale is not None:
        x = x / scale
    return Sums(linalg.syrk(x, precision=precision), x.sum(-2).double(), x.shape[-2], scale)


def power_of_two(x: Tensor) -> Tensor | None:
    """The power of two at the largest finite magnitude of a tensor; dividing by it is exact.

    On a CPU, `None` where squares are safe without it. On a GPU it is always computed, since to decide would take a
    synchronization.

    Args:
        x: a floating tensor of any shape.

    Returns: a scalar tensor, one for a tensor that is zero or not finite; or `None`.
    Raises: nothing of its own.
    Cost: one pass.
    Source: this library's own.

    >>> power_of_two(torch.tensor([3e-20])), power_of_two(torch.tensor([3.0]))
    (tensor(5.4210e-20), None)
    """
    if x.numel() == 0:
        return None
    low, high = torch.aminmax(x)  # 20 times as fast as the norm to ∞
    largest = torch.maximum(-low, high)
    if x.device.type == "cpu" and (1 / _SAFE < float(largest) < _SAFE or x.dtype == torch.float64):
        return None
    # Within what float32 can hold as a normal number together with its inverse.
    exponent = torch.frexp(largest).exponent.clamp(-120, 120).long()
    return torch.where(torch.isfinite(largest) & (largest > 0), pow2(exponent).to(x.dtype), torch.ones_like(largest))
