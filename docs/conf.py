"""Sphinx configuration."""

from typing import Any

import gramian

project = "gramian"
author = "the gramian developers"
version = release = gramian.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]
html_theme = "furo"
exclude_patterns = ["_build"]
default_role = "code"  # docstrings write code between single backticks, as the pages do
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_use_ivar = True  # a field is described once, with its class
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]

HEADINGS = ("Returns", "Raises", "Cost", "Source")


def separate_sections(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Makes a paragraph of each one-line section of the docstring template, which napoleon would join to one."""
    found: list[str] = []
    inside = False  # a one-line section, whose continuation may be indented
    for line in lines:
        heading, colon, text = line.partition(":")
        if colon and heading in HEADINGS:
            inside = bool(text.strip())
            found += ["", f"**{heading}:**{text}" if inside else line]
            continue
        inside = inside and bool(line.strip())
        found.append(line.strip() if inside else line)
    lines[:] = found


def setup(app: Any) -> None:
    """Runs before napoleon, which has priority 500."""
    app.connect("autodoc-process-docstring", separate_sections, priority=400)
