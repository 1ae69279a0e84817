"""What a compression did, as plain data, and as a page that a person can decide from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .document import Document, Picture, Section, Series, Table, Tile
from .serial import jsonable

__all__ = ["FOUR_BITS", "Contender", "FactoredLayer", "Outcome"]

FOUR_BITS = "4 bits"
"""The name of the form in which all layers have integers of four bits."""


@dataclass(frozen=True)
class Contender:
    """One form of the model: dense, compressed, bfloat16, int8.

    Args:
        name: of the form.
        parameters: how many.
        bytes: of its weights.
        quality: the held-out measure; `None` where it could not be evaluated.
        latency_one, latency_many: milliseconds of a forward pass, at batch 1 and at the larger batch.
        note: why something was not measured.
        others: the evaluation's other numbers, such as those of a second domain.
    """

    name: str
    parameters: int | None
    bytes: int | None
    quality: float | None = None
    latency_one: float | None = None
    latency_many: float | None = None
    note: str = ""
    others: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FactoredLayer:
    """One layer of the model and what was decided about it.

    Args:
        name: of the module.
        shape: (m, n), empty where the layer could not be factored.
        rank: that it keeps; `None` where it stays dense.
        saved: parameters that it loses.
        why: the reason.
    """

    name: str
    shape: tuple[int, ...]
    rank: int | None
    saved: int
    why: str


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
        predicted: the rise of the calibration loss that the plan predicts.
        seconds: that calibrating and factoring took.
        notes: what else must be known.
        for_speed: whether speed was asked and not size, so that an alternative need not be smaller.
        share_of: what the shares are of, "parameters" or "bytes".
    """

    title: str
    asked: str
    measure: str
    better: str
    keep: float
    contenders: tuple[Contender, ...]
    curve: tuple[tuple[float, float], ...]
    layers: tuple[FactoredLayer, ...]
    batch: int
    predicted: float
    seconds: float
    notes: tuple[str, ...] = ()
    for_speed: bool = False
    share_of: str = "parameters"

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
        """Whether a form that is not factored serves better; empty where none does."""
        if not self.better:
            return ""
        told, sized = [], not self.for_speed
        for other in self.contenders[2:]:
            if other.name not in ("bfloat16", "int8", FOUR_BITS) or other.quality is None:
                continue
            larger = (other.bytes or 0) > (self.compressed.bytes or 0)
            if (sized and larger) or self._drop(other) > self.drop:
                continue
            if other.name == self.asked:
                continue
            slower = [where for where, ratio in self._slower(other) if ratio > 1.02]
            if not slower:
                told.append(f"do not factor this model: {other.name} is {'smaller, ' * sized}no worse and no slower")
            elif sized:
                told.append(f"{other.name} is smaller and no worse, but slower at {' and '.join(slower)}")
        return "; ".join(told)

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        share = (self.compressed.bytes or 0) / (self.dense.bytes or 1)
        before, after = (_shown(c.quality) for c in (self.dense, self.compressed))
        text = f"{share:.0%} of the bytes, {self.measure} {before} → {after}"
        speeds = [s for s in self.speedups(self.compressed) if s is not None]
        if len(speeds) == 2:
            text += f", {speeds[0]:.2f}× as fast at batch 1 and {speeds[1]:.2f}× at batch {self.batch}"
        return f"{text}{f'; {self.advice}' if self.advice else ''}."

    def speedups(self, contender: Contender) -> tuple[float | None, float | None]:
        """How many times as fast as the dense model a form is, at batch 1 and at the larger batch."""
        pairs = ((self.dense.latency_one, contender.latency_one), (self.dense.latency_many, contender.latency_many))
        one, many = (None if not before or not after else before / after for before, after in pairs)
        return one, many

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
            status="warning" if bad or self.notes else "good",
            tiles=self._tiles(),
            sections=[self._choice(plots), self._per_layer()],
            footer=f"calibrated and factored in {self.seconds:.1f} s · predicted rise of the calibration loss "
            f"{self.predicted:.3g} · latencies are medians of interleaved passes on this machine",
        )

    def _tiles(self) -> list[Tile]:
        dense, small = self.dense, self.compressed
        tiles = [
            Tile("Parameters", f"{small.parameters:,}", f"of {dense.parameters:,}", "accent"),
            Tile("Bytes of the weights", f"{small.bytes:,}", f"of {dense.bytes:,}", "accent"),
            Tile(f"Held-out {self.measure}", _shown(small.quality), f"dense {_shown(dense.quality)}", "after"),
        ]
        fast = self.speedups(small)[0]
        if fast is not None:
            tiles.append(Tile("Speed at batch 1", f"{fast:.2f}×", "of the dense model", "after"))
        return tiles

    def _choice(self, plots: bool) -> Section:
        direction = f" {self.better.capitalize()} is better." if self.better else ""
        lines = [*(f"- {note}" for note in self.notes), *([f"- {self.advice}."] if self.advice else [])]
        others = [*self.dense.others]
        rows = [
            [
                c.name,
                c.quality,
                *(c.others.get(name) for name in others),
                c.parameters,
                c.bytes,
                c.latency_one,
                c.latency_many,
                *self.speedups(c),
                c.note,
            ]
            for c in self.contenders
        ]
        heads = ["", f"held-out {self.measure}", *others, "parameters", "bytes", "ms at 1", f"ms at {self.batch}"]
        table = Table(
            "The compressed model and its alternatives",
            [*heads, "× at 1", f"× at {self.batch}", "not measured"],
            rows,
            emphasis=[1],
        )
        items: list[Picture | Table] = [table]
        if plots and len(self.curve) > 1:
            items.insert(0, self._picture())
        return Section("Quality over size", "\n".join([direction.strip(), *lines]).strip(), items)

    def _picture(self) -> Picture:
        curve = sorted(point for point in self.curve if math.isfinite(point[1]))
        chosen = [point for point in curve if point[0] == self.keep]
        series = [Series("planned", [100 * k for k, _ in curve], [q for _, q in curve], role="before")]
        if chosen:
            series.append(Series("chosen", [100 * self.keep], [chosen[0][1]], role="accent", style="points"))
        dense = self.dense.quality
        return Picture(
            f"Held-out {self.measure} by share of the {self.share_of}",
            series,
            x_label=f"{self.share_of} kept, %",
            y_label=self.measure,
            reference=None if dense is None else (dense, f"dense {_shown(dense)}"),
        )

    def _per_layer(self) -> Section:
        rows: Sequence[Sequence[str | float | int | None]] = [
            [row.name, " × ".join(map(str, row.shape)), row.rank, row.saved, row.why] for row in self.layers
        ]
        return Section(
            "Ranks, and why",
            "What loses least for its parameters or bytes is kept, in one list over all layers; ranks by the weighted "
            "singular values, σ² for each parameter that they cost.",
            [Table("Layers", ["layer", "shape", "rank", "parameters saved", "why"], rows)],
        )

    def _drop(self, contender: Contender) -> float:
        if self.dense.quality is None or contender.quality is None:
            return math.nan
        sign = {"higher": 1.0, "lower": -1.0}.get(self.better, 0.0)
        return sign * (self.dense.quality - contender.quality)

    def _slower(self, other: Contender) -> list[tuple[str, float]]:
        pairs = [
            ("batch 1", other.latency_one, self.compressed.latency_one),
            (f"batch {self.batch}", other.latency_many, self.compressed.latency_many),
        ]
        return [(where, a / b) for where, a, b in pairs if a and b]


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
