"""Pages that are made at each build: the API by family, the examples with what they print, the benchmarks' figures."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

DOCS = Path(__file__).parent
EXAMPLES = DOCS.parent / "examples"
RESULTS = DOCS.parent / "benchmarks" / "results"

# File of a family, its title, and the modules whose names it has, under the shortest public name of each.
FAMILIES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("verbs", "Verbs and nouns", ("gramian",)),
    ("inspection", "Inspection and remedies", ("gramian.inspection", "gramian.remedies")),
    ("recording", "Recording and calibrating", ("gramian.recording", "gramian.operators")),
    ("init", "Initialization", ("gramian.init",)),
    ("optim", "Optimizers", ("gramian.optim",)),
    ("prox", "Penalties", ("gramian.prox",)),
    ("compression", "Compression", ("gramian.compression",)),
    ("training", "Training and tasks", ("gramian.training", "gramian.tasks")),
    ("integrations", "In other people's loops", ("gramian.integrations",)),
    ("linalg", "Matrix functions", ("gramian.linalg",)),
    ("random", "Random matrices", ("gramian.random",)),
    ("files", "Files and ranks", ("gramian.checkpoint", "gramian.placement")),
    ("report", "Reports", ("gramian.report",)),
    ("errors", "Errors and deprecation", ("gramian.errors", "gramian.deprecation")),
)

MEMBERS = {"gramian.optim": ("gramian.optim.shell.MatrixOptimizer",)}
"""What else a module's page has: the class that its public ones share."""


def write_pages() -> None:
    """Write all of them, where what they show has changed."""
    write_api(DOCS / "api")
    write_tutorials(DOCS / "tutorials")
    write_benchmarks(DOCS / "_build" / "benchmarks.md")


def write_api(folder: Path) -> None:
    """One page a family: each public name once, as users write it."""
    folder.mkdir(exist_ok=True)
    known = {id(value): f"gramian.{name}" for name, value in _public("gramian").items()}
    for file, title, modules in FAMILIES:
        lines = [f"# {title}", ""]
        for module in modules:
            names = {
                name: value
                for name, value in _public(module).items()
                if not isinstance(value, ModuleType) and known.get(id(value), f"{module}.{name}") == f"{module}.{name}"
            }
            lines += [f"## `{module}`", "", "```{eval-rst}", f".. automodule:: {module}", "   :no-members:", ""]
            for name, value in names.items():
                lines += [*_entry(f"{module}.{name}", value), ""]
            for name in MEMBERS.get(module, ()):
                lines += [f".. autoclass:: {name}", "   :members:", ""]
            lines += ["```", ""]
            others = [f"`{name}`" for name, v in _public(module).items() if known.get(id(v), "") and name not in names]
            if others and module != "gramian":
                lines += [f"{', '.join(others)}: under [the verbs and nouns](verbs.md).", ""]
        _write(folder / f"{file}.md", "\n".join(lines))


def write_tutorials(folder: Path) -> None:
    """One page an example: its part of the README, the picture, the code, and what the code prints, run now."""
    folder.mkdir(exist_ok=True)
    parts = re.split(r"^## ", (EXAMPLES / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    for part in parts:
        heading, _, text = part.partition("\n")
        found = re.match(r"\d\. \[(.+)\]\((.+)\.py\)", heading)
        if found is None:
            continue
        title, name = found.groups()
        script, output = EXAMPLES / f"{name}.py", folder / f"{name}.txt"
        sources = [script, EXAMPLES / "_check.py", *(DOCS.parent / "src").rglob("*.py")]
        if not output.exists() or output.stat().st_mtime < max(path.stat().st_mtime for path in sources):
            run = subprocess.run(
                [sys.executable, str(script), "--out", str(folder)], capture_output=True, text=True, check=True
            )
            output.write_text(run.stdout.replace(f"{folder}/", ""), encoding="utf-8")
        lines = [f"# {title}", "", text.strip(), "", "## The picture", ""]
        lines += [f"```{{image}} {name}.png", f":alt: {title}", ":class: drawn", "```", ""]
        lines += ["## The code", "", "```{literalinclude} ../../examples/" + name + ".py", "```", ""]
        lines += ["## What it prints", "", "```{literalinclude} " + output.name, ":language: text", "```", ""]
        _write(folder / f"{name}.md", "\n".join(lines))


def write_benchmarks(page: Path) -> None:
    """The tables of `gramian bench` in benchmarks/results: every measurement and every goal, met or missed."""
    lines: list[str] = []
    for file in sorted(RESULTS.glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        rows = found.get("rows", []) if isinstance(found, dict) else []
        if not rows or "measurements" not in rows[0]:
            continue
        lines += [f"## {file.stem}", "", f"`benchmarks/results/{file.name}`: {_machine(found['machine'])}.", ""]
        for row in rows:
            lines += [f"### {_cell(row['task'])}", "", f"Error: {_cell(row['error'])}.", ""]
            lines += ["| method | seconds | error | remark |", "|-|-|-|-|"]
            for m in row["measurements"]:
                cells = (m["method"], _number(m["seconds"]), _number(m["error"]), m["remark"])
                lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
            lines += ["", "| goal | wanted | measured | |", "|-|-|-|-|"] if row["goals"] else []
            for goal in row["goals"]:
                wanted = f"{goal['relation'].replace('<=', '≤').replace('>=', '≥')} {_number(goal['value'])}"
                told = "met" if goal["met"] else "**missed**"
                lines.append(f"| {_cell(goal['what'])} | {wanted} | {_number(goal['measured'])} | {told} |")
            lines.append("")
    page.parent.mkdir(exist_ok=True)
    _write(page, "\n".join(lines))


def _machine(machine: dict[str, Any]) -> str:
    accelerator = machine["accelerator"] or "no accelerator"
    threads = f"{machine['threads']} of {machine['cores']} cores"
    return f"{machine['processor']}, {threads}, {', '.join(machine['units'])}, {accelerator}, torch {machine['torch']}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _cell(text: str) -> str:
    """Text in a table, where a bar would end the cell and a star would begin emphasis."""
    return re.sub(r"([|*<_`\[\]\\])", r"\\\1", text)


def _public(module: str) -> dict[str, Any]:
    found = importlib.import_module(module)
    return {name: getattr(found, name) for name in found.__all__}


def _entry(name: str, value: Any) -> list[str]:
    if isinstance(value, type):
        return [f".. auto{'exception' if issubclass(value, BaseException) else 'class'}:: {name}", "   :members:"]
    if inspect.isroutine(value):
        return [f".. autofunction:: {name}"]
    shown = ", ".join(f"`{key}`" for key in value) if isinstance(value, (dict, tuple)) else f"`{value}`"
    told = {dict: "A table with the keys", tuple: "The values"}.get(type(value), "The value")
    return [f".. py:data:: {name}", "", f"   {told} {shown}."]


def _write(path: Path, text: str) -> None:
    """Leave an equal file as it is, so that a build has less to do."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
