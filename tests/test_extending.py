"""The walks of docs/extending.md work: what a reader would write is written to a copy of the package, and tried there.

Blocks that begin with `# file: PATH` are new files, `diff` blocks change files (the lines around a change must be found
once; there are no line numbers to keep), and `>>>` blocks are run at the end, in one process.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEW = re.compile(r"# file: (\S+)\n")
PATCHED = re.compile(r"^--- a/\S+\n\+\+\+ b/(\S+)\n", re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language and content."""
    return BLOCK.findall(text)


def patch(old: str, hunk: str) -> str:
    """Replaces the context and removed lines of a hunk, which must be there once, by its context and added lines."""
    lines = [line or " " for line in hunk.splitlines()]
    assert all(line[0] in " +-" for line in lines), f"a line of a diff begins with ' ', '+' or '-':\n{hunk}"
    before = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
    after = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
    assert before.strip(), f"a change needs the lines around it:\n{hunk}"
    count = f"\n{old}".count(f"\n{before}")
    assert count == 1, (
        f"found {count} times, wanted once; the page is out of date or needs more lines around:\n{before}"
    )
    return f"\n{old}".replace(f"\n{before}", f"\n{after}")[1:]


def apply(text: str, root: Path) -> None:
    """Writes the new files of a page, and its changes, below `root`."""
    for language, content in blocks(text):
        if match := NEW.match(content):
            path = root / match[1]
            assert not path.exists(), f"{match[1]} exists already"
            path.write_text(content[match.end() :].lstrip("\n"), encoding="utf-8")
        elif language == "diff":
            _, *changes = PATCHED.split(content)
            assert changes, f"a diff begins with '--- a/PATH' and '+++ b/PATH':\n{content}"
            for name, body in zip(changes[::2], changes[1::2], strict=True):
                path = root / name
                for hunk in re.split(r"^@@.*\n", body, flags=re.MULTILINE):
                    if hunk.strip():
                        path.write_text(patch(path.read_text(encoding="utf-8"), hunk), encoding="utf-8")


def examples(text: str) -> str:
    """The `>>>` blocks of a page, one after the other."""
    return "\n".join(content for _, content in blocks(text) if content.startswith(">>> "))


def test_the_walks_of_the_page_work(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    text = PAGE.read_text(encoding="utf-8")
    apply(text, tmp_path)
    (tmp_path / "walks.txt").write_text(examples(text), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    options = "doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS"
    program = (
        f"import doctest, gramian, sys; assert {str(tmp_path)!r} in gramian.__file__; "
        f"sys.exit(doctest.testfile('walks.txt', module_relative=False, optionflags={options}).failed)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_has_its_five_walks() -> None:
    headings = re.findall(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    for walk in ("direction", "matrix function", "layer", "finding", "command"):
        assert any(walk in heading for heading in headings), f"no heading of docs/extending.md names a {walk}"


def test_a_change_is_made_where_its_lines_stand() -> None:
    assert patch("a\nb\nc\n", " b\n+d\n c\n") == "a\nb\nd\nc\n"
    assert patch("a\nb\n", "-a\n+x\n b\n") == "x\nb\n"
    with pytest.raises(AssertionError, match="found 2 times"):
        patch("a\na\n", " a\n+b\n")
    with pytest.raises(AssertionError, match="found 0 times"):
        patch("a\n", " c\n+b\n")
