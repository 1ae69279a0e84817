"""A document as one HTML file that opens from disk, needs no network, and escapes every text.

>>> from gramian.report import Document
>>> render(Document("A <b>title</b>", "No trouble found."))[:15]
'<!doctype html>'
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import count
from numbers import Real
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from gramian.errors import InputError

from . import heatmaps
from .canvas import drawing_settings
from .depth import draw_depth, lane_legend, read_out
from .document import Depth, Detail, Document, Drawing, HeatMap, Section, Table, is_findings
from .files import write_text
from .findings import SEVERITIES, Finding, causes_first
from .formatting import number, plural, visible
from .heatmaps import draw_heat_map, shared_scale
from .pictures import Drawn, draw_picture

if TYPE_CHECKING:
    from jinja2 import Template

WIDE, HALF = 960.0, 430.0  # drawing widths: alone on a wide page; beside another, or on a telephone
NARROW = 360.0  # the network by depth, whose texts are small, on a telephone
ROWS_AT_FIRST = 40  # a longer table opens at a click; all rows are in the page
FINDINGS_OPEN = 6  # findings after these begin folded
FINDINGS_TOOLS = 4  # from so many on they can be filtered


def render(document: Document) -> str:
    """Return a document as one HTML page, with its style, script and pictures inside.

    The same document always gives the same text. Every text is escaped, and the page's policy lets no script run but
    its own.

    Args:
        document: the page's content.
    Returns: the HTML.
    Raises:
        InputError: a table whose rows do not fit its columns, or a curve whose x and y differ in length.
    Cost: about 0.1 s per picture.
    Source: this library's own.

    >>> render(Document("A title", "No trouble found."))[:15]
    '<!doctype html>'
    """
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    identifiers = count(1)
    with drawing_settings():
        sections = [
            {"section": section, "paragraphs": list(_paragraphs(section.text)), "items": _items(section, identifiers)}
            for section in document.sections
        ]
    page = _template().render(
        document=document,
        sections=sections,
        css=Markup(_asset("page.css")),
        script=Markup(script),
        # The page's own script may run and no other, should a name ever get through the escaping.
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'",
        rows_at_first=ROWS_AT_FIRST,
        findings_open=FINDINGS_OPEN,
        findings_tools=FINDINGS_TOOLS,
    )
    return page.lstrip() + "\n"


def save(document: Document, path: str | os.PathLike[str]) -> None:
    """Write a document as one HTML file, atomically.

    Args:
        document: the page's content.
        path: the file to write.
    Raises:
        InputError: the folder is missing or cannot be written to; or as `render`.
    Cost: as `render`.
    Source: this library's own.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(Document("A title", "No trouble found."), f"{folder}/report.html")
    """
    write_text(path, render(document))


def frame(document: Document) -> str:
    """Return the page inside an `<iframe>`, which keeps a notebook's styles and the page's apart."""
    style = "width:100%;height:720px;border:1px solid #8884;border-radius:8px"
    attributes = f'style="{style}" title="{escape(visible(document.title))}"'
    return f'<iframe sandbox="allow-scripts" {attributes} srcdoc="{escape(render(document))}"></iframe>'


# ---- from items to what the template shows -------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text and, where it is a number, the key that it is sorted by ("" for unknown)."""

    text: str
    key: str | None


@dataclass(frozen=True)
class Figure:
    """A drawing in one or two widths, or a table as cells; the fields of the other kind are empty."""

    item: Drawing | Table
    half: Drawn | None = None
    wide: Drawn | None = None
    numeric: Sequence[bool] = ()  # by column
    rows: Sequence[Sequence[Cell]] = ()

    @property
    def details(self) -> list[dict[str, Any]]:
        """The details of a table's rows for JSON; control characters are escaped here, not by the template."""
        return [_detail(detail) for detail in self.item.details] if isinstance(self.item, Table) else []

    @property
    def depth(self) -> dict[str, Any] | None:
        """What the picture by depth shows at the pointer."""
        return read_out(self.item) if isinstance(self.item, Depth) else None

    @property
    def cells(self) -> dict[str, Any] | None:
        """What a heat map shows at the pointer."""
        return heatmaps.read_out(self.item) if isinstance(self.item, HeatMap) else None

    @property
    def legends(self) -> list[tuple[str, list[tuple[str, str, str]]]]:
        """The lanes of a picture by depth that have several curves, each with label, color and style of the curves.

        Lanes whose curves are called and colored alike have one legend together, without a name.
        """
        lanes = self.item.lanes if isinstance(self.item, Depth) else []
        found = {lane.label: [(label, color, "line") for label, color in lane_legend(lane) if label] for lane in lanes}
        different = {tuple(curves): lane for lane, curves in found.items() if curves}
        return [(lane if len(different) > 1 else "", list(curves)) for curves, lane in different.items()]

    @property
    def kind(self) -> str:
        return "table" if isinstance(self.item, Table) else "figure"

    @property
    def notes(self) -> list[str]:
        return self.half.notes if self.half is not None else []


def _items(section: Section, identifiers: Iterator[int]) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    for item in section.items:
        if isinstance(item, Drawing | Table):
            shown.append({"kind": "one", "figures": _figures((item,), identifiers, alone=True)})
        elif is_findings(item):
            findings: Sequence[Finding] = item  # type: ignore[assignment]
            cards = causes_first(findings)
            counts = [(severity, sum(card.severity == severity for card, _ in cards)) for severity in SEVERITIES]
            counts = [(s, f"{count} info" if s == "info" else plural(count, s)) for s, count in counts if count]
            shown.append({"kind": "findings", "findings": cards, "counts": counts})
        else:
            side_by_side: tuple[Drawing | Table, ...] = tuple(item)  # type: ignore[arg-type]
            alone = len(side_by_side) == 1
            shown.append({"kind": "row", "figures": _figures(side_by_side, identifiers, alone=alone)})
    return shown


def _figures(items: Sequence[Drawing | Table], identifiers: Iterator[int], alone: bool) -> list[Figure]:
    heat_maps = [item for item in items if isinstance(item, HeatMap)]
    # Heat maps side by side share a scale, but a linear and a logarithmic one cannot.
    scales = {log: shared_scale([h for h in heat_maps if h.log is log]) for log in {h.log for h in heat_maps}}
    figures: list[Figure] = []
    for item in items:
        if isinstance(item, Table):
            figures.append(_cells(item))
            continue
        drawn = []
        half = NARROW if isinstance(item, Depth) else HALF
        for width in (half, WIDE) if alone else (half,):
            prefix = f"p{next(identifiers)}-"
            height = 280.0 if width == HALF else 330.0
            if isinstance(item, Depth):
                drawn.append(Drawn(draw_depth(item, width)))
            elif isinstance(item, HeatMap):
                drawn.append(draw_heat_map(item, prefix, scales[item.log], width, height))
            else:
                drawn.append(draw_picture(item, prefix, width, height))
        figures.append(Figure(item, drawn[0], drawn[1] if alone else None))
    return figures


def _paragraphs(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield ("p", [paragraph]) and ("ul", items): each line is a paragraph, lines that begin with "- " a list."""
    bullets: list[str] = []
    for line in [*text.split("\n"), ""]:
        if line.startswith("- "):
            bullets.append(line[2:])
            continue
        if bullets:
            yield "ul", bullets
            bullets = []
        if line.strip():
            yield "p", [line]


def _cells(table: Table) -> Figure:
    for place, row in enumerate(table.rows):
        if len(row) != len(table.columns):
            raise InputError(
                f"table {table.title!r}: row {place} has {len(row)} cells and the table {len(table.columns)} columns. "
                "Give one cell per column; None where a value is unknown."
            )
    numeric = [any(_is_number(row[c]) for row in table.rows) for c in range(len(table.columns))]
    rows = [[_cell(value, of) for value, of in zip(row, numeric, strict=True)] for row in table.rows]
    return Figure(table, numeric=numeric, rows=rows)


def _detail(detail: Detail) -> dict[str, Any]:
    return {
        "title": visible(detail.title),
        "facts": [[visible(label), visible(value)] for label, value in detail.facts],
        "points": [[x, float(f"{y:.4g}")] for x, y in detail.points if math.isfinite(y)],
        "x": visible(detail.x_label),
        "y": visible(detail.y_label),
        "reference": detail.reference and [float(f"{detail.reference[0]:.4g}"), visible(detail.reference[1])],
    }


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _cell(value: Any, numeric: bool) -> Cell:
    """A value as it is shown, and what it is sorted by; one that is not known stands as the others of its column do."""
    if value is None:
        return Cell(number(value), "" if numeric else None)
    if not _is_number(value):
        return Cell(number(value), None)
    key = float(value)
    return Cell(number(value), "" if math.isnan(key) else repr(key))


def _prose(text: str) -> str:
    """Keep a number and its percent sign on one line."""
    return re.sub(r"(?<=\d) %", "\u00a0%", text)


def _dotted(text: str) -> Markup:
    """Let a dotted name be broken after its dots, which a browser prefers to breaking within a word."""
    return Markup(".<wbr>").join(escape(visible(part)) for part in text.split("."))


def _finalize(value: Any) -> Any:
    """Escape control characters in every expression of the template, except line ends, which code needs."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return "\n".join(visible(line) for line in value.split("\n"))


@cache
def _asset(name: str) -> str:
    return files(__package__ or "gramian.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_finalize
    )
    environment.filters["prose"] = _prose
    environment.filters["dotted"] = _dotted
    environment.filters["markup"] = Markup  # for SVG only, whose text its writer has escaped
    return environment.from_string(_asset("page.html"))
