"""Sphinx configuration."""

import re
import sys
from pathlib import Path
from typing import Any

import gramian

sys.path.insert(0, str(Path(__file__).parent))
from generated import write_pages
from reports import write_gallery

write_pages()
write_gallery(Path(__file__).parent / "_gallery" / "gallery")

project = "gramian"
author = "the gramian developers"
version = release = gramian.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]
html_theme = "furo"
exclude_patterns = ["_build", "_gallery"]
html_extra_path = ["_gallery"]  # the reports of the gallery, as they are
html_static_path = ["_static"]
html_css_files = ["pages.css"]
default_role = "code"  # docstrings write code between single backticks, as the pages do
napoleon_use_ivar = True  # a field is described once, with its class
napoleon_attr_annotations = False  # "*b m n" is no emphasis
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
myst_enable_extensions = ["colon_fence", "dollarmath"]
suppress_warnings = ["myst.header"]

HEADINGS = ("Args", "Attributes", "Returns", "Raises", "Cost", "Source")


def by_template(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Lays out a docstring of CONTRIBUTING.md's template: text, cost and source, one list of fields, the example.

    napoleon knows Args, Attributes and Raises; it would join the one-line sections to one paragraph.
    """
    text: list[str] = []
    sections: dict[str, list[str]] = {}
    current = text
    for line in lines:
        if current is not sections.get("example"):
            line = _escaped(line)
        heading, colon, rest = line.partition(":")
        if line.startswith(">>> "):
            current = sections.setdefault("example", [])
        elif colon and heading in HEADINGS:
            current = sections[heading] = []
            line = rest.strip()
        current.append(line)
    found = list(text)
    for heading in ("Cost", "Source"):
        if heading in sections:
            found += ["", f"**{heading}:** {_joined(sections[heading])}"]
    for heading in ("Args", "Attributes"):
        if heading in sections:
            found += ["", f"{heading}:", *sections[heading][1:]]
    if "Returns" in sections:
        found += ["", f":returns: {_joined(sections['Returns'])}"]
    first, *rest = sections.get("Raises", [""])
    if first and not first.startswith("nothing of its own"):
        exception, colon, when = _joined([first, *rest]).partition(":")
        one = colon and exception.isidentifier()
        found[len(text) : len(text)] = [] if one else ["", f"**Raises:** {_joined([first, *rest])}"]
        found += ["", f":raises {exception}: {when.strip()}"] if one else []
    elif rest:
        found += ["", "Raises:", *rest]
    lines[:] = [*found, "", *sections.get("example", [])]


def _escaped(line: str) -> str:
    """Docstrings are plain text with code between backticks: no emphasis, substitutions or references elsewhere."""
    if line.lstrip().startswith(">>> "):
        return line
    first, *rest = re.split(r"(`[^`]*`)", line)
    name = re.match(r" +\*{1,2}\w+:", first)  # an entry of Args, which napoleon escapes
    head, first = (name[0], first[name.end() :]) if name else ("", first)
    return head + "".join(p if p.startswith("`") else re.sub(r"([*|]|_\b)", r"\\\1", p) for p in [first, *rest])


def _joined(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


def setup(app: Any) -> None:
    """Runs before napoleon, which has priority 500."""
    app.connect("autodoc-process-docstring", by_template, priority=400)
