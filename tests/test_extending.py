"""The walks of docs/extending.md work: what a reader would write is written to a copy of the package, and tried there.

Blocks that begin with `# file: PATH` are new files, and `diff` blocks change files: the lines around a change must be
found once, and there are no line numbers to keep. Then the `>>>` blocks are run, and the tests that are named.
"""

from __future__ import annotations

import json
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
    places = [found.start() for found in re.finditer(f"^(?={re.escape(before)})", old, re.MULTILINE)]
    assert len(places) == 1, f"found {len(places)} times, wanted once; bring the page up to date:\n{before}"
    return old[: places[0]] + after + old[places[0] + len(before) :]


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


def commands(text: str) -> list[str]:
    """The lines of a page that run tests."""
    return re.findall(r"^\.venv/bin/python -m (pytest .*)$", text, re.MULTILINE)


def run(folder: Path, *arguments: str) -> None:
    """Runs Python on the changed copy, which must end well."""
    environment = os.environ | {"PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-10_000:]


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, its tests and documentation, with every change of the page."""
    folder = tmp_path_factory.mktemp("walks")
    for name in ("src", "tests", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "_build", Path(__file__).name)
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    apply(PAGE.read_text(encoding="utf-8"), folder)
    return folder


def test_the_examples_of_the_walks_run(changed: Path) -> None:
    (changed / "walks.txt").write_text(examples(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    options = "doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS"
    program = (
        f"import doctest, gramian, sys; assert {str(changed)!r} in gramian.__file__; "
        f"sys.exit(doctest.testfile('walks.txt', module_relative=False, optionflags={options}).failed)"
    )
    run(changed, "-W", "ignore", "-c", program)


PROGRAM = """
import json, shlex, sys, pytest

for command in json.loads(sys.argv[1]):
    print("$", command, flush=True)
    if pytest.main([*shlex.split(command)[1:], "-q", "-x", "-p", "no:cacheprovider"]):
        sys.exit(f"failed: {command}")
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tests_that_the_walks_name_pass(changed: Path) -> None:
    """All in one process, of which the start and imports take longer than the tests."""
    run(changed, "-c", PROGRAM, json.dumps(commands(PAGE.read_text(encoding="utf-8"))))


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
