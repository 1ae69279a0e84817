"""The code of the start page, the guides and the first example of each reference page runs, and prints what they show.

Of a page, in order: a `python` block is run in the page's namespace, one that begins with `# file: NAME` is written to
the page's folder, and the lines of a `console` block that begin with `$ gramian` are run as commands. A `text` block
right after code has what the code prints; `…` on a line of its own stands for lines that are not shown. Numbers are
compared as `near` says, since processors round differently; of a block after `<!-- numbers vary: WHY -->`, words alone.
A block after `<!-- not run: WHY -->` is left out.

`python tests/test_docs.py --write` runs all pages and pastes what they print.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from gramian.cli import main
from gramian.errors import GramianWarning
from gramian.linalg.engine.function import methods_table
from gramian.optim.registry import table as directions_table

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS / "start.md", *sorted((DOCS / "howto").glob("*.md"))]
USED = [DOCS / f"{name}.md" for name in ("watch", "capture", "curvature", "linalg_spectra")]
REFERENCE = [*USED, *(DOCS / path.name for path in sorted((DOCS / "measured").glob("*.md")))]
"""Pages of which the code before the first heading is run: what follows it has names of the reader's."""
BLOCK = re.compile(
    r"(<!-- (?P<mark>not run|numbers vary): (?P<why>[^\n]*?) -->\n)?^```(?P<language>\w+)\n(?P<body>.*?)^```$",
    re.M | re.S,
)
FILE = re.compile(r"# file: (\S+)\n")
NUMBER = re.compile(r"[-+−]?(?<![A-Za-z_])\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?|\binf\b|\bnan\b")
TIME = re.compile(r"(?:\d+ (?:h|min) )*\d+(?:\.\d+)? (?:h|min|m?s)\b")
TOLERANCE = 0.05
"""Of numbers with a point or an exponent: kernels that round otherwise change those that are compared by less."""
WIDTH = "88"


class Block(NamedTuple):
    language: str
    body: str
    why: str
    """Why it is not run."""
    vary: str
    """Why its numbers vary."""
    start: int
    end: int
    follows: bool
    """Nothing stands between it and the block before it."""


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, and where their contents begin and end."""
    found, end = [], 0
    for match in BLOCK.finditer(text):
        follows = not text[end : match.start()].strip()
        why, vary = ((match["why"] or "") if match["mark"] == mark else "" for mark in ("not run", "numbers vary"))
        found.append(Block(match["language"], match["body"], why, vary, *match.span("body"), follows))
        end = match.end()
    return found


def code_of(page: Path) -> str:
    """The part of a page whose code is run."""
    text = page.read_text(encoding="utf-8")
    return text.partition("\n## ")[0] if page in REFERENCE else text


def run(page: Path, folder: Path) -> list[tuple[Block, str]]:
    """The blocks of a page with output, each with what was printed. Runs in `folder`."""
    names: dict[str, Any] = {"__name__": page.stem}
    shown, printed = [], ""
    torch.manual_seed(0)
    with contextlib.chdir(folder):
        for block in blocks(code_of(page)):
            if block.language == "text" and block.follows and not block.why:
                shown.append((block, printed))
            elif block.why or block.language not in ("python", "console"):
                continue
            elif named := FILE.match(block.body):
                Path(named[1]).write_text(block.body[named.end() :], encoding="utf-8")
            elif block.language == "python":
                line = code_of(page).count("\n", 0, block.start)
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile("\n" * line + block.body, str(page), "exec"), names)
                printed = plain(out.getvalue())
            else:
                shown.append((block, console(block.body)))
    return shown


def console(body: str) -> str:
    """The commands of a block, each with what it prints."""
    lines = []
    for command in re.findall(r"^\$ gramian .*\n", body, re.M):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            code = main(shlex.split(command)[2:])
        assert code == 0, command
        lines += [command, plain(out.getvalue())]
    return "".join(lines)


def plain(text: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in text.strip("\n").splitlines())


def folded(text: str) -> str:
    """Lines may break elsewhere for a longer number, bars of a picture be one step higher, and times vary."""
    return " ".join(TIME.sub("TIME", re.sub("[▁▂▃▄▅▆▇█]+", "▄", text)).split())


def near(shown: str, printed: str) -> bool:
    """Whether a printed number is the one shown: a count exactly, another to `TOLERANCE` or 2 in the last digit."""
    if shown == printed:
        return True
    a, b = (float(text.replace(",", "").replace("−", "-")) for text in (shown, printed))
    if not re.search(r"[.e]", shown + printed):
        return a == b
    mantissa, _, exponent = shown.partition("e")
    last = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(a - b) <= max(TOLERANCE * max(abs(a), abs(b)), 2.001 * last)


def fits(shown: str, printed: str, *, numbers: bool = True) -> bool:
    """Whether the page shows what is printed; its `…` may stand for any lines."""
    parts = [folded(part) for part in re.split(r"^…$", shown, flags=re.M)]
    patterns = [f"({NUMBER.pattern})".join(map(re.escape, NUMBER.split(part))) for part in parts]
    match = re.fullmatch(r"\s?.*?\s?".join(patterns), folded(printed))
    if match is None or not numbers:
        return match is not None
    told = [number for part in parts for number in NUMBER.findall(part)]
    return all(map(near, told, match.groups()))


def cut(printed: str, shown: str) -> str:
    """As many of the printed lines as the page shows before and after its `…`; all where it has none."""
    head, dots, tail = (f"\n{shown}").partition("\n…\n")
    if not dots:
        return printed
    lines, last = printed.splitlines(), len(tail.splitlines())
    return "".join(f"{line}\n" for line in [*lines[: head.count("\n")], "…", *lines[len(lines) - last :]])


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a terminal, for tables."""
    monkeypatch.setenv("COLUMNS", WIDTH)


@pytest.mark.parametrize("page", [*PAGES, *REFERENCE], ids=lambda page: page.stem)
def test_a_page_runs_and_prints_what_it_shows(page: Path, tmp_path: Path) -> None:
    for block, printed in run(page, tmp_path):
        assert fits(block.body, printed, numbers=not block.vary), (
            f"{page.name} shows\n{block.body}\nand the code prints\n{printed}"
        )


@pytest.mark.parametrize(("mark", "most"), [("why", 20), ("vary", 10)])
def test_a_block_that_is_not_run_or_compared_says_why(mark: str, most: int) -> None:
    found = [getattr(block, mark) for page in [*PAGES, *REFERENCE] for block in blocks(code_of(page))]
    told = [reason for reason in found if reason]
    assert len(told) <= most
    assert all(len(reason.split()) >= 3 for reason in told)


def test_languages_of_blocks() -> None:
    unknown = {block.language for page in [*PAGES, *REFERENCE] for block in blocks(code_of(page))}
    assert unknown <= {"python", "console", "text", "toctree"}


def test_commands_that_no_test_runs_are_marked() -> None:
    for page in [*PAGES, *REFERENCE]:
        for block in blocks(code_of(page)):
            if block.language == "console" and not block.why:
                assert re.findall(r"^\$ (?!gramian )", block.body, re.M) == [], f"{page.name}: {block.body}"


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("loss 0.500\n", "loss 0.509\n", True),
        ("loss 0.500\n", "loss 0.540\n", False),
        ("loss 0.002, 1.2e-7\n", "loss −0.001, 1.3e-07\n", False),
        ("loss 0.002, 1.2e-7\n", "loss 0.001, 1.3e-07\n", True),
        ("160 in 1.2 s\n", "160 in 1 min 15 s\n", True),
        ("30 of 1,024\n", "30 of 1,025\n", False),
        ("a 1\n…\nb 2.0\n", "a 1\nc 7\nb 3.0\n", False),
        ("loss 0.5\n", "accuracy 0.5\n", False),
        ("first\n…\nlast\n", "first\nand\nmore\nlast\n", True),
        ("first\n…\nlast\n", "first\nand\nmore\n", False),
        ("1 error\n", "1 error\n1 warning\n", False),
    ],
)
def test_what_fits(shown: str, printed: str, same: bool) -> None:
    assert fits(shown, printed) == same


TABLES = {"methods": (DOCS / "linalg.md", methods_table), "directions": (DOCS / "optim.md", directions_table)}
"""Tables that the code has, by the name under which a page shows them."""


def table_of(text: str, name: str) -> re.Match[str]:
    found = re.search(rf"^<!-- table: {name}, .*? -->\n(.*?)\n<!-- end of the table -->$", text, re.M | re.S)
    assert found is not None, name
    return found


@pytest.mark.parametrize("name", TABLES)
def test_a_page_has_the_table_of_the_code(name: str) -> None:
    page, made = TABLES[name]
    assert table_of(page.read_text(encoding="utf-8"), name)[1] == made().strip()


def tracked() -> set[Path]:
    """The files of a checkout, which are not made by a build."""
    root = DOCS.parent
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no checkout")
    return {(root / line).resolve() for line in listed.stdout.splitlines()}


def test_pages_read_in_a_checkout_have_no_dead_link_and_nothing_to_fill_in() -> None:
    files = tracked()
    folders = {parent for file in files for parent in file.parents}
    dead = []
    for page in (file for file in sorted(files) if file.suffix == ".md" and file.exists()):
        text = page.read_text(encoding="utf-8")
        assert len(re.findall(r"^```", text, re.M)) % 2 == 0, f"{page}: a block is not closed"
        text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.M | re.S)
        assert "{{" not in text, page
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path = target.partition("#")[0]
            if path and "://" not in path and not path.startswith("mailto:"):
                place = (page.parent / path).resolve()
                if place not in files and place not in folders:
                    dead.append(f"{page.relative_to(DOCS.parent)}: {target}")
    assert dead == []


def write() -> None:
    """Run the pages and paste what they print."""
    os.environ["COLUMNS"] = WIDTH
    warnings.simplefilter("error", GramianWarning)
    wanted = [page for page in [*PAGES, *REFERENCE] if not sys.argv[2:] or page.stem in sys.argv[2:]]
    for page in wanted:
        with tempfile.TemporaryDirectory() as folder:
            found = run(page, Path(folder))
        text = page.read_text(encoding="utf-8")
        for block, printed in reversed(found):
            text = text[: block.start] + cut(printed, block.body or "\n") + text[block.end :]
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__" and "--write" in sys.argv:
    write()
