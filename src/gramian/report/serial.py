"""Reports as JSON, as a table of pandas, and as files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gramian.errors import InputError, UnsupportedError

from .actions import ACTIONS, Action
from .files import check_target, write_text
from .findings import SEVERITIES, Finding, Rehearsal
from .layer import Direction, Layer, Place
from .model import Report

if TYPE_CHECKING:
    import pandas  # pyright: ignore[reportMissingImports]

SCHEMA = 1  # raised when a key changes its meaning; a new key does not raise it
FORMATS = (".html", ".json")

Record = TypeVar("Record", Finding, Layer, Direction, Place)


def jsonable(value: Any) -> Any:
    """Return what strict JSON can hold: numbers of any library as int or float, and None for NaN and infinity."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [jsonable(item) for item in value]
    raise InputError(
        f"report: cannot write a {type(value).__name__} as JSON; expected numbers, words and lists of them."
    )


def report_to_dict(report: Report) -> dict[str, Any]:
    """Return the report as plain data; the key `"gramian"` is the version of the schema."""
    return {
        "gramian": SCHEMA,
        "kind": "report",
        "title": report.title,
        "status": report.status,
        "verdict": report.verdict,
        "facts": jsonable(report.facts),
        "findings": [jsonable(asdict(finding) | {"remedy": finding.remedy}) for finding in report.findings],
        "layers": [jsonable(asdict(layer)) for layer in report.layers],
        "jacobian": jsonable(report.jacobian),
        "notes": jsonable(report.notes),
        "directions": [jsonable(asdict(direction)) for direction in report.directions],
        "depth": [jsonable(asdict(place)) for place in report.depth],
        "looked_at": list(report.looked_at),
        "not_looked_at": dict(report.not_looked_at),
    }


def report_to_json(report: Report, indent: int | None) -> str:
    """Return strict JSON in ASCII, which preserves even a name with a lone surrogate."""
    return json.dumps(report_to_dict(report), indent=indent, allow_nan=False)


def report_from_json(text: str | bytes) -> Report:
    """Read what `report_to_json` wrote; unknown keys, from a later version, are ignored."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"report: the text is not JSON ({error}). Pass what Report.to_json() wrote.") from None
    if not isinstance(data, dict) or data.get("kind") != "report" or not isinstance(data.get("gramian"), int):
        raise InputError('report: the JSON is not a gramian report; expected {"gramian": 1, "kind": "report", …}.')
    if data["gramian"] > SCHEMA:
        raise InputError(
            f"report: written with schema {data['gramian']}, this gramian reads up to {SCHEMA}. Upgrade gramian."
        )
    try:
        return Report(
            title=str(data["title"]),
            findings=[_record(Finding, row) for row in data.get("findings", [])],
            layers=[_record(Layer, row) for row in data.get("layers", [])],
            facts={key: math.nan if value is None else value for key, value in data.get("facts", {}).items()},
            jacobian=_numbers(data.get("jacobian", [])),
            notes=[str(note) for note in data.get("notes", [])],
            directions=[_record(Direction, row) for row in data.get("directions", [])],
            depth=[_record(Place, row) for row in data.get("depth", [])],
            looked_at=[str(what) for what in data.get("looked_at", [])],
            not_looked_at={str(what): str(why) for what, why in data.get("not_looked_at", {}).items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"report: a field of the JSON is missing or wrong ({error}). Write the file again.") from None


def _numbers(values: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if value is None else float(value) for value in values)


def _record(cls: type[Record], row: Mapping[str, Any]) -> Record:
    known = {f.name for f in fields(cls)}
    values = {key: value for key, value in row.items() if key in known}
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
    if missing:
        raise KeyError(f"{cls.__name__}.{missing[0]}")
    if cls is Layer:
        values["shape"] = tuple(int(length) for length in values["shape"])
        values["singular_values"] = _numbers(values.get("singular_values", ()))
        for key in ("rank_90", "rank_99", "tail_interval"):
            if values.get(key) is not None:
                values[key] = tuple(values[key])
    elif cls is Direction:
        values["image"] = tuple(_numbers(row) for row in values.get("image", ()))
        values["tokens"] = tuple(tuple(str(token) for token in end) for end in values.get("tokens", ()))
    elif cls is Place:
        pass
    elif values["severity"] not in SEVERITIES:
        raise ValueError(f"severity {values['severity']!r}")
    else:
        rehearsal = values.get("rehearsal")
        values["rehearsal"] = None if rehearsal is None else _rehearsal(rehearsal)
        values["action"] = _action(values.get("action"))
        if values["action"] is None and not values.get("advice"):
            # A file from before there were actions, or with an action of a later version: keep its text.
            values["advice"] = str(row.get("remedy", ""))
    return cls(**values)


def _rehearsal(row: Mapping[str, Any]) -> Rehearsal:
    """Return the rehearsal of a file; a loss that was not finite comes back as NaN."""
    known = {f.name for f in fields(Rehearsal)}
    values: dict[str, Any] = {key: math.nan if value is None else value for key, value in row.items() if key in known}
    return Rehearsal(**values)


def _action(row: Mapping[str, Any] | None) -> Action | None:
    """Return the action that a file names; None where there is none, or it comes from a later version."""
    if row is None or row["name"] not in ACTIONS:
        return None
    return Action(str(row["name"]), dict(row["arguments"]))


def layers_to_dataframe(layers: Sequence[Layer]) -> pandas.DataFrame:
    """Return one row per layer with the fields of `Layer` as columns, indexed by name."""
    try:
        import pandas  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UnsupportedError(
            "to_dataframe: pandas is not installed. Run `pip install pandas`, or use Report.to_dict()['layers']."
        ) from None
    columns = [f.name for f in fields(Layer)]
    rows = [[getattr(layer, column) for column in columns] for layer in layers]
    return pandas.DataFrame(rows, columns=pandas.Index(columns)).set_index("name")


def save_report(report: Report, path: str | os.PathLike[str]) -> None:
    """Write `.html` or `.json`, by the suffix, atomically."""
    check_target(path, FORMATS)
    if Path(path).suffix.lower() == ".html":
        from .html import save

        save(report.to_document(), path)
    else:
        write_text(path, report_to_json(report, indent=1) + "\n")
