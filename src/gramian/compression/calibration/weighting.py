"""Weighting: the roots of a layer's two second moments, over all uses of its matrix.

Inputs run along the columns of a matrix and outputs along its rows; where it is used as a table, the other way around:
a lookup is a product with a one-hot row, whose second moment is the diagonal of how often each row was looked up.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gramian.compression.calibration.calibrating import Calibration
from gramian.compression.calibration.kronecker import joined
from gramian.compression.calibration.parts import output_roots, parts_of, parts_of_roots
from gramian.compression.calibration.shrinkage import Roots, pooled, roots, shrunk_mean
from gramian.compression.calibration.targets import Target
from gramian.compression.layers.lowrank import matrix_of
from gramian.errors import InputError
from gramian.gram import DiagonalGram, Gram
from gramian.site import Site
from gramian.statistics import Statistics

__all__ = ["Uncaptured", "Weighting", "counted", "weighting"]


class Uncaptured(InputError):
    """A layer whose second moments are not known."""


class Weighting(NamedTuple):
    """What an error of a matrix (m, n) costs: the roots of a second moment for each side.

    Attributes:
        columns: of the side of length n, the inputs of a layer.
        rows: of the side of length m, its outputs.
        mean: of the inputs, where the layer's bias can take it up.
        matters: whether anything went in, and came back.
        diagonal: the sides ("inputs", "outputs") that are weighted by a diagonal alone.
        unseen: rows of a table that were never looked up.
        seen: the independent rows that `columns` was estimated from; of several uses the most.
    """

    columns: Roots
    rows: Roots
    mean: Tensor | None
    matters: bool
    diagonal: tuple[str, ...] = ()
    unseen: int = 0
    seen: float = math.inf


def weighting(target: Target, calibration: Calibration, *, blind: bool) -> Weighting:
    """The weighting of a layer.

    Args:
        target: the layer.
        calibration: with the statistics of the model.
        blind: whether G is left out, since too few units were seen.

    Returns:
        Of several uses along the same sides the sum; of a table that is also a head, and of parts with inputs of their
        own, as in attention to another sequence, the nearest Kronecker product.

    Raises:
        Uncaptured: there are no second moments; its text is the reason.
        InputError: they are those of another model, or not finite.

    Cost: two eigendecompositions for each use; layers that share their inputs, one after the other, share that of A.
    Source: for several uses, see `joined`.
    """
    sites, share = _sites(target, calibration.stats), calibration.distinct
    uses = [_merged(target, group) for group in _by_sides(sites)]
    latest = calibration.latest
    shares = share, share * calibration.differentiated
    found = [one for site in uses for one in _of_use(target, site, shares, blind, latest)]
    return found[0] if len(found) == 1 else _joint(found)


def _sites(target: Target, stats: Statistics) -> list[Site]:
    """The uses, of a factored layer with the inputs of one factor and the output gradients of the other."""
    pair = [stats.get(name) or [Site(reason="not in the statistics")] for name in (target.inputs, target.outputs)]
    apart = target.rank and target.block is None  # each factor has statistics of its own
    for site in (*pair[0], *pair[1]):
        if site.A is None or site.G is None:
            instead = "; give batches in place of statistics, and its product is looked at" if apart else ""
            raise Uncaptured((site.reason or "its second moments were not captured") + instead)
    used, gave = pair
    if apart and any(site.transposed for site in (*used, *gave)) and not target.table:
        raise Uncaptured("a factor of it is also used as a table, or transposed")
    if apart and target.table and (len(used) > 1 or len(gave) > 1 or not used[0].transposed):
        raise Uncaptured("its factors are used in other ways than to look up rows")
    if target.entry is not None:
        return [_of_expert(site, target.entry) for site in used]
    return [Site(A=a.A, G=g.G, transposed=a.transposed) for a, g in zip(used, gave, strict=False)]


def _of_expert(site: Site, entry: int) -> Site:
    """The second moments of one matrix of a stack, shrunk towards those of all where few rows reached it."""
    inputs, outputs = site.A, site.G
    assert inputs is not None
    assert outputs is not None
    if site.transposed or not inputs.batch or not outputs.batch:
        raise Uncaptured("its use does not tell its matrices apart")
    rows = inputs.count.reshape(len(inputs.count), -1)[:, 0]
    if not bool(rows[entry] > 0):
        raise Uncaptured("no row of the calibration reached it")
    return Site(A=pooled(inputs, entry, rows), G=pooled(outputs, entry, rows), op=site.op)


def _by_sides(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites along the same sides together."""
    groups = [[site for site in sites if site.transposed == way] for way in (False, True)]
    return [group for group in groups if group]


def _merged(target: Target, sites: Sequence[Site]) -> Site:
    """Uses of one matrix along the same sides: their second moments are summed."""
    seen = {(type(s.A), s.A.batch, s.A.dim, type(s.G), s.G.batch, s.G.dim) for s in sites if s.A and s.G}
    if len(seen) > 1:
        raise Uncaptured(f"used in {len(sites)} ways that see it as different matrices")
    inputs, outputs = sites[0].A, sites[0].G
    assert inputs is not None
    assert outputs is not None
    if len(sites) > 1:  # copies: the statistics stay
        inputs, outputs = copy.deepcopy(inputs), copy.deepcopy(outputs)
        units = outputs.count.clone()
        for site in sites[1:]:
            assert site.A is not None
            assert site.G is not None
            inputs.merge(site.A)
            outputs.merge(site.G)
        outputs.count.copy_(units)  # all uses of one unit
    return Site(A=inputs, G=outputs, name=target.name, transposed=sites[0].transposed)


def _of_use(
    target: Target, site: Site, shares: tuple[float, float], blind: bool, latest: dict[Any, Any]
) -> list[Weighting]:
    """The weighting of one use; where its parts have inputs of their own, one for each part, with no other's rows."""
    inputs, outputs = site.A, site.G
    assert inputs is not None
    assert outputs is not None
    m, n = matrix_of(target.module).shape
    fused = target.entry is None and not site.transposed and len(inputs.batch) == 1 and inputs.batch == outputs.batch
    if inputs.batch and not fused:
        raise Uncaptured("its parts have inputs of their own")
    if site.transposed:
        wanted = (("A", inputs.dim, m), ("G", outputs.dim, n))
    else:
        out = outputs.dim * (outputs.batch[-1] if outputs.batch and target.block is None else 1)
        wide = m if not outputs.batch or target.block is None else target.block.shape[-2]
        wanted = (("A", inputs.dim, n), ("G", out, wide))
    for label, got, dim in wanted:
        if got != dim:
            raise InputError(f"compress: {label} of {target.name!r} is for {got} features, not {dim}: another model's?")
    num = float(torch.as_tensor(inputs.count).max())
    rows, rows_g = (share * num for share in shares)
    matters = blind or bool(inputs.total.any() and outputs.total.any())
    label = "A"
    try:
        if site.transposed:
            into, unseen = counted(inputs) if isinstance(inputs, DiagonalGram) else (roots(inputs, rows), 0)
            label = "G"
            back = _one(n, into) if blind else roots(outputs, rows_g)
            diagonal = ("outputs",) if isinstance(outputs, DiagonalGram) else ()
            return [Weighting(back, into, None, matters, diagonal, unseen, math.inf if blind else rows_g)]
        centered = getattr(target.module, "bias", None) is not None and not target.tied and not inputs.batch
        mean = shrunk_mean(inputs, rows) if centered else None
        into = [_once(latest, one, rows, mean) for one in parts_of(inputs)]
        label = "G"
        back = output_roots(target.block, outputs, rows_g, target.module, target.entry)
    except InputError as error:
        raise InputError(f"compress: {label} of {target.inputs!r} {error}") from None
    sides = (("inputs", inputs), ("outputs", outputs))
    diagonal = tuple(side for side, moment in sides if isinstance(moment, DiagonalGram))
    own = parts_of_roots(_one(m, into[0]) if blind else back, target.block, target.module, len(into))
    return [Weighting(a, g, mean, matters, diagonal, seen=rows) for a, g in zip(into, own, strict=True)]


def _once(latest: dict[Any, Any], inputs: Gram | DiagonalGram, rows: float, around: Tensor | None) -> Roots:
    """The roots of inputs; those of the layer before where it had the same inputs, as queries, keys and values have."""
    known = latest.get("inputs")
    if known is not None:
        before, same_rows, same_mean, found = known
        pairs = zip(before.tensors(), inputs.tensors(), strict=True)
        alike = type(before) is type(inputs) and rows == same_rows and (around is None) == (same_mean is None)
        if alike and all(one.shape == other.shape and torch.equal(one, other) for one, other in pairs):
            return found
    latest.clear()  # two of them need not be in memory
    found = roots(inputs, rows, around=around)
    latest["inputs"] = inputs, rows, around, found
    return found


def _one(dim: int, like: Roots) -> Roots:
    one = torch.ones(dim, dtype=torch.float64, device=like.root.device)
    return Roots(one, one)


def counted(moment: DiagonalGram) -> tuple[Roots, int]:
    """The roots of a second moment of one-hot rows, with a share for what was not seen.

    The rows of a table that were looked up once tell how often a new one will be (Good & Turing). Each row gets so many
    counts more that those that were never seen have that share together, at most one. Where none was looked up only
    once, those that were not seen are no rare ones but out of the calibration's reach, as the positions of longer texts
    are: each counts like the least of the others.

    Args:
        moment: the share of lookups of each row.

    Returns:
        The roots, and the number of rows never looked up.

    Raises:
        InputError: it is not finite.

    Cost: none to speak of.
    Source: Good (Biometrika 40, 1953, eq. 9).

    >>> counts = torch.tensor([4.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    >>> found, unseen = counted(DiagonalGram(4).add(counts, counts, 6))
    >>> unseen, (6 * found.root.square()).round(decimals=2).tolist()
    (1, [3.0, 1.2, 1.2, 0.6])
    """
    shares = moment.diagonal
    if not bool(shares.isfinite().all()):
        raise InputError("is not finite; gm.inspect finds where NaN begins")
    num = float(torch.as_tensor(moment.count).max())
    counts, seen = shares * num, shares > 0
    unseen = int((~seen).sum())
    if not bool(seen.any()):
        return _one(len(shares), Roots(shares, shares)), unseen
    if unseen:
        once = int((counts[seen] < 1.5).sum())
        counts = counts + min(1.0, once / unseen) if once else torch.where(seen, counts, counts[seen].min())
    values = counts * (shares.sum() / counts.sum())
    return Roots(values.sqrt(), values.rsqrt()), unseen


def _joint(found: Sequence[Weighting]) -> Weighting:
    rows, columns = joined([w.rows for w in found], [w.columns for w in found])
    sides = tuple(dict.fromkeys(side for w in found for side in w.diagonal))
    return Weighting(
        columns,
        rows,
        None,
        any(w.matters for w in found),
        sides,
        max(w.unseen for w in found),
        max(w.seen for w in found),
    )
