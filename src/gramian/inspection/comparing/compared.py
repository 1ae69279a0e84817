"""What a comparison of two checkpoints found: rows, facts, notes and findings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from gramian.checkpoint import Checkpoint
from gramian.checkpoint.formats import dtype_name
from gramian.errors import some
from gramian.inspection.comparing.changes import same_bits
from gramian.inspection.comparing.matching import Pairs
from gramian.inspection.experiments.intended_zeros import is_product
from gramian.inspection.weights.entries import count_non_finite
from gramian.inspection.weights.matrices import read_config
from gramian.report import Action, Finding, Layer
from gramian.report.model import plural

__all__ = ["Compared", "find_differences"]

# A change counts as of low rank if this share of the full rank holds 99 % of the energy of every difference.
LOW_RANK = 0.25

# Facts that are told even where they are zero.
ALWAYS = ("tensors compared bit by bit", "tensors that are equal", "matrices that differ")


@dataclass
class Compared:
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
    rounded: list[str] = field(default_factory=list)  # computed in one of the two, and equal up to the rounding of that
    same: set[str] = field(default_factory=set)  # names of tensors that are equal, up to a cast or rounding
    parts: list[str] = field(default_factory=list)  # that differ, of weights that are the same
    broken: list[tuple[str, int]] = field(default_factory=list)  # and the number of entries, NaN or infinite in one
    cut: list[str] = field(default_factory=list)  # compared on the rows that both have
    num_rows: int = 0  # of those, that only one has
    turned: list[str] = field(default_factory=list)  # stored (in, out) in one and (out, in) in the other
    shapes: list[str] = field(default_factory=list)  # not compared
    square: float = 0.0
    base: float = 0.0

    @property
    def paths(self) -> dict[str, str]:
        """Of the two checkpoints, as the commands of remedies take them."""
        return {"model": str(self.pairs.one.path), "other": str(self.pairs.two.path)}

    def add_unmatched(self) -> None:
        """Add a row for each tensor that only one of the two has; they too are searched for NaN."""
        pairs = self.pairs
        sides = ((pairs.one, pairs.only_one, pairs.new, pairs.two), (pairs.two, pairs.only_two, pairs.old, pairs.one))
        for checkpoint, names, holdings, other in sides:
            for name in names:
                entry = checkpoint.entries[name]
                tensor = checkpoint.load(name)
                self.search(name, tensor)
                note = f"only in {checkpoint.path}"
                if name in holdings and holdings[name].role == "head" and _ties_head(other):
                    tables = [h.entry for h in holdings.values() if h.role == "embedding" and h.entry.name != name]
                    same = [t.name for t in tables if same_bits(checkpoint.load(t.name), tensor)]
                    note += f", equal to {same[0]}, to which {other.path} ties its head" if same else ""
                self.others.append(Layer(name, "unmatched", entry.shape, 0, entry.dtype, note=note))

    def add_rows(self, name: str, new: Tensor, old: Tensor) -> None:
        """Add a row for the rows of a tensor that only one of the two has, such as new tokens."""
        longer, path = (new, self.pairs.one.path) if len(new) > len(old) else (old, self.pairs.two.path)
        start, stop = min(len(new), len(old)), len(longer)
        count = stop - start
        what = f"row {start}" if count == 1 else f"rows {start} to {stop - 1}"
        note = f"not compared: {what}, only in {path}"
        self.num_rows += count
        shapes = f"{tuple(new.shape)} and {tuple(old.shape)}"
        self.cut.append(f"{name} {shapes}: the first {plural(start, 'row')}; {plural(count, 'row')} only in {path}")
        label, rest = f"{name}[{start}:{stop}]", longer[start:]
        self.search(label, rest)
        self.others.append(Layer(label, "unmatched", tuple(rest.shape), 0, dtype_name(rest), note=note))

    def search(self, name: str, tensor: Tensor) -> None:
        """Search what is not compared, or only one has, for NaN and infinity."""
        if count := count_non_finite(tensor):
            self.broken.append((name, count))

    def not_looked_at(self) -> dict[str, str]:
        """Why something was not compared, by what it is."""
        pairs = self.pairs
        reasons = {"signal": "files have no forward pass"}
        for checkpoint, names in ((pairs.one, pairs.only_one), (pairs.two, pairs.only_two)):
            if names:
                reasons[plural(len(names), "tensor")] = f"only in {checkpoint.path}"
        if self.shapes:
            reasons[f"{plural(len(self.shapes), 'pair')} of tensors"] = "of different shapes"
        return reasons

    def facts(self) -> dict[str, float | int | str]:
        """The numbers of all tensors together."""
        pairs = self.pairs
        facts: dict[str, float | int | str] = {
            "tensors compared bit by bit": len(pairs.order) - len(self.shapes),
            "tensors that are equal": self.num_equal,
            "matrices that differ": len(self.matrices),
            "matrices that are equal": len(self.equal_matrices),
            "other tensors that differ": len(self.changed),
            "tensors that were not compared": len(self.shapes),
            "rows that only one has, not compared": self.num_rows,
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
            ("Equal up to rounding, since one of the two is computed", self.rounded),
            ("Different parts of a weight that is equal", self.parts),
            ("Changed, but not analyzed as matrices", [layer.name for layer in self.changed]),
            ("Of another shape, compared on the rows that both have", self.cut),
            ("Stored the other way round, compared matrix by matrix", self.turned),
            ("Of another shape, not compared", self.shapes),
            (f"Only in {pairs.one.path}", pairs.only_one),
            (f"Only in {pairs.two.path}", pairs.only_two),
        ):
            notes += [f"{what}: {some(names, 5)}"] if names else []
        for checkpoint in (pairs.one, pairs.two):
            notes += [f"{checkpoint.path}: {note}" for note in checkpoint.notes]
        return notes


def find_differences(compared: Compared) -> Iterator[Finding]:
    """What the comparison found, errors first."""
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
            cause="Norms, biases or buffers were trained too; the factors of an adapter do not hold them."
            if any(layer.kind != "quantized tensor" for layer in known)
            else "The weights were quantized, and no scales that are known are beside them. Dequantize them first.",
        )


def _of_nonfinite(compared: Compared) -> Iterator[Finding]:
    """Tensors with NaN or infinity in one of the two, or differences that are not finite since both have them."""
    broken = dict(compared.broken)
    num_entries = sum(broken.values())
    title, evidence = (
        "{} not finite in one of the two",
        f"{num_entries:,} {'entry' if num_entries == 1 else 'entries'} that the other has not (exact)",
    )
    if not broken:
        broken = {layer.name: 0 for layer in compared.matrices if layer.frobenius_norm is None}
        title, evidence = "{} not finite, and not the same", "NaN or infinity in both (exact)"
    if broken:
        names = list(broken)
        yield Finding(
            "non-finite-difference",
            "error",
            title.format(f"{plural(len(names), 'tensor')} {'is' if len(names) == 1 else 'are'}"),
            where=some(names, 10),
            evidence=evidence,
            cause="Training diverged in one of them, or a file is damaged.",
            action=Action("inspect_files", compared.paths),
        )


def _of_equality(compared: Compared) -> Iterator[Finding]:
    """That the two are equal, as far as they are."""
    pairs = compared.pairs
    if compared.matrices or compared.changed or compared.broken:
        return
    evidence = f"{plural(compared.num_equal, 'tensor')}, bit for bit"
    for cast, names in compared.casts.items():
        title = f"Equal up to the cast {cast}"
        yield Finding("equal-after-cast", "info", title, evidence=f"{plural(len(names), 'tensor')}; {evidence}")
    if compared.rounded:
        yield Finding(
            "equal-up-to-rounding",
            "info",
            "Equal up to rounding",
            evidence=f"{plural(len(compared.rounded), 'weight')} that one of the two stores in parts; {evidence}",
        )
    unmatched = len(pairs.only_one) + len(pairs.only_two)
    unread = [note for checkpoint in (pairs.one, pairs.two) for note in checkpoint.notes if "left out" in note]
    others = len(compared.shapes) + len(compared.cut) + len(compared.turned)
    stored = sum(pairs.stored_otherwise(name) for name in pairs.order)
    if unmatched or others or unread or pairs.notes or compared.parts or (stored and not compared.rounded):
        yield Finding(
            "equal-in-common",
            "info",
            "The tensors that were compared are equal",
            evidence="; ".join(
                [evidence]
                + ([f"{plural(unmatched, 'tensor')} that only one has"] if unmatched else [])
                + ([f"{plural(others, 'tensor')} of another shape"] if others else [])
                + ([f"{plural(compared.num_rows, 'row')} that only one has"] if compared.num_rows else [])
                + ([f"{plural(len(compared.parts), 'part')} of equal weights that differ"] if compared.parts else [])
                + ([f"{plural(stored, 'weight')} that the two store in other parts"] if stored else [])
                + (["names differ by a prefix"] if pairs.notes else [])
                + (["a file holds more than was read"] if unread else [])
            ),
        )
    elif not compared.casts and not compared.rounded:
        yield Finding("no-difference", "info", "The two are equal", evidence=evidence)


def _ties_head(checkpoint: Checkpoint) -> bool:
    return bool(read_config(checkpoint.path).get("tie_word_embeddings"))


def _of_low_rank(compared: Compared) -> Iterator[Finding]:
    layers = [layer for layer in compared.matrices if not is_product(layer)]
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
            where=f"{_matrices(len(known), 'differs', 'differ')}, {len(compared.equal_matrices):,} equal",
            evidence=f"rank {max(ranks)} holds 99 % of the energy of every difference (most: {worst.name}){rank}",
            cause="An adapter was merged, or training moved the weights in few directions.",
            action=Action("extract_lora", compared.paths | {"rank": max(ranks)}),
            source="Hu et al. 2106.09685",
        )


def _matrices(count: int, one: str, many: str) -> str:
    return f"1 matrix {one}" if count == 1 else f"{count:,} matrices {many}"
