"""What a report says, as plain data: no tensors, no models, nothing that draws.

Two levels. `Report` is the result of `gramian.inspect`: findings and one `Layer` for each block. `Document` is what is
shown: sections of pictures, tables and findings in reading order. A report becomes a document; the demo composes a
longer one. Terminal, HTML and JSON all render these classes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .actions import Action

if TYPE_CHECKING:
    import pandas  # pyright: ignore[reportMissingImports]
    from rich.console import Console, ConsoleOptions, RenderResult

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")

Status = Literal["good", "warning", "bad"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or worth knowing: where, how much, why, and what to do.

    Args:
        code: stable, so that programs may match it: `"gain-below-one"`.
        severity: `"error"`, `"warning"` or `"info"`.
        title: one sentence without a full stop.
        where: the layers concerned.
        evidence: the measured numbers, with their intervals.
        cause: why it happens, in a sentence.
        action: what to do, where code can do it.
        advice: what to do that no code performs, or what to consider beside the action.
        source: the paper behind the rule.

    >>> Finding("gain-below-one", "error", "Gradients vanish", action=Action("isometric_")).remedy
    'gm.init.isometric_(model, sample)'
    """

    code: str
    severity: Severity
    title: str
    where: str = ""
    evidence: str = ""
    cause: str = ""
    action: Action | None = None
    advice: str = ""
    source: str = ""

    @property
    def remedy(self) -> str:
        """The action's code, then the advice, each from a line of its own; empty where there is neither."""
        return "\n".join(part for part in (self.action.code if self.action else "", self.advice) if part)


@dataclass(frozen=True)
class Layer:
    """One matrix of the network. Unknown numbers are `None`; lengths and counts are in elements.

    `gain` is χ, the mean squared singular value of the Jacobian from this block's input to the next block's input;
    `activation_rms` is of the block's input and `gradient_rms` of the loss's gradient at its output, per unit.

    `rank_90` and `rank_99` are the least ranks that hold so much of the energy ‖W‖_F², each as (least, most): equal
    where all singular values are known. `saving_99` is the share of the parameters that two factors of that rank save.
    `noise_edge` is the largest singular value of independent entries of this size, `above_noise` counts those
    significantly beyond it, and `noise_p_value` is the probability of the largest under independence. `tail_alpha` is
    the exponent of a power-law tail, with its 95 % interval and the size of the tail; `None` is an abstention, and
    `tail_note` says why. `operator_norm` is that of a convolution on images, which `spectral_norm`, of the reshaped
    kernel, is not. In a comparison the matrix is the difference; `relative_change` is ‖W − W′‖_F / ‖W′‖_F and
    `subspace_angle` the largest angle, in degrees, between the leading `subspace_dim` right singular vectors of both.
    `overflow_float16` and `underflow_float16` count entries that a cast to float16 would lose.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    depth: int
    dtype: str = ""
    parameters: int = 0
    singular_values: tuple[float, ...] = ()
    frobenius_norm: float | None = None
    spectral_norm: float | None = None
    condition: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    numerical_rank: int | None = None
    gain: float | None = None
    activation_rms: float | None = None
    gradient_rms: float | None = None
    note: str = ""
    role: str = ""
    spectral_norm_error: float | None = None
    operator_norm: float | None = None
    operator_norm_error: float | None = None
    rank_90: tuple[int, ...] | None = None
    rank_99: tuple[int, ...] | None = None
    saving_99: float | None = None
    noise_edge: float | None = None
    above_noise: int | None = None
    noise_p_value: float | None = None
    bulk_distance: float | None = None
    tail_alpha: float | None = None
    tail_interval: tuple[float, ...] | None = None
    tail_size: int | None = None
    tail_note: str = ""
    zeros: int | None = None
    overflow_float16: int | None = None
    underflow_float16: int | None = None
    overflow_bfloat16: int | None = None
    duplicate_of: str = ""
    relative_change: float | None = None
    subspace_angle: float | None = None
    subspace_dim: int | None = None
    method: str = ""


@dataclass(frozen=True)
class Direction:
    """A leading singular vector of a layer, the `rank`-th, as an image (rows of pixels) or as tokens at its ends."""

    layer: str
    rank: int
    singular_value: float
    image: tuple[tuple[float, ...], ...] = ()
    tokens: tuple[tuple[str, ...], ...] = ()


@dataclass(repr=False)
class Report:
    """What `gramian.inspect` found: ranked findings, one row per layer in forward order, and model-wide facts.

    `jacobian` holds the singular values of the end-to-end Jacobian, largest first (empty where it was not measured).
    `facts` are model-wide numbers and words by label; `notes` say what was skipped and how things were measured.

    >>> report = Report("net", [Finding("dead-units", "warning", "12 of 64 units are dead", where="layers.3")])
    >>> report.status, report.verdict
    ('warning', '1 warning: 12 of 64 units are dead.')
    """

    title: str
    findings: list[Finding] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    facts: dict[str, float | int | str] = field(default_factory=dict)
    jacobian: tuple[float, ...] = ()
    notes: list[str] = field(default_factory=list)
    directions: list[Direction] = field(default_factory=list)

    @property
    def status(self) -> Status:
        """`"bad"` if there is an error, else `"warning"` if there is a warning, else `"good"`."""
        severities = {finding.severity for finding in self.findings}
        return "bad" if "error" in severities else "warning" if "warning" in severities else "good"

    @property
    def verdict(self) -> str:
        """One sentence: how many errors and warnings, and the first of them; or that no trouble was found."""
        counts = [(sum(f.severity == severity for f in self.findings), severity) for severity in ("error", "warning")]
        parts = [plural(count, severity) for count, severity in counts if count]
        if parts:
            return f"{', '.join(parts)}: {ranked(self.findings)[0].title.rstrip('.')}."
        remarks = f" ({plural(len(self.findings), 'remark')})" if self.findings else ""
        if not self.layers:
            return f"No trouble found{remarks}, but there were no layers to look at."
        return f"No trouble found in {plural(len(self.layers), 'layer')}{remarks}."

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts and lists that strict JSON can hold; numbers that are not finite become `None`."""
        from .serial import report_to_dict

        return report_to_dict(self)

    def to_json(self, indent: int | None = None) -> str:
        """Return strict JSON (no NaN, no Infinity); the key `"gramian"` holds the version of the schema."""
        from .serial import report_to_json

        return report_to_json(self, indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """Read what `to_json` wrote. A list item or a fact that was not finite comes back as NaN.

        Raises `InputError` where the text is not JSON, not a report, or of a newer schema.
        """
        from .serial import report_from_json

        return report_from_json(text)

    def to_dataframe(self) -> pandas.DataFrame:
        """Return one row per layer, indexed by name. Raises `UnsupportedError` where pandas is not installed."""
        from .serial import layers_to_dataframe

        return layers_to_dataframe(self.layers)

    def to_document(self) -> Document:
        """Compose the page: findings, signal by depth, spectra, the end-to-end Jacobian, the layers, the notes."""
        from .compose import document_of

        return document_of(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.html` page or a `.json` file, chosen by the suffix; the file appears whole or not at all.

        Raises `InputError` for another suffix, or where the folder is missing or cannot be written.
        """
        from .serial import save_report

        save_report(self, path)

    def __repr__(self) -> str:
        return f"<Report {self.title!r}: {self.verdict}>"

    def __str__(self) -> str:
        from .terminal import to_text

        return to_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from .terminal import ReportView

        yield ReportView(self)

    def _repr_html_(self) -> str:
        from .html import frame

        return frame(self.to_document())


def plural(count: int, noun: str) -> str:
    """Return the count with its noun.

    >>> plural(1, "error"), plural(1200, "layer")
    ('1 error', '1,200 layers')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def ranked(findings: Sequence[Finding]) -> list[Finding]:
    """Return errors before warnings before remarks; within one severity the order given is the rank."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


# ---- what is shown -------------------------------------------------------------------------------------------------

Role = Literal["before", "after", "baseline", "accent", "muted", "auto"]


@dataclass(frozen=True)
class Series:
    """One curve: `x` and `y` of equal length. `role` picks a color by meaning, the same in all pictures."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    role: Role = "auto"
    style: Literal["line", "points", "dashed", "bars", "area"] = "line"


@dataclass(frozen=True)
class Picture:
    """Curves over common axes. Values that are not finite, or not positive on a log axis, are left out and counted."""

    title: str
    series: Sequence[Series]
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False
    caption: str = ""
    reference: tuple[float, str] | None = None  # a horizontal line and its label
    x_names: Sequence[str] = ()  # names of x = 0, 1, 2, …, written in place of the numbers


@dataclass(frozen=True)
class HeatMap:
    """`values[row][column]` as color; rows may have different lengths. Several heat maps in one row share a scale."""

    title: str
    values: Sequence[Sequence[float]]
    x_label: str = ""
    y_label: str = ""
    log: bool = False
    caption: str = ""
    value_label: str = ""  # the quantity and its unit, written at the color bar


Drawing = Picture | HeatMap


@dataclass(frozen=True)
class Detail:
    """What the page shows of a table's row when it is clicked: facts in words, and a curve of (x, y) on a log axis."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    points: Sequence[tuple[float, float]] = ()
    x_label: str = ""
    y_label: str = ""
    reference: tuple[float, str] | None = None


@dataclass(frozen=True)
class Table:
    """Cells are strings or numbers (numbers are aligned right and formatted); `emphasis` marks rows by index.

    `details` has one entry for each row, or none at all.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]
    caption: str = ""
    emphasis: Sequence[int] = ()
    details: Sequence[Detail] = ()


@dataclass(frozen=True)
class Section:
    """A heading, a text, and items in reading order. A tuple of items stands side by side (before, after).

    Each line of the text is a paragraph; lines that begin with "- " make a list.
    """

    heading: str
    text: str = ""
    items: Sequence[Picture | HeatMap | Table | Sequence[Finding] | tuple[Picture | HeatMap | Table, ...]] = ()


def is_findings(item: object) -> bool:
    """Tell a list of findings from a tuple of items that stand side by side (both may be empty sequences)."""
    if isinstance(item, Picture | HeatMap | Table) or not isinstance(item, Sequence):
        return False
    return all(isinstance(part, Finding) for part in item)


@dataclass(frozen=True)
class Tile:
    """A headline number: what it is, its value as shown, and a short remark under it."""

    label: str
    value: str
    remark: str = ""
    role: Role = "auto"


@dataclass
class Document:
    """A page: the verdict first, headline numbers, then sections."""

    title: str
    verdict: str
    status: Status = "good"
    tiles: list[Tile] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    footer: str = ""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page as one HTML file that needs no network. Raises `InputError` where it cannot be written."""
        from .html import save

        save(self, path)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from .terminal import DocumentView

        yield DocumentView(self)

    def _repr_html_(self) -> str:
        from .html import frame

        return frame(self)
