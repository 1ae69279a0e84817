"""What a compression did, as plain data, and as a page that a person can decide from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from .document import Document, Picture, Section, Series, Table, Tile
from .formatting import plural
from .serial import jsonable

__all__ = ["FOUR_BITS", "Contender", "Outcome", "PlannedLayer", "Ratio"]

FOUR_BITS = "4 bits"
"""The name of the form in which all layers have integers of four bits."""

PLAIN = ("bfloat16", "int8")
"""Names of the forms that need no plan."""

ALIKE = 0.95
"""A form whose speed is surely more than this share of another's is no slower."""


class Ratio(NamedTuple):
    """How many times as fast one thing is measured to be as another.

    Attributes:
        median: of pairs that were measured one after the other.
        low: the lower end of an interval of 95 %.
        high: its upper end.
    """

    median: float
    low: float
    high: float

    @property
    def seen(self) -> bool:
        """Whether there is a difference at all: the interval excludes 1."""
        return self.low > 1 or self.high < 1

    @property
    def ends(self) -> str:
        """The interval."""
        return f"{_times(self.low)}–{_times(self.high)}"

    def __str__(self) -> str:
        return f"{_times(self.median)}× ({self.ends})" if self.seen else f"no difference seen ({self.ends})"


@dataclass(frozen=True)
class Contender:
    """One form of the model: dense, compressed, bfloat16, int8.

    Args:
        name: of the form.
        parameters: how many.
        bytes: of its weights.
        quality: the held-out measure; `None` where it could not be evaluated.
        latency_one, latency_many: milliseconds of a forward pass, at batch 1 and at the larger batch.
        speed_one, speed_many: how many times as fast as the dense model it is, at batch 1 and at the larger batch.
        beside_one, beside_many: how many times as fast as the compressed model.
        note: why something was not measured, or what must be known of it.
        others: the evaluation's other numbers, such as those of a second domain.
    """

    name: str
    parameters: int | None
    bytes: int | None
    quality: float | None = None
    latency_one: float | None = None
    latency_many: float | None = None
    speed_one: Ratio | None = None
    speed_many: Ratio | None = None
    beside_one: Ratio | None = None
    beside_many: Ratio | None = None
    note: str = ""
    others: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of the model and what was decided about it.

    Args:
        name: of the module.
        shape: (m, n), empty where the layer could not be factored.
        rank: that it keeps; `None` where it stays dense.
        saved: parameters that it loses.
        why: the reason.
        energy: the share of what the layer means to the loss that it keeps; `None` where it stays as it is.
        units: of its input, how many heads, units or channels stay, and of how many; where the model is narrowed.
    """

    name: str
    shape: tuple[int, ...]
    rank: int | None
    saved: int
    why: str
    energy: float | None = None
    units: tuple[int, int] | None = None


@dataclass(frozen=True)
class Outcome:
    """A compression: what was asked, what was chosen, and the alternatives beside it.

    Args:
        title: of the model.
        asked: the target, in words.
        measure: the name of the held-out measure.
        better: `"higher"`, `"lower"`, or empty where the measure tells nothing.
        keep: the chosen share of the parameters or bytes.
        contenders: dense first, compressed second, then the alternatives.
        curve: pairs of the share that is kept and the measure.
        layers: in the order of the model.
        batch: samples of the larger batch.
        predicted: the rise of the loss that the plan predicts.
        predicted_text: the same with its interval, and on which data, in words.
        seconds: that calibrating and factoring took.
        notes: what must be known before the result is used.
        remarks: what was done beside it, such as a refit.
        for_speed: whether speed was asked and not size, so that an alternative need not be smaller.
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
    for_speed: bool = False
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
            if planned or other.quality is None or (not self.for_speed and larger) or self._drop(other) > self.drop:
                continue
            where = self._slower(other)
            (found if where in found else slower).setdefault(where, []).append(other.name)
        smaller = "" if self.for_speed else "smaller, "
        if found["no"]:
            return f"use {_either(found['no'])} instead: {smaller}no worse and no slower"
        if self.for_speed:
            return ""
        if found["unseen"]:
            return f"consider {_either(found['unseen'])}: {smaller}no worse, and not seen to be slower"
        told = [f"{_either(names)} {where}" for where, names in slower.items()]
        return f"smaller and no worse: {'; '.join(told)}" if told else ""

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
        bad = self.better != "" and self.drop > 0 and bool(self.advice)
        return Document(
            title=f"{self.title}: {self.asked}",
            verdict=self.verdict,
            status="warning" if bad or self.notes or self._slower_than_dense() else "good",
            tiles=self._tiles(),
            sections=[self._choice(plots), self._per_layer()],
            footer=f"calibrated and factored in {self.seconds:.1f} s · predicted rise of the loss: "
            f"{self.predicted_text or format(self.predicted, '.2g')} · times are medians of passes in turns on this "
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
            value = f"{_times(small.speed_one.median)}×" if small.speed_one.seen else "unchanged"
            tiles.append(Tile("Speed at batch 1", value, f"{small.speed_one.ends} of the dense model's", "after"))
        return tiles

    def _choice(self, plots: bool) -> Section:
        direction = f" {self.better.capitalize()} is better." if self.better else ""
        told = (*self.notes, *self.remarks, *(f"{c.name}: {c.note}" for c in self.contenders if c.note))
        lines = [f"- {note}" for note in told]
        others = [*self.dense.others]
        rows = [
            [
                c.name,
                c.quality,
                c.bytes,
                *(r and f"{_times(r.median)} ({r.ends})" for r in (c.speed_one, c.speed_many)),
                c.latency_one,
                c.latency_many,
                *(c.others.get(name) for name in others),
                c.parameters,
            ]
            for c in self.contenders
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
            [Table("Layers", ["layer", "shape", "rank", "energy, %", "saved", "note"], rows)],
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
            [Table("Layers", ["layer", "kept", "of", "energy, %", "saved", "note"], rows)],
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


def _note(row: PlannedLayer) -> str:
    return "" if row.energy is not None else row.why


def _either(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.0f}"
