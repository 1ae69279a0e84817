"""Two checkpoints of one network: the spectrum of every difference, and how far the leading directions turned."""

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
from gramian.inspection.weights import layer_of
from gramian.report import Finding, Layer, Report

__all__ = ["compare_checkpoints", "matched", "subspace_angle"]

# Leading directions that are compared: the number in 1 … 8 behind which the spectrum has its largest gap, since a
# subspace that no gap sets apart is not defined. Below this gap the angle abstains.
MOST_DIRECTIONS = 8
LEAST_GAP = 1.1

# A fine-tune is called of low rank where 99 % of every difference's energy is in this share of the full rank.
LOW_RANK = 0.25

# Singular values of a difference count where they pass so many times what rounding both matrices makes of it.
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

    Each layer tells the relative change, the ranks that hold 90 and 99 % of the difference's energy, the numerical rank
    (what stands out of the rounding of the two dtypes), and the angle between the leading singular subspaces.

    Args:
        model, other: two checkpoints of one architecture, in any of the formats that `inspect` reads.
        quick: as in `inspect`.
        layouts: as in `inspect`.
        progress: called as `progress(what, done, total)`.

    Raises:
        CheckpointError: one of them cannot be read, they share no names, or a shape differs.

    Cost: as `inspect`, once, and a few products for the subspaces. Memory: two tensors.
    """
    tell = progress or (lambda what, done, total: None)
    one, two = open_checkpoint(model), open_checkpoint(other)
    notes = matched(one, two)
    holdings, _ = find_holdings(one, layouts)
    holdings = [holding for holding in holdings if holding.entry.name in two.entries]
    layers: list[Layer] = []
    equal: list[str] = []
    square, base = 0.0, 0.0
    for done, holding in enumerate(holdings):
        tell("differences", done, len(holdings))
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
            layer = layer_of(name, holding.kind, holding.role, _ranked_by_rounding(spectrum, eps, size))
            change = spectrum.frobenius_norm
            angle, dim = subspace_angle(new, old) if change and size else (None, None)
            layers.append(
                replace(
                    layer,
                    depth=len(layers),
                    relative_change=change / size if change is not None and size else None,
                    subspace_angle=angle,
                    subspace_dim=dim,
                    # a difference of training is not independent entries, and has no tail to speak of
                    tail_alpha=None, tail_interval=None, tail_size=None, tail_note="",
                    overflow_float16=None, underflow_float16=None, overflow_bfloat16=None,
                )
            )  # fmt: skip
            square, base = square + (change or 0.0) ** 2, base + size * size
    tell("differences", len(holdings), len(holdings))
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

    `(None, None)` where no gap in b's first singular values sets a subspace apart.

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
    """Count as rank what stands out of rounding both matrices: entries ½ ε |w|, of norm ½ ε (√m + √n) ‖W‖_F / √(mn)."""
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
            f"{len(broken)} {'difference is' if len(broken) == 1 else 'differences are'} not finite",
            where=broken[0].name,
            evidence="NaN or infinity in one of the two (exact)",
            cause="Training diverged in one of them, or a file is damaged.",
            remedy="gramian inspect each of the two",
        )
    known = [layer for layer in layers if layer.rank_99 and layer.spectral_norm]
    if not layers:
        yield Finding("no-difference", "info", "The two are equal", evidence=f"{num_equal} matrices, bit for bit")
    elif known and len(known) == len(layers):
        ranks = [layer.rank_99[-1] for layer in known if layer.rank_99]
        worst = max(known, key=lambda layer: (layer.rank_99 or (0,))[-1])
        if all(r <= max(1, LOW_RANK * min(layer.shape)) for r, layer in zip(ranks, known, strict=True)):
            exact = [layer.numerical_rank for layer in known if layer.numerical_rank is not None]
            said = f"; numerical rank at most {max(exact)}" if exact else ""
            yield Finding(
                "low-rank-update",
                "info",
                f"The difference is a rank-{max(ranks)} update",
                where=f"{len(known)} matrices differ, {num_equal} do not",
                evidence=f"rank {max(ranks)} holds 99 % of the energy of every difference (most: {worst.name}){said}",
                cause="An adapter was merged, or training moved the weights in few directions.",
                remedy=f"gramian inspect MODEL --against OTHER --extract-lora {max(ranks)}",
                source="Hu et al. 2106.09685",
            )


def _base(path: str | os.PathLike[str]) -> str:
    return os.path.basename(os.path.abspath(path))
