"""The network by depth in a terminal: a line of blocks for each quantity, with the culprit marked below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as Grid
from rich.text import Text

from .axes import shows
from .document import Depth
from .formatting import number
from .spelling import Speller

__all__ = ["DepthView"]

_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.-=+*%#"
_WIDEST_PLACE = 4  # columns
_RANGE = 21  # columns of "1.0e-12 to 1.0e-12"
_LEAST = 8
_STYLES = {"culprit": "bold red", "consequence": "yellow"}


@dataclass(frozen=True)
class DepthView:
    """One line of blocks for each curve, on a logarithmic scale from its least to its greatest value.

    Where there are more places than columns, a column shows the value of its places that is farthest from the middle of
    the curve, so that one broken layer in hundreds stays in sight. "0" stands for zero and "!" for what is not finite.
    """

    item: Depth

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        spell = Speller(options)
        item = self.item
        curves = [
            (" ".join(part for part in (lane.label.partition(",")[0].partition(";")[0], label) if part), values)
            for lane in item.lanes
            for label, _, values in lane.series
        ]
        width = options.max_width
        labels = max((len(spell(label)) for label, _ in curves), default=0)
        columns = width - labels - _RANGE - 4
        if columns < _LEAST or not item.names:
            yield Text(spell(f"{item.title}: needs a wider terminal, or the HTML page."), "dim")
            return
        count = len(item.names)
        places = _columns(count, columns)
        grid = Grid.grid(padding=(0, 2, 0, 0))
        for _ in range(3):
            grid.add_column(no_wrap=True)
        for label, values in curves:
            known = [value for value in values if value is not None and shows(value, log=True)]
            ends = f"{number(min(known))} to {number(max(known))}" if known else ""
            grid.add_row(Text(spell(label), "dim"), Text(_line(values, places, spell.ascii)), Text(spell(ends), "dim"))
        if item.culprits or item.consequences:
            grid.add_row(Text("marked", "dim"), _marks(item, places, spell.ascii), "")
        yield grid
        names = ", ".join(item.names[place] for place in item.culprits[:3])
        if names:
            more = f" and {len(item.culprits) - 3} more" if len(item.culprits) > 3 else ""
            sign = "^" if spell.ascii else "▲"
            yield Text(spell(f"{sign} {names}{more}"), _STYLES["culprit"])
        if item.caption:
            yield Text(spell(item.caption), "dim")


def _columns(count: int, width: int) -> list[range]:
    """The places of each column: several columns for a place, or several places for a column."""
    if count <= width:
        return [range(place, place + 1) for place in range(count) for _ in range(min(_WIDEST_PLACE, width // count))]
    return [range(column * count // width, (column + 1) * count // width) for column in range(width)]


def _line(values: Sequence[float | None], places: Sequence[range], ascii_only: bool) -> str:
    blocks = _ASCII if ascii_only else _BLOCKS
    logs = sorted(math.log10(value) for value in values if value is not None and shows(value, log=True))
    low, high, middle = (logs[0], logs[-1], logs[len(logs) // 2]) if logs else (0.0, 0.0, 0.0)
    line = ""
    for column in places:
        known = [value for place in column if (value := values[place]) is not None]
        if not known:
            line += " "
        elif any(not math.isfinite(value) for value in known):
            line += "!"
        elif any(value <= 0 for value in known):
            line += "0"
        else:
            value = max((math.log10(value) for value in known), key=lambda log: abs(log - middle))
            share = (value - low) / (high - low) if high - low > 1e-9 else 0.5
            line += blocks[min(int(share * len(blocks)), len(blocks) - 1)]
    return line


def _marks(item: Depth, places: Sequence[range], ascii_only: bool) -> Text:
    culprits, later = set(item.culprits), set(item.consequences)
    line = Text()
    for column in places:
        if culprits & set(column):
            line.append("^" if ascii_only else "▲", _STYLES["culprit"])
        elif later & set(column):
            line.append("." if ascii_only else "·", _STYLES["consequence"])
        else:
            line.append(" ")
    return line
