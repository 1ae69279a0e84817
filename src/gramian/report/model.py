"""The content of a report as plain data: no tensors, no models, no drawing.

There are two levels. `Report` is the result of `gramian.inspect`: findings, and one `Layer` for each matrix. `Document`
is a page: sections of pictures, tables and findings in reading order. `Report.to_document` turns the first into the
second; the demo builds its own document. Terminal, HTML and JSON all render these classes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .actions import Action

if TYPE_CHECKING:
    import pandas  # pyright: ignore[reportMissingImports]
    from rich.console import Console, ConsoleOptions, RenderResult

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")

_LONGEST_REASON = 72  # characters of a reason in the verdict; the report has it in full

Status = Literal["good", "warning", "bad"]


@dataclass(frozen=True)
class Rehearsal:
    """What a remedy was seen to do: a few training steps on copies, with and without it.

    Args:
        steps: before the losses are compared.
        seeds: number of rehearsals, of different random states and orders of the batches.
        before, after: loss after the steps in evaluation mode, without and with the remedy, measured alike, the mean
            over the seeds; NaN or infinite where the training fails.
        before_spread, after_spread: standard deviation over the seeds.
        is_gone: whether the finding is gone when the copy with the remedy is diagnosed.
        note: what else the remedy does, such as the loss of trained weights.

    >>> print(Rehearsal(50, 2, 2.3, 0.412, 0.01, 0.02, is_gone=True).told)
    loss after 50 steps 2.3 ± 0.01 → 0.412 ± 0.02 (2 seeds); the finding is gone
    """

    steps: int
    seeds: int
    before: float
    after: float
    before_spread: float = 0.0
    after_spread: float = 0.0
    is_gone: bool = False
    note: str = ""

    @property
    def told(self) -> str:
        """The rehearsal in one line."""
        many = self.seeds > 1
        losses = [
            f"{mean:.3g}" + (f" ± {spread:.1g}" if many and spread > 0 else "")
            for mean, spread in ((self.before, self.before_spread), (self.after, self.after_spread))
        ]
        seeds = f" ({self.seeds} seeds)" if many else ""
        gone = "the finding is gone" if self.is_gone else "the finding remains"
        when = f"after {self.steps} steps" if self.steps else "before any step"
        line = f"loss {when} {' → '.join(losses)}{seeds}; {gone}"
        return f"{line}. {self.note}" if self.note else line


@dataclass(frozen=True)
class Finding:
    """One problem, or one fact worth knowing: where it is, how large, why it happens, and what to do.

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
        follows: the code of the finding that this one follows from; empty for a cause.
        rehearsal: what the action was seen to do, where it was verified.

    >>> Finding("gain-below-one", "error", "Gradients vanish", action=Action("isometric_")).remedy
    'gm.init.isometric_(model, next(iter(batches)))'
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
    follows: str = ""
    rehearsal: Rehearsal | None = None

    @property
    def remedy(self) -> str:
        """The action's code, then the advice, each on its own lines; empty if there is neither."""
        return "\n".join(part for part in (self.action.code if self.action else "", self.advice) if part)


# The fact that says how much of the model the second moments cover; below a half, the verdict says it.
COVERAGE = "share of parameters whose signal was measured"
HALF = 0.5


@dataclass(frozen=True)
class Layer:
    """The measurements of one matrix W of the network; what was not measured is `None`.

    In a comparison of two checkpoints W is the difference W₁ − W₂.

    Attributes:
        name: of the parameter; a matrix inside a fused tensor has the part's name in brackets.
        kind: the layer's class, or `"vector"`.
        shape: (m, n).
        depth: place in forward order, from 0.
        dtype: torch's name, `"float32"`.
        parameters: number of entries.
        singular_values: σ₁ ≥ σ₂ ≥ …, all of them or the few that are known.
        frobenius_norm: ‖W‖_F.
        spectral_norm: σ₁ of the matrix; for a convolution, of the reshaped kernel.
        condition: σ₁ / σ_min.
        stable_rank: ‖W‖_F² / σ₁².
        effective_rank: exp of the entropy of σᵢ² / ‖W‖_F².
        numerical_rank: number of σᵢ above rounding.
        gain: χ, the mean squared singular value of the Jacobian from this layer's input to the next layer's input.
        activation_rms: root mean square of the layer's input.
        gradient_rms: root mean square of the loss's gradient at the layer's output, per unit.
        note: what else must be known about these numbers.
        role: `"embedding"`, `"hidden"` or `"head"`.
        spectral_norm_error: bound on the error of `spectral_norm`.
        operator_norm: largest singular value of a convolution as a map of images.
        operator_norm_error: bound on the error of `operator_norm`.
        rank_90, rank_99: smallest ranks that hold 90 and 99 % of the energy ‖W‖_F², as an interval (low, high) whose
            ends are equal where all singular values are known.
        saving_99: share of the parameters that two factors of rank `rank_99` save.
        noise_edge: largest singular value that independent entries of this variance have in the limit.
        above_noise: number of singular values significantly beyond the noise edge.
        noise_p_value: probability of a σ₁ this large if the entries were independent.
        bulk_distance: largest difference of the spectrum's distribution function from Marchenko and Pastur's.
        tail_alpha: exponent of a power-law tail; `None` where the fit abstains.
        tail_interval: its 95 % interval.
        tail_size: number of eigenvalues in the tail.
        tail_note: why the fit abstains, or what its result means.
        zeros: number of entries that are exactly zero.
        overflow_float16, overflow_bfloat16: entries that a cast makes infinite.
        underflow_float16: entries that a cast makes zero.
        duplicate_of: name of an earlier matrix with the same entries, bit for bit.
        relative_change: ‖W₁ − W₂‖_F / ‖W₂‖_F.
        subspace_angle: largest angle in degrees between the leading right singular subspaces of W₁ and W₂.
        subspace_dim: dimension of these subspaces.
        method: how the singular values were computed.
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
class Place:
    """One call of a module as the first batch crossed it in training mode; what was not measured is `None`.

    Attributes:
        name: of the module.
        kind: its class.
        rms: root mean square of its output.
        variation: share of that which differs between samples: 0 where all samples get the same output.
        gradient: root mean square of the loss's gradient at the output of its matrix, per unit.
        gain: χ of its matrix, as in `Layer`.
        update: ‖ΔW‖_F / ‖W‖_F of its matrix in the optimizer's first step.
    """

    name: str
    kind: str = ""
    rms: float | None = None
    variation: float | None = None
    gradient: float | None = None
    gain: float | None = None
    update: float | None = None


@dataclass(frozen=True)
class Direction:
    """A leading singular vector of a layer, shown as an image or as tokens.

    Attributes:
        layer: name of the matrix.
        rank: 1 for the vector of σ₁, 2 for that of σ₂, …
        singular_value: σ of this vector.
        image: rows of pixels, where the vector is an image.
        tokens: the tokens at the positive and at the negative end, where the vector runs over a vocabulary.
    """

    layer: str
    rank: int
    singular_value: float
    image: tuple[tuple[float, ...], ...] = ()
    tokens: tuple[tuple[str, ...], ...] = ()


@dataclass(repr=False)
class Report:
    """What `gramian.inspect` found: findings, one row per layer, and facts about the whole model.

    Args:
        title: name of the model or file.
        findings: problems and remarks, errors first.
        layers: one row per matrix, in forward order.
        facts: numbers and words about the whole model, by label.
        jacobian: singular values of the end-to-end Jacobian, largest first; empty where it was not measured.
        notes: how things were measured, and what was skipped.
        directions: leading singular vectors of the first layer.
        depth: the modules in the order of the forward pass; empty where no data were given.
        looked_at: what was examined, in a few words each.
        not_looked_at: why something was not examined, by what it is.

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
    depth: list[Place] = field(default_factory=list)
    looked_at: list[str] = field(default_factory=list)
    not_looked_at: dict[str, str] = field(default_factory=dict)

    @property
    def status(self) -> Status:
        """`"bad"` if there is an error, else `"warning"` if there is a warning, else `"good"`."""
        severities = {finding.severity for finding in self.findings}
        return "bad" if "error" in severities else "warning" if "warning" in severities else "good"

    @property
    def verdict(self) -> str:
        """The number of errors and warnings and the first of them, or where no trouble was found; what was left out."""
        return f"{self.outcome} {self.left_out}".strip()

    @property
    def left_out(self) -> str:
        """What was not looked at and why, in one sentence; empty where nothing was left out."""
        told = "; ".join(f"{what} ({elide_words(why, _LONGEST_REASON)})" for what, why in self.not_looked_at.items())
        return f"Not looked at: {told}." if told else ""

    @property
    def outcome(self) -> str:
        """The verdict without what was left out."""
        counts = [(sum(f.severity == severity for f in self.findings), severity) for severity in ("error", "warning")]
        parts = [plural(count, severity) for count, severity in counts if count]
        if parts:
            return f"{', '.join(parts)}: {ranked(self.findings)[0].title.rstrip('.')}."
        remarks = f" ({plural(len(self.findings), 'remark')})" if self.findings else ""
        if not self.layers:
            return f"No trouble found{remarks}, but there were no layers to inspect."
        among = f" Looked at: {', '.join(self.looked_at)}." if self.looked_at else ""
        share = self.facts.get(COVERAGE, 1.0)
        if isinstance(share, float) and share < HALF:
            return f"No trouble found in what was measured: {100 * share:.0f} % of the parameters{remarks}.{among}"
        return f"No trouble found in {plural(len(self.layers), 'layer')}{remarks}.{among}"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dicts and lists that strict JSON can hold; NaN and infinity become `None`."""
        from .serial import report_to_dict

        return report_to_dict(self)

    def to_json(self, indent: int | None = None) -> str:
        """Return strict JSON (no NaN, no Infinity); the key `"gramian"` holds the schema's version."""
        from .serial import report_to_json

        return report_to_json(self, indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """Read a report that `to_json` wrote.

        A list item or a fact that was not finite comes back as NaN. Raises `InputError` where the text is not JSON, not
        a report, or of a newer schema.
        """
        from .serial import report_from_json

        return report_from_json(text)

    def to_dataframe(self) -> pandas.DataFrame:
        """Return a table of pandas with one row per layer, indexed by name.

        Raises `UnsupportedError` where pandas is not installed.
        """
        from .serial import layers_to_dataframe

        return layers_to_dataframe(self.layers)

    def to_document(self) -> Document:
        """Return the report as a page: the network by depth, findings, spectra, Jacobian, layers, notes."""
        from .compose import document_of

        return document_of(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.html` page or a `.json` file, by the suffix; the file is written completely or not at all.

        Raises `InputError` for another suffix, or where the folder is missing or cannot be written.
        """
        from .serial import save_report

        save_report(self, path)

    def __repr__(self) -> str:
        return f"<Report {self.title!r}: {self.verdict}>"

    def __str__(self) -> str:
        from .terminal import to_text

        return to_text(self, width=shutil.get_terminal_size((100, 24)).columns)  # COLUMNS, the terminal, or 100

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from .terminal import ReportView

        yield ReportView(self)

    def _repr_html_(self) -> str:
        from .html import frame

        return frame(self.to_document())


def plural(count: int, noun: str) -> str:
    """Return the count and its noun, in the plural where needed.

    >>> plural(1, "error"), plural(1200, "layer")
    ('1 error', '1,200 layers')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def elide_words(text: str, most: int) -> str:
    """Return the text, cut after a word where it is longer than `most` characters.

    >>> elide_words("one two three", 9), elide_words("one two", 9)
    ('one two …', 'one two')
    """
    return text if len(text) <= most else text[: most - 1].rpartition(" ")[0] + " …"


def causes_first(findings: Sequence[Finding]) -> list[tuple[Finding, list[Finding]]]:
    """Return the findings by rank, each with those that follow from it, which have no entry of their own.

    >>> causes_first([Finding("b", "info", "B", follows="a"), Finding("a", "error", "A")])[0][0].code
    'a'
    """
    causes = {f.code for f in findings if not f.follows}
    return [
        (cause, [f for f in findings if f.follows == cause.code])
        for cause in ranked(findings)
        if not cause.follows or cause.follows not in causes
    ]


def ranked(findings: Sequence[Finding]) -> list[Finding]:
    """Return errors, then warnings, then remarks; findings of one severity keep their order."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


# ---- pages ----------------------------------------------------------------------------------------------------------

Role = Literal["before", "after", "baseline", "accent", "muted", "auto"]


@dataclass(frozen=True)
class Series:
    """One curve of a picture.

    Args:
        label: for the legend.
        x, y: the points, of equal length.
        role: the curve's meaning, which fixes its color in all pictures.
        style: how it is drawn.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    role: Role = "auto"
    style: Literal["line", "points", "dashed", "bars", "area"] = "line"


@dataclass(frozen=True)
class Picture:
    """Curves over common axes.

    Values that are not finite, or not positive on a log axis, are left out, and a note counts them.

    Args:
        title: above the picture.
        series: the curves.
        x_label, y_label: of the axes.
        log_x, log_y: whether the axes are logarithmic.
        caption: a sentence or two below the title.
        reference: a horizontal line's height and its label.
        x_names: names of x = 0, 1, 2, …, written in place of the numbers.
    """

    title: str
    series: Sequence[Series]
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False
    caption: str = ""
    reference: tuple[float, str] | None = None
    x_names: Sequence[str] = ()


@dataclass(frozen=True)
class HeatMap:
    """Numbers as colors; heat maps that stand side by side share one color scale.

    Args:
        title: above the picture.
        values: `values[row][column]`; rows may have different lengths.
        x_label, y_label: of the columns and the rows.
        log: whether the color scale is logarithmic.
        caption: a sentence or two below the title.
        value_label: the quantity and its unit, written at the color bar.
    """

    title: str
    values: Sequence[Sequence[float]]
    x_label: str = ""
    y_label: str = ""
    log: bool = False
    caption: str = ""
    value_label: str = ""


@dataclass(frozen=True)
class Lane:
    """One quantity along the depth of a network, on a logarithmic axis.

    Args:
        label: what it is.
        series: label, role and values of each curve; `None` where a value is unknown.
        reference: a horizontal line's height.
    """

    label: str
    series: Sequence[tuple[str, Role, Sequence[float | None]]]
    reference: float | None = None


@dataclass(frozen=True)
class Depth:
    """A network from its input to its output, left to right: quantities one below the other, with places marked.

    Args:
        title: above the picture.
        names: of the places.
        lanes: the quantities.
        culprits: places that the first finding names.
        consequences: places of what follows from it.
        caption: a sentence or two below the title.
        x_label: what a place is.
    """

    title: str
    names: Sequence[str]
    lanes: Sequence[Lane]
    culprits: Sequence[int] = ()
    consequences: Sequence[int] = ()
    caption: str = ""
    x_label: str = "place in the forward pass"


Drawing = Picture | HeatMap | Depth


@dataclass(frozen=True)
class Detail:
    """What the page shows below a table's row when it is clicked.

    Args:
        title: above the details.
        facts: pairs of label and text.
        points: (x, y) of a curve, drawn on a logarithmic y axis.
        x_label, y_label: of the axes.
        reference: a horizontal line's height and its label.
    """

    title: str
    facts: Sequence[tuple[str, str]] = ()
    points: Sequence[tuple[float, float]] = ()
    x_label: str = ""
    y_label: str = ""
    reference: tuple[float, str] | None = None


@dataclass(frozen=True)
class Table:
    """A table of words and numbers; numbers are formatted and aligned right.

    Args:
        title: above the table.
        columns: headings.
        rows: one cell per column; `None` where a value is unknown.
        caption: a sentence or two below the title.
        emphasis: indices of rows that are marked.
        details: one entry per row, or none at all.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]
    caption: str = ""
    emphasis: Sequence[int] = ()
    details: Sequence[Detail] = ()


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, a text, and items in reading order.

    Args:
        heading: of the section.
        text: each line is a paragraph; lines that begin with "- " make a list.
        items: pictures, heat maps, tables and lists of findings; the members of a tuple stand side by side.
    """

    heading: str
    text: str = ""
    items: Sequence[Drawing | Table | Sequence[Finding] | tuple[Drawing | Table, ...]] = ()


def is_findings(item: object) -> bool:
    """Whether an item of a section is a list of findings, and not a tuple of items that stand side by side."""
    if isinstance(item, Drawing | Table) or not isinstance(item, Sequence):
        return False
    return all(isinstance(part, Finding) for part in item)


@dataclass(frozen=True)
class Tile:
    """A headline number at the top of a page.

    Args:
        label: what it is.
        value: as it is shown.
        remark: a few words below it.
        role: its meaning, which fixes its color.
    """

    label: str
    value: str
    remark: str = ""
    role: Role = "auto"


@dataclass
class Document:
    """A page: the verdict, headline numbers, then sections.

    Args:
        title: of the page.
        verdict: the result in one sentence.
        status: `"good"`, `"warning"` or `"bad"`.
        tiles: headline numbers.
        sections: in reading order.
        footer: small print at the end.
        left_out: what was not looked at and why, a sentence below the verdict.
    """

    title: str
    verdict: str
    status: Status = "good"
    tiles: list[Tile] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    footer: str = ""
    left_out: str = ""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page as one HTML file that needs no network.

        Raises `InputError` where it cannot be written.
        """
        from .html import save

        save(self, path)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from .terminal import DocumentView

        yield DocumentView(self)

    def _repr_html_(self) -> str:
        from .html import frame

        return frame(self)
