"""Rows of a table: lists and dicts of dicts that print as tables, and show as tables in a notebook."""

from __future__ import annotations

import math
from collections.abc import Mapping
from textwrap import wrap
from typing import Any

__all__ = ["NamedRows", "Rows"]

# Rows that are shown, and characters of a cell of text; a page breaks its lines by itself, and names are not cut.
SHOWN, WIDTH = 40, 60
LINE, LEAST = 80, 20  # characters of a line; the last column goes on below, in no fewer than so many


class Rows(list[dict[str, Any]]):
    """A list of dicts with the same keys; only its `repr` is its own.

    `pandas.DataFrame(rows)` makes a frame of it. At most 40 rows are shown, the first and the last.

    Args:
        iterable: the dicts.

    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.

    >>> Rows([{"name": "0.weight", "loss": 0.25}, {"name": "2.weight", "loss": 1e-9}])
    name       loss
    0.weight   0.25
    2.weight  1e-09
    """

    def _cells(self, width: int | None = None) -> tuple[list[str], list[list[str]], int]:
        """The header, the rows that are shown as text, and after how many of them others are left out (or all).

        Cells between a row's first and last are cut to `width` characters.
        """
        keys = list(dict.fromkeys(key for row in self for key in row))
        cut = len(self) if len(self) <= SHOWN else SHOWN // 2
        shown = [*self[:cut], *(self[-(SHOWN - cut) :] if cut < len(self) else [])]
        between = [width if 0 < i < len(keys) - 1 else None for i in range(len(keys))]
        return keys, [[_text(row.get(key), w) for key, w in zip(keys, between, strict=True)] for row in shown], cut

    def _numeric(self, keys: list[str]) -> list[bool]:
        values = {key: [row[key] for row in self if row.get(key) is not None] for key in keys}
        return [bool(values[key]) and all(_is_number(v) for v in values[key]) for key in keys]

    def __repr__(self) -> str:
        if not self:
            return "no rows"
        keys, cells, cut = self._cells(WIDTH)
        widths = [max(len(row[i]) for row in (keys, *cells)) for i in range(len(keys))]
        right = self._numeric(keys)
        before = sum(widths[:-1]) + 2 * len(widths[:-1])
        if len(keys) > 1 and not right[-1]:
            widths[-1] = min(widths[-1], max(LEAST, LINE - before))
        shown = []
        for row in (keys, *cells):
            first, *rest = wrap(row[-1], widths[-1], break_on_hyphens=False) or [""] if len(keys) > 1 else row
            aligned = zip([*row[:-1], first], widths, right, strict=True)
            line = "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in aligned).rstrip()
            shown.append("\n".join([line, *(" " * before + more for more in rest)]))
        if cut < len(self):
            shown.insert(cut + 1, f"… {len(self) - SHOWN} more; a loop over it has them all")
        return "\n".join(shown)

    def _repr_html_(self) -> str:
        if not self:
            return "<em>no rows</em>"
        keys, cells, cut = self._cells()
        right = self._numeric(keys)
        lines = ["".join(_cell("td", text, r) for text, r in zip(row, right, strict=True)) for row in cells]
        if cut < len(self):
            lines.insert(cut, f'<td colspan="{len(keys)}">… {len(self) - SHOWN} more</td>')
        head = "".join(_cell("th", text, r) for text, r in zip(keys, right, strict=True))
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class NamedRows(dict[str, dict[str, Any]]):
    """Rows by name: a dict of dicts that prints as a table, and shows as one in a notebook.

    Args:
        rows: by name; none if left out.

    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.

    >>> NamedRows({"0.weight": {"skipped": 1}, "2.weight": {"skipped": 0}})
    name      skipped
    0.weight        1
    2.weight        0
    """

    def __init__(self, rows: Mapping[str, dict[str, Any]] | None = None) -> None:
        super().__init__(rows or {})

    def rows(self) -> Rows:
        """The same as a list, with the name in each row."""
        return Rows({"name": name, **row} for name, row in self.items())

    def __repr__(self) -> str:
        return repr(self.rows())

    def _repr_html_(self) -> str:
        return self.rows()._repr_html_()


def _cell(tag: str, text: str, right: bool) -> str:
    from html import escape  # 5 ms, and only notebooks need it

    return f'<{tag} style="text-align:{"right" if right else "left"}">{escape(text)}</{tag}>'


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any, width: int | None = None) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Mapping):
        value = ", ".join(f"{key} {_text(one)}" for key, one in value.items())
    text = "".join(c for c in " ".join(str(value).split()) if c.isprintable())
    return text if width is None or len(text) <= width else text[: width - 1] + "…"
