"""Reports and documents in a terminal: any width, with or without color, in Unicode or plain ASCII.

The views below are rich renderables: `console.print(ReportView(report, verbose=True))`. No text passes through rich's
markup, so a layer named `[red]` is shown as it is.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text

from .actions import Action
from .axes import shows
from .compose import main_section
from .document import Depth, Document, Drawing, HeatMap, Picture, Section, Status, Table, is_findings
from .findings import Finding, causes_first
from .formatting import number, plural
from .layer_table import layer_table, telling_rows
from .model import Report
from .sparklines import DepthView
from .spelling import Speller
from .tables import TableView

MOST_FINDINGS = 12  # shown unless verbose
MOST_ROWS = 24
MOST_PLACES = 24  # of a picture that is told point by point

_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "bold cyan"}
_SIGNS: dict[Status, tuple[str, str]] = {
    "good": ("✓", "bold green"),
    "warning": ("!", "bold yellow"),
    "bad": ("✗", "bold red"),
}


def show(item: Report | Document, console: Console | None = None, verbose: bool = False) -> None:
    """Print a report or a document to the terminal.

    Args:
        item: what to print.
        console: where to print it; stdout by default.
        verbose: show every finding and every layer.
    Raises: nothing of its own.
    Cost: milliseconds.
    Source: this library's own.

    >>> show(Report("net"), Console(width=80))
    net
    ✓ No trouble found, but there were no layers to inspect.
    """
    view = ReportView(item, verbose) if isinstance(item, Report) else DocumentView(item, verbose)
    with unpadded(console or Console()) as out:
        out.print(view)


@contextmanager
def unpadded(console: Console) -> Iterator[Console]:
    """A context in which what is printed to a file or a pipe has no blanks at its lines' ends.

    Args:
        console: where to print.

    >>> with unpadded(Console(width=20)) as out:
    ...     out.print("short ")
    short
    """
    if console.is_terminal:
        yield console
        return
    with console.capture() as capture:
        yield console
    console.file.write("".join(f"{line.rstrip(' ')}\n" for line in capture.get().splitlines()))


def to_text(item: Report | Document, width: int = 100, verbose: bool = False) -> str:
    """Return what `show` prints, without color.

    Args:
        item: the report or document.
        width: columns of the terminal.
        verbose: show every finding and every layer.
    Returns: the lines, joined by line ends.
    Raises: nothing of its own.
    Cost: milliseconds.
    Source: this library's own.

    >>> to_text(Report("net")).splitlines()[0]
    'net'
    """
    file = io.StringIO()
    console = Console(file=file, width=width, no_color=True, force_terminal=False, legacy_windows=False)
    show(item, console, verbose)
    return file.getvalue().rstrip("\n")


@dataclass(frozen=True)
class VerdictView:
    """The verdict in one sentence, after a sign for its status."""

    status: Status
    verdict: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        spell = Speller(options)
        sign, style = _SIGNS[self.status]
        line = Grid.grid(padding=(0, 1, 0, 0))
        line.add_column(no_wrap=True)
        line.add_column(overflow="fold")
        line.add_row(Text(spell(sign), style), Text(spell(self.verdict), "bold"))
        yield line


@dataclass(frozen=True)
class FindingsView:
    """Causes by rank: title, code, where, evidence, cause, remedy, what follows; with `verbose`, the source."""

    findings: Sequence[Finding]
    verbose: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        spell = Speller(options)
        causes = causes_first(self.findings)
        shown = causes if self.verbose else causes[:MOST_FINDINGS]
        grid = Grid.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for place, (finding, after) in enumerate(shown):
            if place:
                grid.add_row("", "")
            style = _STYLES[finding.severity]
            grid.add_row(Text(finding.severity, style), Text(spell(finding.title), "bold"))
            rows = [(field, Text(spell(getattr(finding, field)))) for field in ("code", "where", "evidence", "cause")]
            code = Text(spell.lines(_typed(finding.action, options.max_width)), "cyan") if finding.action else Text()
            rows += [("remedy", code), ("advice" if code else "remedy", Text(spell.lines(finding.advice)))]
            if finding.rehearsal:
                rows.append(("verified", Text(spell(finding.rehearsal.told))))
            if self.verbose:
                rows.append(("source", Text(spell(finding.source))))
            for field, text in rows:
                if text:
                    grid.add_row(Text(field, "dim"), text)
            for number_, one in enumerate(after):
                told = f"{one.title} ({one.evidence})" if self.verbose and one.evidence else one.title
                grid.add_row(Text("" if number_ else "leads to", "dim"), Text(spell(told)))
        yield grid
        if len(shown) < len(causes):
            yield Text(f"{plural(len(causes) - len(shown), 'more finding')} (verbose shows all).", "dim")


@dataclass(frozen=True)
class LayersView:
    """The layers of a report: all if they are few or `verbose`, else the most informative ones."""

    report: Report
    verbose: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = None
        if not self.verbose and _are_many(self.report.layers):
            rows = telling_rows(self.report.layers, self.report.findings, MOST_ROWS)
        yield TableView(layer_table(self.report.layers, self.report.findings), rows, "layer")


@dataclass(frozen=True)
class ReportView:
    """A whole report: title, verdict, facts, picture by depth, findings, layers, notes; if long, the verdict again."""

    report: Report
    verbose: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = list(self._parts(Speller(options)))
        yield from parts
        verdict = parts[1]
        if len(console.render_lines(Group(*parts), options, pad=False)) > console.size.height:
            yield ""
            yield verdict

    def _parts(self, spell: Speller) -> Iterator[RenderableType]:
        report = self.report
        yield Text(spell(report.title), "dim")
        yield VerdictView(report.status, report.verdict)
        if report.facts:
            yield ""
            yield _pairs([(spell(label), spell(number(value))) for label, value in report.facts.items()])
        picture = main_section(report)
        if picture is not None:
            yield ""
            yield from (DepthView(item) for item in picture.items if isinstance(item, Depth))
        if report.findings:
            yield ""
            yield FindingsView(report.findings, self.verbose)
        if report.layers:
            yield ""
            yield LayersView(report, self.verbose)
        if report.not_looked_at:
            yield ""
            yield Text("Not looked at", "dim")
            yield _pairs([(spell(what), spell(why)) for what, why in report.not_looked_at.items()])
        if report.notes:
            yield ""
            yield from (_bullet(spell(" ".join(note.split()))) for note in report.notes)


@dataclass(frozen=True)
class DocumentView:
    """A document: verdict, headline numbers, and each section's text, findings, tables, and curves as numbers."""

    document: Document
    verbose: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        spell = Speller(options)
        yield Text(spell(self.document.title), "dim")
        yield VerdictView(self.document.status, f"{self.document.verdict} {self.document.left_out}".strip())
        if self.document.tiles:
            yield ""
            remarks = [f" ({tile.remark})" if tile.remark else "" for tile in self.document.tiles]
            tiles = zip(self.document.tiles, remarks, strict=True)
            yield _pairs([(spell(tile.label), spell(tile.value + remark)) for tile, remark in tiles])
        for section in self.document.sections:
            yield ""
            yield Text(spell(section.heading), "bold")
            for line in section.text.split("\n"):
                if line.strip():
                    yield _bullet(spell(line[2:])) if line.startswith("- ") else Text(spell(line), overflow="fold")
            for item in _items(section):
                yield Padding(_item_view(item, spell, self.verbose), (1, 0, 0, 2))
        if self.document.footer:
            yield ""
            yield Text(spell(self.document.footer), "dim")


def _are_many(rows: Sequence[Any]) -> bool:
    """Whether rows are hidden: where these are few, the line that tells of them saves nothing."""
    return len(rows) > MOST_ROWS * 5 // 4


def _typed(action: Action, width: int) -> str:
    """The action's code as it can be typed: a command that is wider than the terminal goes on after a backslash."""
    longest = max(map(len, action.code.split("\n"))) + 10
    if action.is_command and longest > width and not {"'", '"'} & set(action.code):
        return action.code.replace(" --", " \\\n  --")
    return action.code


def _items(section: Section) -> Iterator[Drawing | Table | Sequence[Finding]]:
    for item in section.items:
        if isinstance(item, Drawing | Table) or is_findings(item):
            yield item  # type: ignore[misc]
        else:
            yield from item  # type: ignore[misc]


def _item_view(item: Drawing | Table | Sequence[Finding], spell: Speller, verbose: bool) -> RenderableType:
    if isinstance(item, Table):
        rows = range(MOST_ROWS) if _are_many(item.rows) and not verbose else None
        return _titled(item.title, TableView(item, rows), spell)
    if isinstance(item, HeatMap):
        return Text(spell(f"{item.title}: a heat map, shown in the HTML page."), "dim")
    if isinstance(item, Depth):
        return DepthView(item)
    if isinstance(item, Picture):
        return _titled(item.title, TableView(_in_numbers(item)), spell)
    return FindingsView(item, verbose)


def _titled(title: str, view: TableView, spell: Speller) -> RenderableType:
    return Group(Text(spell(title), "bold dim"), view) if title else view


def _in_numbers(picture: Picture) -> Table:
    """A picture as a table: every point of one with few, and else where each curve begins, ends, and its extremes."""
    places = sorted({float(x) for series in picture.series for x in series.x}, reverse=True)
    if len(places) <= MOST_PLACES and not picture.x_names:
        labels = [series.label or picture.y_label or picture.title for series in picture.series]
        points = [dict(zip(map(float, series.x), map(float, series.y), strict=True)) for series in picture.series]
        told = [[x, *(one.get(x) for one in points)] for x in places]
        if picture.reference is not None:
            told.append([picture.reference[1], float(picture.reference[0]), *[None] * (len(points) - 1)])
        return Table("", (picture.x_label or "place", *labels), told)
    rows: list[list[str | float | int | None]] = []
    for series in picture.series:
        ys = [float(y) for y in series.y if shows(float(y), picture.log_y)]
        rows.append([series.label or picture.title, *((ys[0], min(ys), max(ys), ys[-1]) if ys else (None,) * 4)])
    if picture.reference is not None:
        rows.append([picture.reference[1], "", "", "", float(picture.reference[0])])
    return Table("", (picture.y_label or "series", "first", "least", "greatest", "last"), rows)


def _pairs(pairs: Sequence[tuple[str, str]]) -> Grid:
    grid = Grid.grid(padding=(0, 2, 0, 0))
    grid.add_column(overflow="fold")
    grid.add_column(overflow="fold")
    for label, value in pairs:
        grid.add_row(Text(label, "dim"), Text(value))
    return grid


def _bullet(text: str) -> Grid:
    grid = Grid.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text("-", "dim"), Text(text))
    return grid
