"""The singular values of a layer, weighted by what its outputs mean to the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from gramian.compression.budget.filling import Candidates
from gramian.compression.calibration.targets import Target
from gramian.compression.calibration.weighting import Weighting
from gramian.compression.calibration.wide import eigen, working
from gramian.compression.layers.feedback import Feedback, feedback_of
from gramian.compression.layers.lowrank import matrix_of
from gramian.compression.layers.rounding import noises
from gramian.linalg import syrk

__all__ = ["WeightedSVD", "decompose"]


@dataclass(frozen=True, eq=False)
class WeightedSVD:
    """One layer's weighted SVD: `G^½ W A^½ = U S Vᵀ`, and the factors of W.

    W is the layer's whole matrix (m, n), its rows in the order of the outputs; fused projections are factored together.

    Args:
        name: of the layer.
        values: S, descending; zero where the layer does not matter to the loss.
        left: `G^-½ U S`, (m, k), its columns as long as the rows of `right`.
        right: `Vᵀ A^-½`, (k, n).
        mean: of the inputs, where the layer's bias can take up the mean.
        dense: parameters of the weight as it is.
        feedback: how an error of one weight is made up for by others.
        noises: what rounding the matrix is expected to cost, see `noises` in `compression.layers.rounding`; or a
            function that gives the matrix, to find it once it is asked for.
        moments: (k,), the second moment of what each row of `right` makes of the inputs.
        diagonal: the sides ("inputs", "outputs") that are weighted by a diagonal alone.
        table: whether its rows are looked up. Factors of a table are held in floats.
        tied: the names of other layers that share the matrix. It can be factored, not rounded.
        unseen: rows of a table that were never looked up.
        most: the largest rank that the layer may have where it is factored; `None` for any below break-even.
    """

    name: str
    values: Tensor
    left: Tensor
    right: Tensor
    mean: Tensor | None
    dense: int
    feedback: Feedback
    noises: tuple[float, ...] | Callable[[], Tensor]
    moments: Tensor
    diagonal: tuple[str, ...] = ()
    table: bool = False
    tied: tuple[str, ...] = ()
    unseen: int = 0
    most: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return len(self.left), self.right.shape[1]

    def scaled(self, cut: float, rounding: float) -> WeightedSVD:
        """The same with every loss of a cut times a factor, and those of rounding and zeros times another."""
        feedback = replace(self.feedback, outputs=self.feedback.outputs * rounding)
        found = self.noises
        costs = found if callable(found) else tuple(one * rounding for one in found)
        return replace(self, values=self.values * cut**0.5, feedback=feedback, noises=costs)

    @cached_property
    def rounding(self) -> tuple[float, ...]:
        """What rounding the matrix is expected to cost for each number of bits."""
        return noises(self.noises(), self.feedback) if callable(self.noises) else self.noises

    def settled(self) -> WeightedSVD:
        """The same with what rounding costs found."""
        return replace(self, noises=self.rounding)

    @cached_property
    def candidates(self) -> Candidates:
        """What the layer can become, with what each loses."""
        squares = self.values.double().cpu().square()
        losses = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
        return Candidates(losses, self.shape, self.dense, self.most)

    @property
    def balanced(self) -> tuple[Tensor, Tensor]:
        """The factors with all columns of `left` alike, weighted by the outputs: best where both are rounded."""
        size = self.moments.clamp_min(1e-300).sqrt() / self.values.clamp_min(1e-150)
        size = torch.where((self.values > 0) & (self.moments > 0), size, 1.0)
        return self.left * size, self.right / size[:, None]

    @cached_property
    def factor_noise(self) -> Tensor:
        """(k + 1,), what rounding the factors of each rank to eight bits is expected to cost, one scale a row."""
        left, right = self.balanced
        squares = self.values.square()
        own = right.abs().amax(1).square() * self.feedback.costs.double().sum()  # times the size of its column of left
        largest = left.abs().cummax(1).values.square()
        other = (self.feedback.outputs @ largest) * squares.cumsum(0)
        each = (own.cumsum(0) + other) / (24 * 4.0**7)
        return torch.cat([each.new_zeros(1), each]).cpu()


def decompose(target: Target, weighting: Weighting, *, rounds: bool = True) -> WeightedSVD:
    """The weighted singular value decomposition of a layer.

    Args:
        target: the layer.
        weighting: of its two sides.
        rounds: whether the layer may be rounded or pruned, and not only cut.
    """
    w = matrix_of(target.module)
    m, n = w.shape
    dtype = working(m, n)
    w, a, g, matters = w.to(dtype), weighting.columns.to(dtype), weighting.rows.to(dtype), weighting.matters
    # The factors are projections of W itself: with all ranks they are W, whatever the rounding of the roots. No product
    # is kept that has the longer side, since a head has tens of thousands of rows.
    weighted = g.left(a.right(w))
    squares, vectors = eigen(syrk((weighted.mT if m <= n else weighted).double()))
    del weighted
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1).to(dtype)
    if m <= n:
        left, right = g.solve_left(vectors), g.left(vectors).mT @ w
        moments = squares  # of right, since its rows times A^½ are those of Uᵀ U S Vᵀ
    else:
        left, right = w @ a.left(vectors), a.solve_right(vectors.mT)
        moments = torch.ones_like(squares)
    values = squares.sqrt()
    if target.rank:  # beyond it, a product of factors has no singular values but rounding
        values, moments, left, right = (t[: target.rank] for t in (values, moments, left.mT, right))
        left = left.mT
    # The singular values are shared out so that neither factor is badly scaled.
    scale = (right.norm(dim=1) / left.norm(dim=0)).sqrt()
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
    feedback = Feedback.unknown()
    if rounds:
        feedback = feedback_of(weighting.columns, weighting.rows, weighting.seen)
        feedback = replace(feedback, outputs=feedback.outputs * matters)
    return WeightedSVD(
        target.name,
        values * matters,
        left * scale,
        right / scale[:, None],
        weighting.mean,
        target.dense,
        feedback,
        partial(matrix_of, target.module),
        moments / scale.double().square(),
        weighting.diagonal,
        target.table,
        target.tied,
        weighting.unseen,
    )
