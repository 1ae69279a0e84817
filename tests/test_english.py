"""Code, documentation and tests are written in American spelling and in words that are understood at first reading.

The tables hold what was once written here and had to be replaced. Add a row when a reviewer stumbles over something.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "docs", "tests", "examples", "benchmarks", ".github")
SUFFIXES = {".py", ".md", ".html", ".js", ".css", ".yml", ".yaml", ".toml"}

ISE = (
    "initial|optim|normal|regular|orthogonal|factor|general|organ|recogn|synchron|parallel|minim|maxim|summar|quant|"
    "penal|symmetr|diagonal|linear|random|stabil|serial|token|visual|vector|emphas|character|util|standard|categor|"
    "special|discret|equal|central|final|local|real|custom|memor|priorit"
)
SPELLING = {
    rf"(?:{ISE})is(?:e[ds]?|er|ers|ing|ation|ations|able)\b": "-ize, -ization (initialize, optimizer)",
    r"colour": "color",
    r"neighbour": "neighbor",
    r"behaviour": "behavior",
    r"favour": "favor",
    r"honour": "honor",
    r"\bcentre[ds]?\b|\bcentring\b": "center, centered",
    r"\bmodell(?:ed|ing)\b": "modeled",
    r"\blabell(?:ed|ing)\b": "labeled",
    r"\btravell(?:ed|ing)\b": "traveled",
    r"\bcancell(?:ed|ing)\b": "canceled",
    r"\banalys(?:e|ed|er|ing)\b": "analyze",
    r"\bartefact": "artifact",
    r"\bcatalogue\b": "catalog",
    r"\bgrey\b": "gray",
    r"\bwhilst\b": "while",
    r"\bamongst\b": "among",
    r"\blearnt\b": "learned",
    r"\bjudgement": "judgment",
}
"""What must not be written (a regular expression), and what stands in its place."""

RIDDLES = {
    r"\bmend(?:s|ed|ing)?\b": "repair",
    r"\btwofold\b": "double-double",
    r"\bmade anew\b": "recomputed",
    r"\bgone on with\b": "continued, resumed",
    r"\bof one mind\b": "the ranks agree",
    r"\bhad from\b": "comes from, is computed from",
    r"\bworth its name\b": "say what is lost",
    r"\b(?:for|its|their|of) (?:the )?company\b|\bCOMPANY\b": "the batch; that collectives stay matched; buffered rows",
    r"\bpower of two in which\b": "the unit the state is stored in",
    r"\btold in (?:it|its|the|them)\b": "stored in, expressed in",
    r"\bis told besides\b": "gets besides, step context",
    r"\bwaits? for the device\b": "synchronize",
    r"\bas a rule\b": "usually",
    r"\bwhat (?:is kept is from what|wraps the whole)\b": "name the thing: staleness, the wrapper",
    r"\bbears (?:rates|larger|any)\b": "tolerates",
}
"""The same for phrases that a reader has to solve."""


def texts() -> list[Path]:
    """The files that people read, but for this one, and for the Chinese ones: docs/zh and what ends in .zh.md."""
    inside = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    every = [*sorted(ROOT.glob("*.md")), ROOT / "pyproject.toml", ROOT / "Makefile", *inside]
    built = {"_build", "__pycache__", "out"}
    return [
        path
        for path in every
        if path.is_file()
        and (path.suffix in SUFFIXES or path.name == "Makefile")
        and not built & set(path.parts)
        and not path.is_relative_to(ROOT / "docs" / "zh")
        and not path.name.endswith(".zh.md")
        and path.name not in ("CHANGELOG.md", Path(__file__).name)
    ]


@pytest.mark.parametrize("table", [SPELLING, RIDDLES], ids=["spelling", "riddles"])
def test_plain_american_english(table: dict[str, str]) -> None:
    """A sentence may break at the end of a line, so a space stands for any white space and a comment's sign."""
    rules = {re.compile(old.replace(" ", r"\s+(?:# )?"), re.IGNORECASE): new for old, new in table.items()}
    found = []
    for path in texts():
        text = path.read_text(encoding="utf-8")
        for rule, new in rules.items():
            for match in rule.finditer(text):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{path.relative_to(ROOT)}:{line}: {match[0]!r}; write: {new}")
    assert not found, f"{len(found)} to rewrite:\n" + "\n".join(found)


def test_names_of_files_are_spelled_so_too() -> None:
    names = [str(path.relative_to(ROOT)) for path in texts()]
    rules = [re.compile(old.replace(r"\b", ""), re.IGNORECASE) for old in SPELLING]
    assert [name for name in names if any(rule.search(name) for rule in rules)] == []


@pytest.mark.parametrize(
    "text",
    ["a whitened optimiser", "re-initialisation", "the colour", "factorised", "it is\n    # made anew", "Mended."],
)
def test_the_tables_find(text: str) -> None:
    rules = [old.replace(" ", r"\s+(?:# )?") for old in (SPELLING | RIDDLES)]
    assert any(re.search(rule, text, re.IGNORECASE) for rule in rules)


@pytest.mark.parametrize(
    "text",
    ["realistic", "equalities", "organism", "optimistic", "color", "parallelism", "minimal", "comment", "svd_twofold"],
)
def test_the_tables_do_not_find(text: str) -> None:
    rules = [old.replace(" ", r"\s+(?:# )?") for old in (SPELLING | RIDDLES)]
    assert not any(re.search(rule, text, re.IGNORECASE) for rule in rules)
