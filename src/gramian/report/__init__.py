"""Reports: plain data classes in `model`, and their rendering as an HTML page, terminal text and JSON.

Nothing here depends on torch. Importing this package loads the data classes only; matplotlib, jinja2 and rich are
imported at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .actions import ACTIONS, Action
from .document import Depth, Detail, Document, HeatMap, Lane, Picture, Role, Section, Series, Status, Table, Tile
from .findings import SEVERITIES, Finding, Rehearsal, Severity
from .layer import Direction, Layer, Place
from .model import Report

if TYPE_CHECKING:
    from . import html, terminal
    from .compose import compare
    from .files import check_folder, check_target, write_text
    from .html import render, save
    from .terminal import show, to_text

__all__ = [
    "ACTIONS",
    "SEVERITIES",
    "Action",
    "Depth",
    "Detail",
    "Direction",
    "Document",
    "Finding",
    "HeatMap",
    "Lane",
    "Layer",
    "Picture",
    "Place",
    "Rehearsal",
    "Report",
    "Role",
    "Section",
    "Series",
    "Severity",
    "Status",
    "Table",
    "Tile",
    "check_folder",
    "check_target",
    "compare",
    "html",
    "render",
    "save",
    "show",
    "terminal",
    "to_text",
    "write_text",
]

_LAZY = {
    "check_folder": "files",
    "check_target": "files",
    "compare": "compose",
    "render": "html",
    "save": "html",
    "show": "terminal",
    "to_text": "terminal",
    "write_text": "files",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    if name in ("html", "terminal"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
