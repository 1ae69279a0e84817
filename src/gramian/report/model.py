"""What a report says, as plain data: no tensors, no models, nothing that draws.

Two levels. `Report` is the result of `gramian.inspect`: findings and one `Layer` for each block. `Document` is what is
shown: sections of pictures, tables and findings in reading order. A report becomes a document; the demo composes a
longer one. Terminal, HTML and JSON all render these classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or worth knowing: where, how much, why, and what to do.

    `code` is stable and may be matched by programs (`"gain-below-one"`); `where` names the layers; `evidence` holds the
    numbers with their interval; `remedy` is a line of code or a command, or empty where there is none.
    """

    code: str
    severity: Severity
    title: str
    where: str = ""
    evidence: str = ""
    cause: str = ""
    remedy: str = ""
    source: str = ""


@dataclass(frozen=True)
class Layer:
    """One matrix of the network. Unknown numbers are `None`; lengths and counts are in elements.

    `gain` is χ, the mean squared singular value of the Jacobian from this block's input to the next block's input;
    `activation_rms` is of the block's input and `gradient_rms` of the loss's gradient at its output, per unit.
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


@dataclass
class Report:
    """What `gramian.inspect` found: ranked findings, one row per layer in forward order, and model-wide facts.

    `jacobian` holds the singular values of the end-to-end Jacobian, largest first (empty where it was not measured).
    `facts` are model-wide numbers and words by label; `notes` say what was skipped and how things were measured.
    """

    title: str
    findings: list[Finding] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    facts: dict[str, float | int | str] = field(default_factory=dict)
    jacobian: tuple[float, ...] = ()
    notes: list[str] = field(default_factory=list)


# ---- what is shown -------------------------------------------------------------------------------------------------

Role = Literal["before", "after", "baseline", "accent", "muted", "auto"]


@dataclass(frozen=True)
class Series:
    """One curve: `x` and `y` of equal length. `role` picks a colour by meaning and keeps it the same in all pictures."""

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


@dataclass(frozen=True)
class HeatMap:
    """`values[row][column]` as colour; rows may have different lengths. Several heat maps in one row share a scale."""

    title: str
    values: Sequence[Sequence[float]]
    x_label: str = ""
    y_label: str = ""
    log: bool = False
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """Cells are strings or numbers (numbers are aligned right and formatted); `emphasis` marks rows by index."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]
    caption: str = ""
    emphasis: Sequence[int] = ()


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, and items in reading order. A tuple of items stands side by side (before, after)."""

    heading: str
    text: str = ""
    items: Sequence[Picture | HeatMap | Table | Sequence[Finding] | tuple[Picture | HeatMap | Table, ...]] = ()


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
    status: Literal["good", "warning", "bad"] = "good"
    tiles: list[Tile] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    footer: str = ""
