"""Tables in a terminal of any width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as Grid
from rich.text import Text

from .document import Table
from .formatting import abbreviate, elide, number, plural
from .layer_table import NOTE
from .spelling import Speller

__all__ = ["TableView"]

# Columns by importance: a narrow terminal drops the last of these first, and never the table's first column.
_PRIORITY = (
    *("σ", "‖ΔW‖ / ‖W‖", "gain χ", "gradient", "input rms", "condition", "shape", "σ max", "stable rank", "rank 90 %"),
    *("above noise", "rank", "conv norm", "rank 99 %", "same as", "p", "tail α", "zeros"),
    *("kind", "parameters", "note", "effective rank", "‖W‖_F", "dtype"),
)
_GAP = 2
_LEAST_NAME = 18  # cells, or half of the line where names are that long: a name says more than one more number
_MOST_WORD = 40  # cells of words other than the name


@dataclass(frozen=True)
class TableView:
    """A table that fits the terminal: less important columns are dropped, long names shortened; `rows` selects rows.

    Notes that do not fit are numbered, and stand under the table.
    """

    table: Table
    rows: Sequence[int] | None = None
    noun: str = "row"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        spell = Speller(options)
        picked = range(len(self.table.rows)) if self.rows is None else self.rows
        cells = [[spell(number(value)) for value in self.table.rows[i]] for i in picked]
        heads = [spell(column) for column in self.table.columns]
        if not heads:
            return
        kept, widths = _fit(self.table.columns, heads, cells, options.max_width)
        notes: list[str] = []
        note = self.table.columns.index(NOTE) if NOTE in self.table.columns else 0
        if note and (note not in kept or any(cell_len(row[note]) > widths[note] for row in cells)):
            notes = list(dict.fromkeys(row[note] for row in cells if row[note]))
            for row in cells:
                row[note] = str(notes.index(row[note]) + 1) if row[note] else ""
            kept, widths = _fit(self.table.columns, heads, cells, options.max_width, always=note)
        mark = "..." if spell.ascii else "…"
        grid = Grid(box=None, show_edge=False, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="dim")
        for c in kept:
            values = [row[c] for row in self.table.rows if row[c] is not None]
            numeric = any(not isinstance(value, str) for value in values)
            grid.add_column(
                Text(_elide(heads[c], widths[c], mark)), width=widths[c], no_wrap=True, overflow="crop",
                justify="right" if numeric else "left",
            )  # fmt: skip
        emphasis = set(self.table.emphasis)
        names = _distinct([row[0] for row in cells], [self.table.rows[i][0] for i in picked], widths[0], mark)
        for index, name, row in zip(picked, names, cells, strict=True):
            style = "yellow" if index in emphasis else ""
            row = [name, *row[1:]]
            grid.add_row(*(Text(_elide(row[c], widths[c], mark), style if c == kept[0] else "") for c in kept))
        yield grid
        if notes:
            footnotes = Grid.grid(padding=(0, 1, 0, 0))
            footnotes.add_column(justify="right", no_wrap=True)
            footnotes.add_column(overflow="fold")
            for place, text in enumerate(notes, start=1):
                footnotes.add_row(Text(f"note {place}:", "dim"), Text(text))
            yield footnotes
        hidden = []
        if len(cells) < len(self.table.rows):
            count = len(self.table.rows) - len(cells)
            hidden.append(f"{count:,} of {plural(len(self.table.rows), self.noun)} (verbose shows all)")
        if len(kept) < len(heads):
            hidden.append(f"{plural(len(heads) - len(kept), 'column')} (a wider terminal shows more)")
        if hidden:
            yield Text(f"Hidden: {', '.join(hidden)}.", "dim")


def _fit(
    columns: Sequence[str], heads: Sequence[str], cells: Sequence[Sequence[str]], width: int, always: int = 0
) -> tuple[list[int], list[int]]:
    """Return the columns that fit beside a readable name, in the table's order, and the widths of all columns."""
    widths = [max([cell_len(head), *(cell_len(row[c]) for row in cells)]) for c, head in enumerate(heads)]
    widths[1:] = [min(width, max(_MOST_WORD, cell_len(heads[c]))) for c, width in enumerate(widths)][1:]
    kept = [0]
    taken = min(widths[0], max(_LEAST_NAME, width // 2))
    order = sorted(range(1, len(columns)), key=lambda c: (c != always, _rank(columns[c]), c))
    for c in order:
        if taken + _GAP + widths[c] <= width:
            taken += _GAP + widths[c]
            kept.append(c)
    taken = sum(widths[c] for c in kept[1:]) + _GAP * (len(kept) - 1)
    widths[0] = max(min(widths[0], width - taken), 1)
    return sorted(kept), widths


def _elide(text: str, width: int, mark: str) -> str:
    """Shorten a text in its middle to a number of cells, of which a letter may take two."""
    length = width
    while cell_len(short := elide(text, length, mark)) > width and length > 0:
        length -= 1
    return short


def _distinct(names: Sequence[str], values: Sequence[object], width: int, mark: str) -> list[str]:
    """Shorten names to a width so that no two different values read the same; where they would, a row's number follows.

    Parts of a dotted name become initials first, since names cut in their middle would often look the same.
    """
    short = [_elide(abbreviate(name, width), width, mark) for name in names]
    meant: dict[str, set[str]] = {}
    for text, value in zip(short, values, strict=True):
        meant.setdefault(text, set()).add(str(value))
    taken = {text for text, different in meant.items() if len(different) == 1}
    for place, text in enumerate(short):
        if len(meant[text]) > 1:
            number_ = place + 1
            while (tagged := _with_number(names[place], number_, width, mark)) in taken and number_ < 10**6:
                number_ += len(names)
            taken.add(tagged)
            short[place] = tagged
    return short


def _with_number(name: str, place: int, width: int, mark: str) -> str:
    tag = f" #{place}"
    return _elide(abbreviate(name, width - len(tag)), max(width - len(tag), 0), mark) + tag


def _rank(column: str) -> int:
    return _PRIORITY.index(column) if column in _PRIORITY else 0
