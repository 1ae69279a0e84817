"""What a compression did, as plain data, and as a page that a person can decide from."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .contenders import AS_CUT, FOUR_BITS, Contender, PlannedLayer, times
from .document import Document, Picture, Section, Series, Table, Tile
from .formatting import plural
from .serial import jsonable

__all__ = ["Outcome"]

PLAIN = ("bfloat16", "int8")
"""Names of the forms that need no plan."""

ALIKE = 0.95
"""A form whose speed is surely more than this share of another's is no slower."""


@dataclass(frozen=True)
class Outcome:
    """A compression: what was asked, what was chosen, and the alternatives beside it.

    Args:
        title: of the model.
        asked: the target, in words.
        measure: the name of the held-out measure.
        better: `"higher"`, `"lower"`, or empty where the measure tells nothing.
        keep: the chosen share of the parameters or bytes.
        contenders: dense first, compressed second, then that before its refit, if any, and the alternatives.
        curve: pairs of the share that is kept and the measure.
        layers: in the order of the model.
        batch: samples of the larger batch.
        predicted: the rise of the loss that the plan predicts for what it cuts, before a refit.
        predicted_text: the same with its interval, and on which data, in words.
        seconds: that calibrating and factoring took.
        notes: what must be known before the result is used.
        remarks: what was done beside it, such as a refit.
        max_drop: by how much the measure was allowed to become worse, where that was asked.
        speedup: how many times as fast it was to be, where that was asked; an alternative then need not be smaller.
        share_of: what the shares are of, "parameters" or "bytes".
        waited: the share of passes' time that was spent waiting for a processor.
    """

    title: str
    asked: str
    measure: str
    better: str
    keep: float
    contenders: tuple[Contender, ...]
    curve: tuple[tuple[float, float], ...]
    layers: tuple[PlannedLayer, ...]
    batch: int
    predicted: float
    seconds: float
    notes: tuple[str, ...] = ()
    max_drop: float | None = None
    speedup: float | None = None
    share_of: str = "parameters"
    waited: float = 0.0
    predicted_text: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def dense(self) -> Contender:
        """The model as it came."""
        return self.contenders[0]

    @property
    def compressed(self) -> Contender:
        """The model that was chosen."""
        return self.contenders[1]

    @property
    def drop(self) -> float:
        """How much worse the held-out measure became; negative where it became better."""
        return self._drop(self.compressed)

    @property
    def advice(self) -> str:
        """Which forms that need no plan serve better; empty where none does."""
        if not self.better:
            return ""
        found: dict[str, list[str]] = {"no": [], "unseen": []}
        slower: dict[str, list[str]] = {}
        for other in self.contenders[2:]:
            larger = (other.bytes or 0) > (self.compressed.bytes or 0)
            planned = other.name == self.asked or other.name not in (*PLAIN, FOUR_BITS)
            if planned or other.quality is None or (self.speedup is None and larger) or self._drop(other) > self.drop:
                continue
            where = self._slower(other)
            (found if where in found else slower).setdefault(where, []).append(other.name)
        smaller = "smaller, " if self.speedup is None else ""
        if found["no"]:
            return f"use {_either(found['no'])} instead: {smaller}no worse and no slower"
        if self.speedup is not None:
            return ""
        if found["unseen"]:
            return f"consider {_either(found['unseen'])}: {smaller}no worse, and not seen to be slower"
        told = [f"{_either(names)} {where}" for where, names in slower.items()]
        return f"smaller and no worse: {'; '.join(told)}" if told else ""

    @property
    def is_good(self) -> bool:
        """Whether what was asked is met: a drop or a speed that was measured; else, whether nothing speaks against it.

        A share of the parameters or bytes says nothing of quality or speed, so notes, a lower speed than the dense
        model's and a form that serves better without a plan all count then.
        """
        if self.max_drop is not None and self.better:
            return self.drop <= self.max_drop
        if self.speedup is not None:
            speeds = (self.compressed.speed_one, self.compressed.speed_many)
            return all(ratio is not None and ratio.median >= self.speedup for ratio in speeds)
        served = self.better != "" and self.drop > 0 and bool(self.advice)
        return not (served or self.notes or self._slower_than_dense())

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        share = (self.compressed.bytes or 0) / (self.dense.bytes or 1)
        before, after = (_shown(c.quality) for c in (self.dense, self.compressed))
        text = f"{share:.0%} of the bytes, {self.measure} {before} → {after}"
        one, many = self.compressed.speed_one, self.compressed.speed_many
        if one and many and not one.seen and not many.seen:
            text += ", no difference in speed seen"
        elif one and many:
            text += f", speed at batch 1: {one}, at batch {self.batch}: {many}"
        slow = self._slower_than_dense()
        text += f", slower than the dense model at {' and at '.join(slow)}" if slow else ""
        text += f"; {self.advice}" if self.advice else ""
        return f"{text}; {plural(len(self.notes), 'note')} below." if self.notes else f"{text}."

    def to_dict(self) -> dict[str, Any]:
        """The numbers for a program: plain values, with the verdict, the drop and the advice."""
        told = {"verdict": self.verdict, "drop": self.drop, "advice": self.advice}
        return jsonable(asdict(self) | told)

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_document(self, *, plots: bool = True) -> Document:
        """The page: headline numbers, the curve, the alternatives, the layers."""
        return Document(
            title=f"{self.title}: {self.asked}",
            verdict=self.verdict,
            status="good" if self.is_good else "warning",
            tiles=self._tiles(),
            sections=[self._choice(plots), self._per_layer()],
            footer=f"calibrated and factored in {self.seconds:.1f} s · times are medians of passes in turns on this "
            "machine, and speeds those of pairs of neighbors, with an interval of 95 %",
        )

    def _tiles(self) -> list[Tile]:
        dense, small = self.dense, self.compressed
        tiles = [
            Tile("Parameters", f"{small.parameters:,}", f"of {dense.parameters:,}", "accent"),
            Tile("Bytes of the weights", f"{small.bytes:,}", f"of {dense.bytes:,}", "accent"),
            Tile(f"Held-out {self.measure}", _shown(small.quality), f"dense {_shown(dense.quality)}", "after"),
        ]
        if small.speed_one is not None:
            value = f"{times(small.speed_one.median)}×" if small.speed_one.seen else "unchanged"
            tiles.append(Tile("Speed at batch 1", value, f"{small.speed_one.ends} of the dense model's", "after"))
        return tiles

    def _choice(self, plots: bool) -> Section:
        made, direction = self.contenders, f" {self.better.capitalize()} is better." if self.better else ""
        told = (*self.notes, *self.remarks, self._prediction(), *(f"{c.name}: {c.note}" for c in made if c.note))
        lines = [f"- {note}" for note in told]
        others = [*self.dense.others]
        rows = [
            [
                c.name,
                c.quality,
                c.bytes,
                *(r and f"{times(r.median)} ({r.ends})" for r in (c.speed_one, c.speed_many)),
                c.latency_one,
                c.latency_many,
                *(c.others.get(name) for name in others),
                c.parameters,
            ]
            for c in made
        ]
        speeds = ["× at 1", f"× at {self.batch}", "ms at 1", f"ms at {self.batch}"]
        table = Table(
            "The compressed model and its alternatives",
            ["", self.measure, "bytes", *speeds, *others, "parameters"],
            rows,
            emphasis=[1],
        )
        items: list[Picture | Table] = [table]
        if plots and len(self.curve) > 1:
            items.insert(0, self._picture())
        return Section("Quality over size", "\n".join([direction.strip(), *lines]).strip(), items)

    def _prediction(self) -> str:
        """What the plan predicts, and of which model."""
        text = self.predicted_text or format(self.predicted, ".2g")
        refit = any(c.name == AS_CUT for c in self.contenders)
        return f"predicted rise of the objective's loss by what the plan cuts{f', {AS_CUT}' if refit else ''}: {text}"

    def _picture(self) -> Picture:
        curve = sorted(point for point in self.curve if math.isfinite(point[1]))
        series = [Series("planned", [100 * k for k, _ in curve], [q for _, q in curve], role="before")]
        dense, made = self.dense.quality, self.compressed.quality
        if made is not None and any(share == self.keep for share, _ in curve):  # what is delivered, refit if it was
            series.append(Series("chosen", [100 * self.keep], [made], role="accent", style="points"))
        return Picture(
            f"Held-out {self.measure} by share of the {self.share_of}",
            series,
            x_label=f"{self.share_of} kept, %",
            y_label=self.measure,
            reference=None if dense is None else (dense, f"dense {_shown(dense)}"),
        )

    def _per_layer(self) -> Section:
        if any(row.units for row in self.layers):
            return self._per_units()
        rows: Sequence[Sequence[str | float | int | None]] = [
            [row.name, " × ".join(map(str, row.shape)), row.rank, _percent(row.energy), row.saved, _note(row)]
            for row in self.layers
        ]
        return Section(
            "Ranks, and why",
            "What loses least for its parameters or bytes is kept, in one list over all layers; ranks by the weighted "
            "singular values, σ² for each parameter that they cost. Energy is the share of a layer's σ² that is kept.",
            [_by_layer(["layer", "shape", "rank", "energy, %", "saved"], rows)],
        )

    def _per_units(self) -> Section:
        rows = [
            [row.name, *(row.units or (None, None)), _percent(row.energy), row.saved, _note(row)] for row in self.layers
        ]
        return Section(
            "Units, and why",
            "The heads, hidden units and channels of a layer's input that lose least for their parameters go, in one "
            "list over all layers; what stays makes up for them. Energy is the share that is kept of what they mean to "
            "the loss.",
            [_by_layer(["layer", "kept", "of", "energy, %", "saved"], rows)],
        )

    def _slower(self, other: Contender) -> str:
        """Whether a form is slower than the compressed model: "no", "unseen", or at which of the two batches it is."""
        ratios = {"batch 1": other.beside_one, f"batch {self.batch}": other.beside_many}
        known = {place: ratio for place, ratio in ratios.items() if ratio is not None}
        slow = [place for place, ratio in known.items() if ratio.high < 1]
        fast = [place for place, ratio in known.items() if ratio.low > 1]
        if slow:
            return f"(slower at {' and at '.join(slow)}{f', faster at {fast[0]}' if fast else ''})"
        return "no" if all(ratio.low > ALIKE for ratio in known.values()) else "unseen"

    def _slower_than_dense(self) -> list[str]:
        """At which batches the compressed model is seen to be slower than the dense one."""
        speeds = {"batch 1": self.compressed.speed_one, f"batch {self.batch}": self.compressed.speed_many}
        return [place for place, ratio in speeds.items() if ratio is not None and ratio.high < 1]

    def _drop(self, contender: Contender) -> float:
        if self.dense.quality is None or contender.quality is None:
            return math.nan
        sign = {"higher": 1.0, "lower": -1.0}.get(self.better, 0.0)
        return sign * (self.dense.quality - contender.quality)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _by_layer(columns: list[str], rows: Sequence[Sequence[str | float | int | None]]) -> Table:
    """A table of layers, with their notes where there is one."""
    if any(row[-1] for row in rows):
        return Table("Layers", [*columns, "note"], rows)
    return Table("Layers", columns, [row[:-1] for row in rows])


def _note(row: PlannedLayer) -> str:
    return "" if row.energy is not None else row.why


def _either(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
