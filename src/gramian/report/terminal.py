"""Reports and documents in a terminal: any width, with or without color, in Unicode or plain ASCII.

The views below are rich renderables: `console.print(ReportView(report, verbose=True))`. No text passes through rich's
markup, so a layer named `[red]` is shown as it is.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text

from .axes import shows
from .compose import layer_table, telling_rows
from .formatting import elide, number, shorten, visible
from .model import Document, Finding, HeatMap, Picture, Report, Section, Status, Table, is_findings, plural, ranked

if TYPE_CHECKING:
    from .model import Drawing

MOST_FINDINGS = 12  # shown unless verbose
MOST_ROWS = 24

_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "bold cyan"}
_SIGNS: dict[Status, tuple[str, str]] = {
    "good": ("✓", "bold green"),
    "warning": ("!", "bold yellow"),
    "bad": ("✗", "bold red"),
}
# Columns by importance: a narrow terminal drops the last of these first, and never the table's first column.
_PRIORITY = (
    *("σ", "‖ΔW‖ / ‖W‖", "gain χ", "gradient", "activation", "condition", "shape", "σ max", "stable rank", "rank 90 %"),
    *("above noise", "rank", "conv norm", "rank 99 %", "same as", "p", "tail α", "zeros"),
    *("kind", "parameters", "note", "effective rank", "‖W‖_F", "dtype"),
)
_GAP = 2
_LEAST_NAME = 18
_MOST_WORD = 40  # cells of words other than the name

_SPELLED = str.maketrans(
    dict(
        pair.split("=", 1)
        for pair in (
            *("…=...", "×=x", "–=-", "—=-", "−=-", "→=->", "≥=>=", "≤=<=", "≈=~", "±=+/-", "√=sqrt", "‖=||", "·=*"),
            *("χ=chi", "σ=sigma", "ξ=xi", "λ=lambda", "κ=kappa", "η=eta", "Θ=Theta", "Δ=Delta", "Σ=sum ", "∇=grad "),
            *("‘='", "’='", '“="', '”="', "✓=ok", "✗=x"),
        )
    )
)


def ascii_text(text: str) -> str:
    r"""Spell a text in ASCII.

    >>> ascii_text("gain χ ≥ 1, 3×3, 10⁻³, naïve, 中")
    'gain chi >= 1, 3x3, 10-3, naive, \\u4e2d'
    """
    if text.isascii():
        return text
    letters = []
    for char in text.translate(_SPELLED):
        if not char.isascii():
            plain = unicodedata.normalize("NFKD", char).translate(_SPELLED).encode("ascii", "ignore").decode()
            char = plain or char.encode("unicode_escape").decode("ascii")
        letters.append(char)
    return "".join(letters)


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
    (console or Console()).print(view)


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
    console = Console(file=io.StringIO(), width=width, no_color=True, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        show(item, console, verbose)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


class _Speller:
    """Makes texts safe for the console: control characters escaped, and ASCII where it has no Unicode."""

    def __init__(self, options: ConsoleOptions) -> None:
        self.ascii = options.ascii_only

    def __call__(self, text: object) -> str:
        shown = visible(text)
        return ascii_text(shown) if self.ascii else shown

    def lines(self, text: str) -> str:
        return "\n".join(self(line) for line in text.split("\n"))


@dataclass(frozen=True)
class VerdictView:
    """The verdict in one sentence, after a sign for its status."""

    status: Status
    verdict: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        spell = _Speller(options)
        sign, style = _SIGNS[self.status]
        line = Grid.grid(padding=(0, 1, 0, 0))
        line.add_column(no_wrap=True)
        line.add_column(overflow="fold")
        line.add_row(Text(spell(sign), style), Text(spell(self.verdict), "bold"))
        yield line


@dataclass(frozen=True)
class FindingsView:
    """Findings by rank: severity and title, then where, evidence, cause and remedy; with `verbose`, the source too."""

    findings: Sequence[Finding]
    verbose: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        spell = _Speller(options)
        findings = ranked(self.findings)
        shown = findings if self.verbose else findings[:MOST_FINDINGS]
        grid = Grid.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for place, finding in enumerate(shown):
            if place:
                grid.add_row("", "")
            style = _STYLES[finding.severity]
            grid.add_row(Text(finding.severity, style), Text(spell(finding.title), "bold"))
            rows = [(field, Text(spell(getattr(finding, field)))) for field in ("where", "evidence", "cause")]
            code = Text(spell.lines(finding.action.code), "cyan") if finding.action else Text()
            rows += [("remedy", code), ("" if code else "remedy", Text(spell.lines(finding.advice)))]
            if self.verbose:
                rows.append(("source", Text(spell(finding.source))))
            for field, text in rows:
                if text:
                    grid.add_row(Text(field, "dim"), text)
        yield grid
        if len(shown) < len(findings):
            yield Text(f"{plural(len(findings) - len(shown), 'more finding')} (verbose shows all).", "dim")


@dataclass(frozen=True)
class TableView:
    """A table that fits the terminal: less important columns are dropped, long names shortened; `rows` selects rows."""

    table: Table
    rows: Sequence[int] | None = None
    noun: str = "row"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        spell = _Speller(options)
        picked = range(len(self.table.rows)) if self.rows is None else self.rows
        cells = [[spell(number(value)) for value in self.table.rows[i]] for i in picked]
        heads = [spell(column) for column in self.table.columns]
        if not heads:
            return
        widths = [max([cell_len(head), *(cell_len(row[c]) for row in cells)]) for c, head in enumerate(heads)]
        widths[1:] = [min(width, max(_MOST_WORD, cell_len(heads[c]))) for c, width in enumerate(widths)][1:]
        kept = _fitting(self.table.columns, widths, options.max_width)
        mark = "..." if spell.ascii else "…"
        grid = Grid(box=None, show_edge=False, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="dim")
        taken = sum(widths[c] for c in kept[1:]) + _GAP * (len(kept) - 1)
        widths[kept[0]] = max(min(widths[kept[0]], options.max_width - taken), 1)
        for c in kept:
            values = [row[c] for row in self.table.rows if row[c] is not None]
            numeric = any(not isinstance(value, str) for value in values)
            grid.add_column(
                Text(elide(heads[c], widths[c], mark)), width=widths[c], no_wrap=True, overflow="crop",
                justify="right" if numeric else "left",
            )  # fmt: skip
        emphasis = set(self.table.emphasis)
        names = shorten([row[0] for row in cells], widths[0], mark)
        for index, name, row in zip(picked, names, cells, strict=True):
            style = "yellow" if index in emphasis else ""
            row = [name, *row[1:]]
            grid.add_row(*(Text(elide(row[c], widths[c], mark), style if c == kept[0] else "") for c in kept))
        yield grid
        hidden = []
        if len(cells) < len(self.table.rows):
            count = len(self.table.rows) - len(cells)
            hidden.append(f"{count:,} of {plural(len(self.table.rows), self.noun)} (verbose shows all)")
        if len(kept) < len(heads):
            hidden.append(f"{plural(len(heads) - len(kept), 'column')} (a wider terminal shows more)")
        if hidden:
            yield Text(f"Hidden: {', '.join(hidden)}.", "dim")


def _fitting(columns: Sequence[str], widths: Sequence[int], width: int) -> list[int]:
    """Return the columns that fit beside a readable name, in the table's order."""
    kept = [0]
    taken = min(widths[0], _LEAST_NAME)
    order = sorted(range(1, len(columns)), key=lambda c: (_rank(columns[c]), c))
    for c in order:
        if taken + _GAP + widths[c] <= width:
            taken += _GAP + widths[c]
            kept.append(c)
    return sorted(kept)


def _rank(column: str) -> int:
    return _PRIORITY.index(column) if column in _PRIORITY else 0


@dataclass(frozen=True)
class LayersView:
    """The layers of a report: all if they are few or `verbose`, else the most informative ones."""

    report: Report
    verbose: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = None
        if not self.verbose and len(self.report.layers) > MOST_ROWS:
            rows = telling_rows(self.report.layers, self.report.findings, MOST_ROWS)
        yield TableView(layer_table(self.report.layers, self.report.findings), rows, "layer")


@dataclass(frozen=True)
class ReportView:
    """A whole report: title, verdict, facts, findings, layers, notes."""

    report: Report
    verbose: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        spell = _Speller(options)
        report = self.report
        yield Text(spell(report.title), "dim")
        yield VerdictView(report.status, report.verdict)
        if report.facts:
            yield ""
            yield _pairs([(spell(label), spell(number(value))) for label, value in report.facts.items()])
        if report.findings:
            yield ""
            yield FindingsView(report.findings, self.verbose)
        if report.layers:
            yield ""
            yield LayersView(report, self.verbose)
        if report.notes:
            yield ""
            yield from (_bullet(spell(" ".join(note.split()))) for note in report.notes)


@dataclass(frozen=True)
class DocumentView:
    """A document: verdict, headline numbers, and each section's text, findings, tables, and curves as numbers."""

    document: Document
    verbose: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        spell = _Speller(options)
        yield Text(spell(self.document.title), "dim")
        yield VerdictView(self.document.status, self.document.verdict)
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


def _items(section: Section) -> Iterator[Drawing | Table | Sequence[Finding]]:
    for item in section.items:
        if isinstance(item, Picture | HeatMap | Table) or is_findings(item):
            yield item  # type: ignore[misc]
        else:
            yield from item  # type: ignore[misc]


def _item_view(item: Drawing | Table | Sequence[Finding], spell: _Speller, verbose: bool) -> RenderableType:
    if isinstance(item, Table):
        rows = range(MOST_ROWS) if len(item.rows) > MOST_ROWS and not verbose else None
        return _titled(item.title, TableView(item, rows), spell)
    if isinstance(item, HeatMap):
        return Text(spell(f"{item.title}: a heat map, shown in the HTML page."), "dim")
    if isinstance(item, Picture):
        return _titled(item.title, TableView(_in_numbers(item)), spell)
    return FindingsView(item, verbose)


def _titled(title: str, view: TableView, spell: _Speller) -> RenderableType:
    return Group(Text(spell(title), "bold dim"), view) if title else view


def _in_numbers(picture: Picture) -> Table:
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
