"""Compares two checkpoints of one network: spectra of the differences, and angles of the leading subspaces."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.checkpoint import open_checkpoint
from gramian.checkpoint.formats import dtype_name
from gramian.errors import CheckpointError, some
from gramian.inspection.comparing.changes import Change, change_between, rounding_floor
from gramian.inspection.comparing.compared import Compared, find_differences
from gramian.inspection.comparing.matching import Pairs
from gramian.inspection.experiments.intended_zeros import PRODUCT
from gramian.inspection.weights.matrices import Holding
from gramian.inspection.weights.matrix_rows import report_row
from gramian.inspection.weights.quadrature import leading_vectors
from gramian.inspection.weights.quick import describe_quickly
from gramian.inspection.weights.spectra import Spectrum, describe
from gramian.report import Layer, Report

__all__ = ["compare_checkpoints", "subspace_angle"]

# The angle is between the subspaces of the first k singular vectors, k ≤ 8, with σₖ / σₖ₊₁ the largest such ratio: a
# subspace is well defined only before a gap in the spectrum. No angle is given where the ratio is below LEAST_GAP.
MOST_DIRECTIONS = 8
LEAST_GAP = 1.1

# Two tensors whose common rows differ by more than these have no rows in common: new heads of another size, with ‖Δ‖ of
# about √2 ‖W‖, not a vocabulary with new tokens.
UNRELATED = 1.0

# How far a weight that is computed in float32 from its parts may be from its value, beside the rounding of the result.
COMPUTED = 16 * 2.0**-23


def compare_checkpoints(
    model: str | os.PathLike[str],
    other: str | os.PathLike[str],
    *,
    quick: bool = False,
    layouts: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Return the spectra of `model − other`, matrix by matrix, as a report whose layers are the differences.

    Each layer has the relative change, the ranks that hold 90 and 99 % of the difference's energy, the numerical rank
    (above the rounding of the two dtypes), and the angle between the leading singular subspaces. Every other tensor is
    compared bit by bit: a row says by how much it changed, or that only one of the two has it. Names that differ by a
    prefix are matched, and a tensor with more rows in one is compared on those that both have.

    Args:
        model, other: two checkpoints of one architecture, in any of the formats that `inspect` reads.
        quick, layouts: as in `inspect`.
        progress: called as `progress(what, done, total)`.
    Returns: the report.
    Raises:
        CheckpointError: one of them cannot be read, or they share no names or no shapes.
    Cost: that of `inspect` for one checkpoint, and a few products for the subspaces. Memory: two tensors.
    Source: the angle: Björck & Golub, Math. Comp. 27 (1973).

    >>> import tempfile
    >>> from gramian.checkpoint import save_tensors
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name, w in (("base", torch.eye(4)), ("tuned", torch.eye(4) + 1)):
    ...         save_tensors(f"{folder}/{name}.safetensors", {"layer.weight": w})
    ...     report = compare_checkpoints(f"{folder}/tuned.safetensors", f"{folder}/base.safetensors")
    >>> report.findings[0].title
    'The difference is a rank-1 update'
    """
    tell = progress or (lambda what, done, total: None)
    pairs = Pairs(open_checkpoint(model), open_checkpoint(other), layouts)
    compared = Compared(pairs)
    for done, name in enumerate(pairs.order):
        tell("differences", done, len(pairs.order))
        _compare(pairs, name, compared, quick)
    tell("differences", len(pairs.order), len(pairs.order))
    if len(compared.shapes) == len(pairs.order):
        raise CheckpointError(
            f"{model} and {other}: every tensor that both have is of another shape: {some(compared.shapes)}. "
            "Give two checkpoints of one architecture and size."
        )
    compared.add_unmatched()
    layers = [replace(layer, depth=depth) for depth, layer in enumerate((*compared.matrices, *compared.others))]
    title = f"{_base(model)} − {_base(other)}"
    return Report(
        title, list(find_differences(compared)), layers, compared.facts(), notes=compared.notes(),
        looked_at=["tensors that both have"], not_looked_at=compared.not_looked_at(),
    )  # fmt: skip


def subspace_angle(a: Float[Tensor, "m n"], b: Float[Tensor, "m n"]) -> tuple[float | None, int | None]:
    """Return the largest angle in degrees between the leading right singular subspaces, and their dimension.

    `(None, None)` where b's first singular values have no gap.

    Source: Björck & Golub, Math. Comp. 27 (1973); the gap's role is Wedin, BIT 12 (1972).

    >>> a = torch.diag(torch.tensor([9.0, 1.0, 0.5]))
    >>> subspace_angle(a, a[:, [1, 0, 2]])
    (90.0, 1)
    """
    most = min(MOST_DIRECTIONS, min(a.shape) - 1)
    if most < 1 or not bool(a.isfinite().all()) or not bool(b.isfinite().all()):
        return None, None
    old, values = leading_vectors(b, most + 1)
    gaps = values[:-1] / values[1:].clamp_min(1e-300)
    dim = int(gaps.argmax()) + 1
    if float(gaps[dim - 1]) < LEAST_GAP:
        return None, None
    new, _ = leading_vectors(a, dim)
    cosine = float(torch.linalg.svdvals(new.mT @ old[:, :dim]).min().clamp(0.0, 1.0))
    return math.degrees(math.acos(cosine)), dim


def _compare(pairs: Pairs, name: str, compared: Compared, quick: bool) -> None:
    """Compare two tensors, and add what was found."""
    new, old = pairs.load(name)
    note = "; ".join(pairs.made(name))
    if new.shape != old.shape and not pairs.turned(name):
        note = f"{tuple(new.shape)} and {tuple(old.shape)}"
        common = pairs.common_rows(name, new, old)
        if common is not None and (change_between(*common).relative or 0.0) >= UNRELATED:
            note, common = f"{note}, whose first rows have nothing in common", None
        if common is None:
            compared.shapes.append(f"{name} {note}")
            row = Layer(name, "shape", tuple(new.shape), 0, dtype_name(new), note=f"not compared: {note}")
            compared.others.append(row)
            for tensor in (new, old):
                compared.search(name, tensor)
            return
        compared.add_rows(name, new, old)
        new, old = common
        note = f"the first {len(new)} rows, of {note}"
    pieces = list(pairs.pieces(name, new, old))
    whole = change_between(new, old) if new.shape == old.shape else None  # else only its matrices have equal shapes
    if whole is not None and whole.num_broken:
        compared.broken.append((name, whole.num_broken))
    if whole is not None and whole.kind == "changed" and _is_rounding(pairs, name, new, old, whole):
        compared.base += whole.size**2
        compared.same.add(name)
        compared.rounded.append(name)
        return
    if whole is not None and whole.kind != "changed":
        compared.base += whole.size**2
        compared.same.add(name)
        compared.num_equal += whole.kind == "equal"
        if whole.kind == "cast":
            compared.casts.setdefault(whole.cast, []).append(name)
        else:
            compared.equal_matrices += [label for label, _, _ in pieces]
        return
    if whole is not None and pairs.whole_of(name):  # whose own row says what this changes
        if pairs.whole_of(name) in compared.same:
            compared.parts.append(name)
        return
    if whole is not None and not pieces:
        entry, other = pairs.one.entries[name], pairs.two.entries[pairs.names[name]]
        kind = "vector" if entry.kind == "float" and new.ndim < 2 else f"{entry.kind} tensor"
        relative = whole.relative
        if entry.kind != other.kind and "quantized" in (entry.kind, other.kind):  # no values without scales
            relative, note = None, f"{dtype_name(new)} against {dtype_name(old)}, no scales"
        row = Layer(name, kind, tuple(new.shape), 0, dtype_name(new), new.numel(), relative_change=relative, note=note)
        compared.others.append(row)
        if relative or not whole.num_broken:
            compared.changed.append(row)
        if entry.kind == "float":
            compared.square += (relative or 0.0) ** 2 * whole.size**2
            compared.base += whole.size**2
        return
    if whole is None:
        compared.turned.append(name)
    for label, a, b in pieces:
        change = change_between(a, b)
        if whole is None and change.num_broken:
            compared.broken.append((label, change.num_broken))
        holding = pairs.new.get(name) or pairs.old[pairs.names[name]]
        _add_matrix(holding, label, a, b, change, note, compared, quick)


def _is_rounding(pairs: Pairs, name: str, new: Tensor, old: Tensor, change: Change) -> bool:
    """Whether one of the two is computed from parts, and they differ by no more than the rounding of that."""
    made = [pairs.one.entries[name].made, pairs.two.entries[pairs.names[name]].made]
    if not any(made) or not (new.is_floating_point() and old.is_floating_point()) or change.num_broken:
        return False
    eps = max(torch.finfo(new.dtype).eps, torch.finfo(old.dtype).eps)
    return change.relative is not None and change.relative <= eps + COMPUTED


def _add_matrix(
    holding: Holding, name: str, new: Tensor, old: Tensor, change: Change, note: str, compared: Compared, quick: bool
) -> None:
    """Add the spectrum of the difference of two matrices."""
    compared.base += change.size**2
    if change.kind == "equal":
        compared.equal_matrices.append(name)
        return
    eps = max(torch.finfo(new.dtype).eps, torch.finfo(old.dtype).eps)
    wide = torch.float64 if torch.float64 in (new.dtype, old.dtype) else torch.float32
    new, old = new.to(wide), old.to(wide)
    spectrum = describe_quickly(new - old) if quick else describe(new - old)
    made = holding.entry.made
    kind = PRODUCT if made and made.low_rank else holding.kind
    layer = report_row(name, kind, holding.role, _ranked_by_rounding(spectrum, eps, change.size))
    size = spectrum.frobenius_norm
    angle, dim = subspace_angle(new, old) if size and change.size else (None, None)
    compared.matrices.append(
        replace(
            layer,
            relative_change=change.relative,
            subspace_angle=angle,
            subspace_dim=dim,
            note="; ".join(part for part in (note, layer.note) if part),
            # A change from training is far from independent entries: its tail says nothing.
            tail_alpha=None, tail_interval=None, tail_size=None, tail_note="",
            overflow_float16=None, underflow_float16=None, overflow_bfloat16=None,
        )
    )  # fmt: skip
    compared.square += (size or 0.0) ** 2


def _ranked_by_rounding(spectrum: Spectrum, eps: float, size: float) -> Spectrum:
    """Set the rank to the number of σ above both matrices' rounding."""
    if spectrum.numerical_rank is None or not spectrum.singular_values:
        return spectrum
    floor = rounding_floor(spectrum.shape, eps, size)
    rank = sum(value > floor for value in spectrum.singular_values)
    return replace(spectrum, numerical_rank=min(rank, spectrum.numerical_rank), condition=None)


def _base(path: str | os.PathLike[str]) -> str:
    return os.path.basename(os.path.abspath(path))
