"""A page as plain data: sections of pictures, tables and findings in reading order.

Terminal and HTML both render these classes; nothing here draws.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from .findings import Finding

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderResult

Status = Literal["good", "warning", "bad"]

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
        row_names: what the rows are called, shown at the pointer.
    """

    title: str
    values: Sequence[Sequence[float]]
    x_label: str = ""
    y_label: str = ""
    log: bool = False
    caption: str = ""
    value_label: str = ""
    row_names: Sequence[str] = ()


@dataclass(frozen=True)
class Lane:
    """One quantity along the depth of a network, on a logarithmic axis.

    Args:
        label: what it is.
        series: label, role and values of each curve; `None` where a value is unknown.
        reference: a horizontal line's height.
        hues: number of hues that stand for other things in the lanes beside it.
    """

    label: str
    series: Sequence[tuple[str, Role, Sequence[float | None]]]
    reference: float | None = None
    hues: int = 0


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

    def figures(self) -> dict[str, Figure]:
        """Return the pictures as matplotlib's figures, by title, to change or to save (`figure.savefig`)."""
        from .figures import figures_of

        return figures_of(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from .terminal import DocumentView

        yield DocumentView(self)

    def _repr_html_(self) -> str:
        from .html import frame

        return frame(self)
