"""Compares two checkpoints of one network: spectra of the differences, and angles of the leading subspaces."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.checkpoint import open_checkpoint
from gramian.checkpoint.formats import dtype_name
from gramian.inspection.changes import change_between, rounding_floor
from gramian.inspection.matching import Pairs, some
from gramian.inspection.matrices import Holding
from gramian.inspection.quadrature import leading_vectors
from gramian.inspection.quick import describe_quickly
from gramian.inspection.spectra import Spectrum, describe
from gramian.inspection.weights import report_row
from gramian.report import Action, Finding, Layer, Report
from gramian.report.model import plural

__all__ = ["compare_checkpoints", "subspace_angle"]

# The angle is between the subspaces of the first k singular vectors, k ≤ 8, with σₖ / σₖ₊₁ the largest such ratio: a
# subspace is well defined only before a gap in the spectrum. No angle is given where the ratio is below LEAST_GAP.
MOST_DIRECTIONS = 8
LEAST_GAP = 1.1

# A change counts as of low rank if this share of the full rank holds 99 % of the energy of every difference.
LOW_RANK = 0.25

# Facts that are told even where they are zero.
ALWAYS = ("tensors compared bit by bit", "tensors that are equal", "matrices that differ")


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
    tell = progress or (lambda what, done, total: None)
    pairs = Pairs(open_checkpoint(model), open_checkpoint(other), layouts)
    compared = _Compared(pairs)
    for done, name in enumerate(pairs.order):
        tell("differences", done, len(pairs.order))
        _compare(pairs, name, compared, quick)
    tell("differences", len(pairs.order), len(pairs.order))
    compared.add_unmatched()
    layers = [replace(layer, depth=depth) for depth, layer in enumerate((*compared.matrices, *compared.others))]
    title = f"{_base(model)} − {_base(other)}"
    return Report(title, list(_findings(compared)), layers, compared.facts(), notes=compared.notes())


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


@dataclass
class _Compared:
    """What was found of the tensors so far."""

    pairs: Pairs
    matrices: list[Layer] = field(default_factory=list)  # that differ
    others: list[Layer] = field(
        default_factory=list
    )  # rows of the tensors that differ and hold no matrix, and the like
    changed: list[Layer] = field(default_factory=list)  # those of the others that differ
    equal_matrices: list[str] = field(default_factory=list)
    num_equal: int = 0  # tensors
    casts: dict[str, list[str]] = field(default_factory=dict)  # names, by what was cast to what
    broken: list[tuple[str, int]] = field(default_factory=list)  # and the number of entries, NaN or infinite in one
    cut: list[str] = field(default_factory=list)  # compared on the rows that both have
    shapes: list[str] = field(default_factory=list)  # not compared
    square: float = 0.0
    base: float = 0.0

    def add_unmatched(self) -> None:
        """Add a row for each tensor that only one of the two has."""
        pairs = self.pairs
        for checkpoint, names in ((pairs.one, pairs.only_one), (pairs.two, pairs.only_two)):
            for name in names:
                entry = checkpoint.entries[name]
                self.others.append(
                    Layer(name, "unmatched", entry.shape, 0, entry.dtype, note=f"only in {checkpoint.path}")
                )

    def facts(self) -> dict[str, float | int | str]:
        """The numbers of all tensors together."""
        pairs = self.pairs
        facts: dict[str, float | int | str] = {
            "tensors compared bit by bit": len(pairs.order) - len(self.shapes),
            "tensors that are equal": self.num_equal,
            "matrices that differ": len(self.matrices),
            "matrices that are equal": len(self.equal_matrices),
            "other tensors that differ": len(self.changed),
            "tensors that only one has": len(pairs.only_one) + len(pairs.only_two),
            "relative change, all together": math.sqrt(self.square / self.base) if self.base else 0.0,
        }
        return {label: value for label, value in facts.items() if value or label in ALWAYS}

    def notes(self) -> list[str]:
        """What was not compared, or not as a matrix, and how names were matched."""
        pairs = self.pairs
        notes = list(pairs.notes)
        for what, names in (
            ("Equal in both", self.equal_matrices),
            *((f"Equal up to the cast {cast}", names) for cast, names in self.casts.items()),
            ("Changed, but not analyzed as matrices", [layer.name for layer in self.changed]),
            ("Of another shape, compared on the rows that both have", self.cut),
            ("Of another shape, not compared", self.shapes),
            (f"Only in {pairs.one.path}", pairs.only_one),
            (f"Only in {pairs.two.path}", pairs.only_two),
        ):
            notes += [f"{what}: {some(names)}"] if names else []
        for checkpoint in (pairs.one, pairs.two):
            notes += [f"{checkpoint.path}: {note}" for note in checkpoint.notes]
        return notes


def _compare(pairs: Pairs, name: str, compared: _Compared, quick: bool) -> None:
    """Compare two tensors, and add what was found."""
    new, old = pairs.load(name)
    note = ""
    if new.shape != old.shape and not pairs.turned(name):
        note = f"{tuple(new.shape)} and {tuple(old.shape)}"
        common = pairs.common_rows(name, new, old)
        if common is None:
            compared.shapes.append(f"{name} {note}")
            row = Layer(name, "shape", tuple(new.shape), 0, dtype_name(new), note=f"not compared: {note}")
            compared.others.append(row)
            return
        new, old = common
        note = f"the first {len(new)} rows, of {note}"
        compared.cut.append(f"{name} {note}")
    pieces = list(pairs.pieces(name, new, old))
    whole = change_between(new, old) if new.shape == old.shape else None  # else its pieces are turned alike
    if whole is not None and whole.num_broken:
        compared.broken.append((name, whole.num_broken))
    if whole is not None and whole.kind != "changed":
        compared.base += whole.size**2
        compared.num_equal += whole.kind == "equal"
        if whole.kind == "cast":
            compared.casts.setdefault(whole.cast, []).append(name)
        else:
            compared.equal_matrices += [label for label, _, _ in pieces]
        return
    if whole is not None and not pieces:
        entry = pairs.one.entries[name]
        kind = "vector" if entry.kind == "float" and new.ndim < 2 else f"{entry.kind} tensor"
        row = Layer(
            name, kind, tuple(new.shape), 0, dtype_name(new), new.numel(), relative_change=whole.relative, note=note
        )
        compared.others.append(row)
        if whole.relative or not whole.num_broken:
            compared.changed.append(row)
        if entry.kind == "float":
            compared.square += (whole.relative or 0.0) ** 2 * whole.size**2
            compared.base += whole.size**2
        return
    for label, a, b in pieces:
        _compare_matrices(pairs.new.get(name) or pairs.old[pairs.names[name]], label, a, b, note, compared, quick)


def _compare_matrices(
    holding: Holding, name: str, new: Tensor, old: Tensor, note: str, compared: _Compared, quick: bool
) -> None:
    change = change_between(new, old)
    compared.base += change.size**2
    if change.kind == "equal":
        compared.equal_matrices.append(name)
        return
    eps = max(torch.finfo(new.dtype).eps, torch.finfo(old.dtype).eps)
    wide = torch.float64 if torch.float64 in (new.dtype, old.dtype) else torch.float32
    new, old = new.to(wide), old.to(wide)
    spectrum = describe_quickly(new - old) if quick else describe(new - old)
    layer = report_row(name, holding.kind, holding.role, _ranked_by_rounding(spectrum, eps, change.size))
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


def _findings(compared: _Compared) -> Iterator[Finding]:
    yield from _of_nonfinite(compared)
    yield from _of_equality(compared)
    yield from _of_low_rank(compared)
    if compared.changed:
        known = sorted(compared.changed, key=lambda layer: -(layer.relative_change or 0.0))
        largest = [f"{layer.name} {layer.relative_change:.2g}" for layer in known[:3] if layer.relative_change]
        yield Finding(
            "changed-vectors",
            "info",
            f"{plural(len(known), 'tensor')} that {'is' if len(known) == 1 else 'are'} no matrix changed",
            where=known[0].name,
            evidence=f"relative change ‖Δ‖ / ‖w‖: {', '.join(largest)}" if largest else "of bits, or from zero",
            cause="Norms, biases or buffers were trained too; the factors of an adapter do not hold them.",
        )


def _of_nonfinite(compared: _Compared) -> Iterator[Finding]:
    """Tensors with NaN or infinity in one of the two, or differences that are not finite since both have them."""
    broken = dict(compared.broken)
    num_entries = sum(broken.values())
    title, evidence = "{} not finite in one of the two", f"{num_entries} entries that the other has not (exact)"
    if not broken:
        broken = {layer.name: 0 for layer in compared.matrices if layer.frobenius_norm is None}
        title, evidence = "{} not finite, and not the same", "NaN or infinity in both (exact)"
    if broken:
        names = list(broken)
        yield Finding(
            "non-finite-difference",
            "error",
            title.format(f"{plural(len(names), 'tensor')} {'is' if len(names) == 1 else 'are'}"),
            where=", ".join(names[:10]) + (" …" if len(names) > 10 else ""),
            evidence=evidence,
            cause="Training diverged in one of them, or a file is damaged.",
            action=Action("inspect_file"),
            advice="Run it on each of the two.",
        )


def _of_equality(compared: _Compared) -> Iterator[Finding]:
    """That the two are equal, as far as they are."""
    pairs = compared.pairs
    if compared.matrices or compared.changed or compared.broken or compared.num_equal + len(compared.casts) == 0:
        return
    evidence = f"{plural(compared.num_equal, 'tensor')}, bit for bit"
    for cast, names in compared.casts.items():
        title = f"Equal up to the cast {cast}"
        yield Finding("equal-after-cast", "info", title, evidence=f"{plural(len(names), 'tensor')}; {evidence}")
    unmatched = len(pairs.only_one) + len(pairs.only_two)
    unread = [note for checkpoint in (pairs.one, pairs.two) for note in checkpoint.notes if "left out" in note]
    if unmatched or compared.shapes or compared.cut or unread or pairs.notes:
        yield Finding(
            "equal-in-common",
            "info",
            "The tensors that were compared are equal",
            evidence="; ".join(
                [evidence, *([f"{unmatched} that only one has"] if unmatched else [])]
                + (
                    [f"{len(compared.shapes) + len(compared.cut)} of another shape"]
                    * bool(compared.shapes or compared.cut)
                )
                + (["names differ by a prefix"] if pairs.notes else [])
                + (["a file holds more than was read"] if unread else [])
            ),
        )
    elif not compared.casts:
        yield Finding("no-difference", "info", "The two are equal", evidence=evidence)


def _of_low_rank(compared: _Compared) -> Iterator[Finding]:
    layers = compared.matrices
    known = [layer for layer in layers if layer.rank_99 and layer.spectral_norm]
    if not known or len(known) < len(layers):
        return
    ranks = [layer.rank_99[-1] for layer in known if layer.rank_99]
    worst = max(known, key=lambda layer: (layer.rank_99 or (0,))[-1])
    if all(r <= max(1, LOW_RANK * min(layer.shape)) for r, layer in zip(ranks, known, strict=True)):
        exact = [layer.numerical_rank for layer in known if layer.numerical_rank is not None]
        rank = f"; numerical rank at most {max(exact)}" if exact else ""
        yield Finding(
            "low-rank-update",
            "info",
            f"The difference is a rank-{max(ranks)} update",
            where=f"{len(known)} matrices differ, {len(compared.equal_matrices)} do not",
            evidence=f"rank {max(ranks)} holds 99 % of the energy of every difference (most: {worst.name}){rank}",
            cause="An adapter was merged, or training moved the weights in few directions.",
            action=Action("extract_lora", {"rank": max(ranks)}),
            source="Hu et al. 2106.09685",
        )


def _base(path: str | os.PathLike[str]) -> str:
    return os.path.basename(os.path.abspath(path))
