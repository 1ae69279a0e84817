"""Compares two checkpoints of one network: spectra of the differences, and angles of the leading subspaces."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.checkpoint import Checkpoint, open_checkpoint
from gramian.errors import CheckpointError
from gramian.inspection.matrices import Holding, find_holdings
from gramian.inspection.quadrature import leading_vectors
from gramian.inspection.quick import describe_quickly
from gramian.inspection.spectra import Spectrum, describe
from gramian.inspection.weights import report_row
from gramian.report import Action, Finding, Layer, Report
from gramian.report.model import plural

__all__ = ["compare_checkpoints", "matched", "subspace_angle"]

# The angle is between the subspaces of the first k singular vectors, k ≤ 8, with σₖ / σₖ₊₁ the largest such ratio: a
# subspace is well defined only before a gap in the spectrum. No angle is given where the ratio is below LEAST_GAP.
MOST_DIRECTIONS = 8
LEAST_GAP = 1.1

# A change counts as of low rank if this share of the full rank holds 99 % of the energy of every difference.
LOW_RANK = 0.25

# Singular values of a difference count if they exceed the norm of both matrices' rounding errors this many times.
ROUNDING_MARGIN = 2.0


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
    (above the rounding of the two dtypes), and the angle between the leading singular subspaces.

    Args:
        model, other: two checkpoints of one architecture, in any of the formats that `inspect` reads.
        quick, layouts: as in `inspect`.
        progress: called as `progress(what, done, total)`.
    Returns: the report.
    Raises:
        CheckpointError: one of them cannot be read, they share no names, or a shape differs.
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
    progress = progress or (lambda what, done, total: None)
    one, two = open_checkpoint(model), open_checkpoint(other)
    notes = matched(one, two)
    holdings, _ = find_holdings(one, layouts)
    holdings = [holding for holding in holdings if holding.entry.name in two.entries]
    layers: list[Layer] = []
    equal: list[str] = []
    square, base = 0.0, 0.0
    for done, holding in enumerate(holdings):
        progress("differences", done, len(holdings))
        for name, new, old in _pairs(one, two, holding):
            eps = max(torch.finfo(new.dtype).eps, torch.finfo(old.dtype).eps)
            wide = torch.float64 if torch.float64 in (new.dtype, old.dtype) else torch.float32
            new, old = new.to(wide), old.to(wide)
            size = float(torch.linalg.vector_norm(old, dtype=torch.float64))
            if torch.equal(new, old):
                equal.append(name)
                base += size * size
                continue
            spectrum = describe_quickly(new - old) if quick else describe(new - old)
            layer = report_row(name, holding.kind, holding.role, _ranked_by_rounding(spectrum, eps, size))
            change = spectrum.frobenius_norm
            angle, dim = subspace_angle(new, old) if change and size else (None, None)
            layers.append(
                replace(
                    layer,
                    depth=len(layers),
                    relative_change=change / size if change is not None and size else None,
                    subspace_angle=angle,
                    subspace_dim=dim,
                    # A change from training is far from independent entries: its tail says nothing.
                    tail_alpha=None, tail_interval=None, tail_size=None, tail_note="",
                    overflow_float16=None, underflow_float16=None, overflow_bfloat16=None,
                )
            )  # fmt: skip
            square, base = square + (change or 0.0) ** 2, base + size * size
    progress("differences", len(holdings), len(holdings))
    if equal:
        notes.append(f"Equal in both: {', '.join(equal[:5])}{' …' if len(equal) > 5 else ''} ({len(equal)})")
    facts: dict[str, float | int | str] = {
        "matrices that differ": len(layers),
        "matrices that are equal": len(equal),
        "relative change, all together": math.sqrt(square / base) if base else 0.0,
    }
    title = f"{_base(model)} − {_base(other)}"
    return Report(title, list(_findings(layers, len(equal))), layers, facts, notes=notes)


def matched(one: Checkpoint, two: Checkpoint) -> list[str]:
    """Return notes on what only one of two checkpoints holds. Raises `CheckpointError` where they do not match."""
    common = [name for name in one.entries if name in two.entries]
    if not common:
        raise CheckpointError(
            f"{one.path} and {two.path} share no tensor: {next(iter(one.entries))!r} against "
            f"{next(iter(two.entries))!r}. Give two checkpoints of one architecture."
        )
    wrong = [
        f"{name} is {one.entries[name].shape} and {two.entries[name].shape}"
        for name in common
        if one.entries[name].shape != two.entries[name].shape
    ]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{one.path} and {two.path} do not match: {wrong[0]}{more}. Give two checkpoints of one architecture."
        )
    notes = []
    for a, b in ((one, two), (two, one)):
        extra = [name for name in a.entries if name not in b.entries]
        if extra:
            notes.append(f"Only in {a.path}: {', '.join(extra[:5])}{' …' if len(extra) > 5 else ''} ({len(extra)})")
    return notes


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


def _pairs(one: Checkpoint, two: Checkpoint, holding: Holding) -> Iterator[tuple[str, Tensor, Tensor]]:
    new, old = one.load(holding.entry.name), two.load(holding.entry.name)
    if not old.is_floating_point():
        return
    yield from zip(holding.names, holding.split(new), holding.split(old), strict=True)


def _ranked_by_rounding(spectrum: Spectrum, eps: float, size: float) -> Spectrum:
    """Set the rank to the number of σ above both matrices' rounding: its norm is ½ ε (√m + √n) ‖W‖_F / √(mn)."""
    if spectrum.numerical_rank is None or not spectrum.singular_values:
        return spectrum
    m, n = spectrum.shape
    floor = ROUNDING_MARGIN * eps / 2 * (math.sqrt(m) + math.sqrt(n)) * size / math.sqrt(m * n)
    rank = sum(value > floor for value in spectrum.singular_values)
    return replace(spectrum, numerical_rank=min(rank, spectrum.numerical_rank), condition=None)


def _findings(layers: list[Layer], num_equal: int) -> Iterator[Finding]:
    broken = [layer for layer in layers if layer.frobenius_norm is None]
    if broken:
        yield Finding(
            "non-finite-difference",
            "error",
            f"{plural(len(broken), 'difference')} {'is' if len(broken) == 1 else 'are'} not finite",
            where=broken[0].name,
            evidence="NaN or infinity in one of the two (exact)",
            cause="Training diverged in one of them, or a file is damaged.",
            action=Action("inspect_file"),
            advice="Run it on each of the two.",
        )
    known = [layer for layer in layers if layer.rank_99 and layer.spectral_norm]
    if not layers:
        yield Finding("no-difference", "info", "The two are equal", evidence=f"{num_equal} matrices, bit for bit")
    elif known and len(known) == len(layers):
        ranks = [layer.rank_99[-1] for layer in known if layer.rank_99]
        worst = max(known, key=lambda layer: (layer.rank_99 or (0,))[-1])
        if all(r <= max(1, LOW_RANK * min(layer.shape)) for r, layer in zip(ranks, known, strict=True)):
            exact = [layer.numerical_rank for layer in known if layer.numerical_rank is not None]
            rank = f"; numerical rank at most {max(exact)}" if exact else ""
            yield Finding(
                "low-rank-update",
                "info",
                f"The difference is a rank-{max(ranks)} update",
                where=f"{len(known)} matrices differ, {num_equal} do not",
                evidence=f"rank {max(ranks)} holds 99 % of the energy of every difference (most: {worst.name}){rank}",
                cause="An adapter was merged, or training moved the weights in few directions.",
                action=Action("extract_lora", {"rank": max(ranks)}),
                source="Hu et al. 2106.09685",
            )


def _base(path: str | os.PathLike[str]) -> str:
    return os.path.basename(os.path.abspath(path))
