"""A benchmark's rows: measurements of competitors, and whether figures meet their goals."""

from __future__ import annotations

import importlib
import json
import operator
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gramian.bench.machine import features
from gramian.errors import InputError
from gramian.report.files import write_text
from gramian.report.terminal import unpadded

BENCHES: dict[str, str] = {
    "linalg": "gramian.bench.linalg",
    "capture": "gramian.bench.capture",
    "inspect": "gramian.bench.inspect",
    "optim": "gramian.bench.optim",
    "rates": "gramian.bench.rates",
    "compress": "gramian.bench.compress",
    "faults": "gramian.bench.faults",
    "remedies": "gramian.bench.faults.remedies",
}
"""Name on the command line: module with `rows(repeats, only, tell, **options) -> Iterator[Row]`."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Goal:
    """The goal of a figure: `Goal("time ÷ svd", "<=", 0.25)`."""

    what: str
    relation: str
    value: float

    def met(self, figure: float) -> bool:
        """Whether `figure` reaches the goal."""
        return {"<=": operator.le, ">=": operator.ge}[self.relation](figure, self.value)


@dataclass(frozen=True)
class Measurement:
    """One competitor: its median time in seconds, its error (the row says which error), and a remark."""

    method: str
    seconds: float | None
    error: float | None = None
    remark: str = ""


@dataclass(frozen=True)
class Row:
    """One task: its competitors, what their error means, and figures with their goals."""

    task: str
    error: str
    measurements: tuple[Measurement, ...]
    goals: tuple[tuple[Goal, float], ...] = ()


def run(name: str, *, repeats: int = 5, only: str = "", tell: Tell = lambda what: None, **options: Any) -> list[Row]:
    """Return the rows of a benchmark whose task contains `only`; `tell` is called with each task as it begins.

    What else is given goes to the benchmark's `rows`.
    """
    if name not in BENCHES:
        raise InputError(f"bench: there is no {name!r}; choose one of {', '.join(BENCHES)}")
    found = list(importlib.import_module(BENCHES[name]).rows(repeats, only, tell, **options))
    if not found:
        raise InputError(f"bench {name}: no task contains {only!r}")
    return found


def as_json(name: str, rows: Sequence[Row], path: Path | str) -> None:
    """Write the rows, with the machine's features, as JSON."""
    body: dict[str, Any] = {"bench": name, "machine": features(), "rows": []}
    for row in rows:
        goals = [{**asdict(goal), "measured": figure, "met": goal.met(figure)} for goal, figure in row.goals]
        body["rows"].append({**asdict(row), "goals": goals})
    write_text(path, json.dumps(body, indent=1) + "\n")


def show(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print a table: a line for each competitor, then the task's goals."""
    table = Table(box=None, pad_edge=False)
    table.add_column("task / method", overflow="fold")
    table.add_column("ms", justify="right")
    table.add_column("error", justify="right")
    table.add_column("", overflow="fold")
    for row in rows:
        table.add_row(row.task, "", "", row.error, style="bold")
        for m in row.measurements:
            seconds = "" if m.seconds is None else f"{1e3 * m.seconds:.4g}"
            table.add_row(f"  {m.method}", seconds, "" if m.error is None else f"{m.error:.1e}", m.remark)
        for goal, figure in row.goals:
            mark = "met" if goal.met(figure) else "MISSED"
            sign = {"<=": "≤", ">=": "≥"}[goal.relation]
            table.add_row(f"  → {goal.what}", f"{figure:.3g}", "", f"{sign} {goal.value:g}: {mark}")
    with unpadded(console or Console()) as out:
        out.print(table)
