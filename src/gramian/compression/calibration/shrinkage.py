"""Shrinkage: a second moment of a few rows, made fit to weigh errors by.

The eigenvalues of a sample's second moment spread more than the true ones: the smallest are far too small, and a cut
would put its error exactly there. How far each has to move follows from the eigenvalues and the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gramian.compression.calibration.wide import eigen
from gramian.errors import InputError
from gramian.gram import DiagonalGram, Gram
from gramian.linalg import syrk

__all__ = ["FLOOR", "Roots", "roots", "shrunk"]

# The least eigenvalue, as a share of the mean one. Directions in which nothing ever varied (dead inputs) have the
# eigenvalue 0 however many rows there are, and their inverse roots must exist.
FLOOR = 1e-6
_ZERO = 1e-10
"""Eigenvalues below this share of the largest are rounding."""
_ROUNDING = 1e-6
"""A variance below this share of the second moment is rounding, since rows are multiplied in float32."""


class Roots:
    """`M^½` and `M^-½` of a second moment, whole or diagonal, as maps of rows and columns.

    Args:
        root, inverse: (d, d); or (d,), the diagonals. The inverse may be a function that gives it, called once it is
            asked for: a matrix is cut by that of its shorter side alone.
    """

    def __init__(self, root: Tensor, inverse: Tensor | Callable[[], Tensor]) -> None:
        self.root, self._inverse = root, inverse

    @property
    def inverse(self) -> Tensor:
        """`M^-½`."""
        if not isinstance(self._inverse, Tensor):
            self._inverse = self._inverse()
        return self._inverse

    def to(self, dtype: torch.dtype) -> Roots:
        """The same in another dtype."""
        return self if self.root.dtype == dtype else Roots(self.root.to(dtype), lambda: self.inverse.to(dtype))

    def left(self, w: Tensor) -> Tensor:
        """`M^½ W`."""
        return self.root[:, None] * w if self.root.ndim == 1 else self.root @ w

    def right(self, w: Tensor) -> Tensor:
        """`W M^½`."""
        return w * self.root if self.root.ndim == 1 else w @ self.root

    def solve_left(self, w: Tensor) -> Tensor:
        """`M^-½ W`."""
        return self.inverse[:, None] * w if self.inverse.ndim == 1 else self.inverse @ w

    def solve_right(self, w: Tensor) -> Tensor:
        """`W M^-½`."""
        return w * self.inverse if self.inverse.ndim == 1 else w @ self.inverse


def shrunk_mean(moment: Gram | DiagonalGram, rows: float) -> Tensor:
    """The mean, towards zero by as much as it is uncertain: that of one row says nothing of the next.

    Args:
        moment: a second moment.
        rows: how many independent rows it stands for.

    Returns:
        The mean in float64.

    Cost: none to speak of.
    Source: the positive-part estimator of James & Stein (1961).

    >>> shrunk_mean(Gram(2).update(torch.tensor([[1.0, 0.0]])), 1.0)
    tensor([0., 0.], dtype=torch.float64)
    """
    mean = moment.mean
    size = mean.square().sum()
    if rows <= 1 or not bool(size > 0):
        return torch.zeros_like(mean)
    spread = (moment.diagonal - mean.square()).sum().clamp_min(0)
    return mean * (1 - spread / ((rows - 1) * size)).clamp_min(0)


def pooled(moment: Gram | DiagonalGram, entry: int, rows: Tensor) -> Gram | DiagonalGram:
    """The second moment of one entry of a batch, as near to that of all entries together as its noise asks for.

    `(1 − α) M_e + α t M`, with the M of all rows, scaled by t to the trace of M_e, and α the expected squared error of
    M_e over its squared distance from the other. The result stands for more rows than M_e: the error is smaller.

    Args:
        moment: of a batch of experts, its first dimension; the parts of one may be a second.
        entry: which expert.
        rows: (E,), how many rows each entry is estimated from.

    Returns:
        The second moment, whose count is the number of rows that it stands for.

    Cost: a sum of the batch.
    Source: shrinkage towards a target (Ledoit & Wolf, J. Multivariate Analysis 88, 2004), its error that of Gaussian
    rows (Chen et al. 0907.4698, eq. 17).

    >>> moment = Gram(2, (2,)).update(torch.stack([torch.eye(2), torch.eye(2)]))
    >>> pooled(moment, 0, torch.tensor([2.0, 2.0])).count
    tensor(4., dtype=torch.float64)
    """
    whole = isinstance(moment, Gram)
    ends = (-2, -1) if whole else (-1,)
    count = torch.as_tensor(moment.count)[entry][(...,) + (None,) * len(ends)].clamp_min(1.0)
    own, target = moment.total[entry] / count, moment.total.sum(0)

    def trace(m: Tensor) -> Tensor:
        return (m.diagonal(dim1=-2, dim2=-1) if whole else m).sum(-1)[(...,) + (None,) * len(ends)]

    target = target * (trace(own) / trace(target).clamp_min(1e-300))
    num = rows[entry].to(own)
    size = own.square().sum()
    noise = ((trace(own).square().sum() if whole else 0.0) + size) / num
    distance = (own - target).square().sum()
    share = (noise / distance).clamp(max=1.0) if bool(distance > 0) else torch.ones_like(noise)
    most = float(rows.sum())
    stands = min(most, float(num) / max(1 - float(share), 1e-6) ** 2)
    mixed = torch.lerp(own, target, share)
    first = moment.sum[entry] / count.flatten(-len(ends))  # of its own rows
    kind = type(moment)
    return kind.of(mixed * stands, first * stands, torch.full(own.shape[: own.ndim - len(ends)], stands).to(own))


def roots(moment: Gram | DiagonalGram, rows: float, *, around: Tensor | None = None) -> Roots:
    """The roots of a shrunk second moment; the identity where it is zero.

    Args:
        moment: a second moment; of a batch, a root for each entry.
        rows: how many independent rows it stands for.
        around: a vector that is subtracted from the rows first.

    Returns:
        Both roots, in the dtype of `eigen`.

    Raises:
        InputError: it is not finite.

    Cost: an eigendecomposition.
    Source: see `shrunk`.

    >>> gram = Gram(2).update(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    >>> roots(gram, 1e9).root
    tensor([[1.4142, 0.0000],
            [0.0000, 0.7071]], dtype=torch.float64)
    """
    if isinstance(moment, DiagonalGram):
        values = moment.diagonal if around is None else moment.diagonal + around * (around - 2 * moment.mean)
        _check(values)
        level = values.mean(-1, keepdim=True)
        values = torch.where(level > 0, values.clamp_min(0) + FLOOR * level, 1.0)
        return Roots(values.sqrt(), values.rsqrt())
    m, noise = moment.matrix, torch.zeros((), dtype=torch.float64)
    if around is not None:
        cross = moment.mean.unsqueeze(-1) * around
        m = m - cross - cross.mT + around.unsqueeze(-1) * around
        noise = _ROUNDING * moment.diagonal.mean(-1)[..., None, None]
    _check(m)
    level = m.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    zero = level <= noise
    values, vectors = eigen(m / torch.where(zero, 1.0, level))
    counts = torch.as_tensor(moment.count, dtype=torch.float64).expand(moment.batch).flatten().tolist()
    each = zip(values.reshape(-1, moment.dim), counts, strict=True)
    values = torch.stack([shrunk(v, rows, seen=count) for v, count in each]).reshape(values.shape)
    root = ((values + FLOOR) * level.clamp_min(0)[..., 0]).sqrt()[..., None, :].to(vectors.dtype)
    eye = torch.eye(moment.dim, dtype=vectors.dtype, device=m.device)

    def of(values: Tensor) -> Tensor:
        return torch.where(zero, eye, syrk((vectors * values.sqrt()).mT))

    return Roots(of(root), lambda: of(1 / torch.where(zero, 1.0, root)))


def _check(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise InputError("is not finite; gm.inspect finds where NaN begins")


def shrunk(values: Tensor, rows: float, *, seen: float | None = None) -> Tensor:
    """The eigenvalues of a sample's second moment, moved to where the true ones most likely are.

    Each is shrunk towards its neighbors, so that a few directions of a large variance do not lift all the others, as
    the multiple of the identity does that the usual shrinkage adds. Directions that no row went along stay at zero:
    what is known is kept first, and what ranks remain go to them. The sum stays.

    Args:
        values: the eigenvalues, ascending, (d,); those below zero are rounding.
        rows: how many independent rows the second moment stands for.
        seen: how many rows were added, which bound its rank; by default `rows`.

    Returns:
        The eigenvalues.

    Cost: `d²` operations.
    Source: quadratic-inverse shrinkage (Ledoit & Wolf, Bernoulli 28, 2022, §4).

    >>> x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> values = torch.linalg.eigvalsh(x.T @ x / 50)  # the true ones are all 1
    >>> after = shrunk(values, 50.0)
    >>> bool(values.max() / values.min() > 100), bool(after.max() / after.min() < 3)
    (True, True)
    """
    values = values.clamp_min(0)
    live = values > _ZERO * values.max()
    num = int(live.sum())
    if num < 2:
        return values
    few = num < len(values) and (rows if seen is None else seen) <= len(values)
    dims = len(values) if few else num
    # At least as many rows as the rank, below which no sample has it.
    ratio = dims / (num if few else max(rows, num))
    width = min(ratio**2, ratio**-2) ** 0.35 / dims**0.35
    inverse = 1 / values[live]
    each = inverse[:, None].expand(num, num)
    gap = each - each.T
    weight = 1 / (gap.square() + width**2 * each.square())
    shift, spread = (each * gap * weight).mean(0), (width * each.square() * weight).mean(0)
    pull = shift.square() + spread.square()
    moved = values.clone()
    if few:
        moved[live] = 1 / (inverse * pull)
    else:
        keep = 1 - ratio
        moved[live] = 1 / (inverse * (keep**2 + 2 * ratio * keep * shift + ratio**2 * pull))
    moved = moved.clamp_min(0)
    return moved * (values.sum() / moved.sum())
