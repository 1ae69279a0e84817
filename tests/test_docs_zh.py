"""The Chinese pages: their Python runs, page by page, and prints what the pages say that it prints.

`python tests/test_docs_zh.py --write` runs every page and writes what it printed into the ```text block behind each
```python block.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "zh").glob("*.md"))
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def run(page: Path) -> list[tuple[str, str, str]]:
    """The blocks of a page, run one after the other in one namespace: the code, what it printed, what the page says."""
    found, names = [], {"__name__": page.stem}
    before, num_threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for code, told in BLOCK.findall(page.read_text(encoding="utf-8")):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, f"{page.name}, a block that begins with {code.splitlines()[0]!r}", "exec"), names)
            found.append((code, printed.getvalue(), told))
    finally:
        torch.set_default_dtype(before)
        torch.set_num_threads(num_threads)
    return found


def same(printed: str, told: str) -> bool:
    """Equal words, and numbers that agree to one per cent: the last digits differ from processor to processor."""
    if NUMBER.sub("#", printed).split() != NUMBER.sub("#", told).split():
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(told), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=1e-2) for a, b in pairs)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_prints_what_it_says(page: Path) -> None:
    for code, printed, told in run(page):
        assert same(printed, told), f"{page.name} says\n{told}\nand prints\n{printed}\nfor\n{code}"


def test_there_is_a_page_for_each_topic_and_for_the_start() -> None:
    topics = [path.stem.partition("_")[0] for path in sorted((ROOT / "examples").glob("[0-9]_*.py"))]
    assert [page.stem.partition("_")[0] for page in PAGES] == [*topics, "index"]


@pytest.mark.parametrize(
    ("printed", "told", "equal"),
    [("a 1.000\n", "a 1.001", True), ("a 1.0", "a 1.2", False), ("a 1.0", "b 1.0", False), ("1e-3 2", "1e-3", False)],
)
def test_outputs_are_compared_by_words_and_numbers(printed: str, told: str, equal: bool) -> None:
    assert same(printed, told) is equal


def write() -> None:
    """Put what every block prints behind it."""
    for page in PAGES:
        printed = iter([output for _, output, _ in run(page)])

        def block(match: re.Match[str], outputs: object = printed) -> str:
            output = next(outputs)  # type: ignore[call-overload]
            return f"```python\n{match[1]}```\n" + (f"\n```text\n{output}```\n" if output else "")

        page.write_text(BLOCK.sub(block, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__" and "--write" in sys.argv[1:]:
    write()
