"""The singular values of a layer, weighted by what its outputs mean to the loss."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from gramian.block import Block
from gramian.compression.feedback import Feedback, feedback_of
from gramian.compression.filling import Candidates
from gramian.compression.lowrank import matrix_of
from gramian.compression.rounding import noises
from gramian.compression.shrinkage import Roots, roots, shrunk_mean
from gramian.compression.targets import Target
from gramian.errors import InputError
from gramian.gram import DiagonalGram, Gram
from gramian.layers import layout_of
from gramian.statistics import Site, Statistics

__all__ = ["WeightedSVD", "decompose", "site_of"]


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
        noises: what rounding the matrix is expected to cost, see `gramian.compression.rounding.noises`.
        moments: (k,), the second moment of what each row of `right` makes of the inputs.
        diagonal: the sides ("inputs", "outputs") that are weighted by a diagonal alone.
    """

    name: str
    values: Tensor
    left: Tensor
    right: Tensor
    mean: Tensor | None
    dense: int
    feedback: Feedback
    noises: tuple[float, ...]
    moments: Tensor
    diagonal: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return len(self.left), self.right.shape[1]

    def scaled(self, cut: float, rounding: float) -> WeightedSVD:
        """The same with every loss of a cut times a factor, and those of rounding and zeros times another."""
        feedback = replace(self.feedback, outputs=self.feedback.outputs * rounding)
        costs = tuple(one * rounding for one in self.noises)
        return replace(self, values=self.values * cut**0.5, feedback=feedback, noises=costs)

    @cached_property
    def candidates(self) -> Candidates:
        """What the layer can become, with what each loses."""
        squares = self.values.double().cpu().square()
        losses = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
        return Candidates(losses, self.shape, self.dense)

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


def site_of(target: Target, stats: Statistics) -> Site:
    """The second moments of a layer's inputs and output gradients, over all its uses.

    Raises `InputError` with the reason where there are none.
    """
    sites = [stats.get(name) or [Site(reason="not in the statistics")] for name in (target.inputs, target.outputs)]
    for site in (*sites[0], *sites[1]):
        if site.A is None or site.G is None:
            raise InputError(site.reason or "its second moments were not captured")
    used, gave = sites
    if any(site.transposed for site in (*used, *gave)):
        raise InputError("it is also used as a table, or transposed")
    seen = {(type(s.A), s.A.batch, s.A.dim, type(s.G), s.G.batch, s.G.dim) for s in used if s.A and s.G}
    if len(seen) > 1:
        raise InputError(f"used in {len(used)} ways that see it as different matrices")
    inputs, outputs = used[0].A, gave[0].G
    assert inputs is not None
    assert outputs is not None
    if len(used) > 1:  # copies: the statistics stay
        inputs, outputs = copy.deepcopy(inputs), copy.deepcopy(outputs)
        units = outputs.count.clone()
        for site in used[1:]:
            assert site.A is not None
            assert site.G is not None
            inputs.merge(site.A)
            outputs.merge(site.G)
        outputs.count.copy_(units)  # all uses of one unit
    return Site(A=inputs, G=outputs, name=target.name)


def decompose(target: Target, site: Site, *, share: float, blind: bool, differentiated: float = 1.0) -> WeightedSVD:
    """The weighted singular value decomposition of a layer.

    Args:
        target: the layer.
        site: its second moments.
        share: the independent rows among those that were added to A and G.
        blind: whether G is left out, since too few units were seen.
        differentiated: the share of the rows of A that G has too.

    Raises:
        InputError: the second moments are those of another model, or not finite.
    """
    assert site.A is not None
    assert site.G is not None
    w = matrix_of(target.module).double()
    centered = getattr(target.module, "bias", None) is not None
    out = site.G.dim * (site.G.batch[-1] if site.G.batch and target.block is None else 1)
    wide = w.shape[0] if not site.G.batch or target.block is None else target.block.shape[-2]
    for label, got, dim in (("A", site.A.dim, w.shape[1]), ("G", out, wide)):
        if got != dim:
            raise InputError(f"compress: {label} of {target.name!r} is for {got} features, not {dim}: another model's?")
    rows = share * float(torch.as_tensor(site.A.count).max())
    try:
        label = "A"
        mean = shrunk_mean(site.A, rows) if centered else None
        a = roots(site.A, rows, around=mean)
        label = "G"
        g = _output_roots(target.block, site.G, rows * differentiated)
    except InputError as error:
        raise InputError(f"compress: {label} of {target.inputs!r} {error}") from None
    if blind:
        one = torch.ones(len(w), dtype=w.dtype, device=w.device)
        g = Roots(one, one)
    weighted = g.left(a.right(w))
    # The factors are projections of W itself: with all ranks they are W, whatever the rounding of the roots.
    m, n = w.shape
    if m <= n:
        squares, u = torch.linalg.eigh(weighted @ weighted.mT)
        u = u.flip(1)
        left, right = g.solve_left(u), u.mT @ g.left(w)
    else:
        squares, v = torch.linalg.eigh(weighted.mT @ weighted)
        v = v.flip(1)
        left, right = a.right(w) @ v, a.solve_right(v.mT)
    values = squares.flip(0).clamp_min(0).sqrt()
    if target.rank:  # beyond it, a product of factors has no singular values but rounding
        values, left, right = values[: target.rank], left[:, : target.rank], right[: target.rank]
    # The singular values are shared out so that neither factor is badly scaled.
    scale = (right.norm(dim=1) / left.norm(dim=0)).sqrt()
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
    diagonal = tuple(
        side for side, moment in (("inputs", site.A), ("outputs", site.G)) if isinstance(moment, DiagonalGram)
    )
    matters = blind or bool(site.A.total.any() and site.G.total.any())
    feedback = feedback_of(a, g, rows)
    feedback = replace(feedback, outputs=feedback.outputs * matters)
    return WeightedSVD(
        target.name,
        values * matters,
        left * scale,
        right / scale[:, None],
        mean,
        target.dense,
        feedback,
        noises(w, feedback),
        a.right(right / scale[:, None]).square().sum(1),
        diagonal,
    )


def _output_roots(block: Block | None, g: Gram | DiagonalGram, rows: float) -> Roots:
    """The roots of G over the layer's outputs; of fused parts, which have a G each, along the diagonal."""
    found = roots(g, rows)
    if block is None or not g.batch:
        return found
    layout = layout_of(block.module)
    assert layout is not None
    outputs = torch.arange(layout.matrices[0], device=found.root.device)[:, None].expand(layout.matrices)
    order = block.split(layout.join(outputs))[..., 0].flatten()  # the output of each row of each part
    return Roots(
        *(_placed(parts, order, diagonal=isinstance(g, DiagonalGram)) for parts in (found.root, found.inverse))
    )


def _placed(parts: Tensor, order: Tensor, *, diagonal: bool) -> Tensor:
    if diagonal:
        return torch.empty_like(parts.flatten()).index_copy_(0, order, parts.flatten())
    whole = torch.empty(len(order), len(order), dtype=parts.dtype, device=parts.device)
    whole[order[:, None], order] = torch.block_diag(*parts.flatten(0, -3))
    return whole
