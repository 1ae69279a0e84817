"""Every verb on every family: which cells are right, refused by name, wrong, or a crash.

python tests/families.py                     # all families, a line for each
python tests/families.py gpt2 "timm vit"     # some
python tests/families.py --write             # all, and docs/families.md
python tests/families.py --write --verbs inspect    # the column of one verb; the page keeps the others
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch

from family_checks import VERBS, Cell, Wrong
from family_models import FAMILIES, Family
from gramian.errors import GramianError

PAGE = Path(__file__).parents[1] / "docs" / "families.md"


def run(family: Family, verb: str) -> Cell:
    """One cell; whatever a verb raises is a verdict."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            return VERBS[verb](family)
    except Wrong as error:
        return Cell("wrong", str(error))
    except GramianError as error:
        folder = re.escape(tempfile.gettempdir()) + r"/\w+"
        return Cell("refused", re.sub(folder, "FOLDER", str(error)), traceback.format_exc())
    except Exception as error:
        return Cell("crash", f"{type(error).__name__}: {error}", traceback.format_exc())


Matrix = dict[str, dict[str, Cell]]


def run_row(name: str, verbs: list[str]) -> tuple[str, dict[str, Cell], float]:
    """All cells of one family, and the seconds they took."""
    torch.set_num_threads(1)
    start = time.monotonic()
    return name, {verb: run(FAMILIES[name], verb) for verb in verbs}, time.monotonic() - start


def run_all(names: list[str], verbs: list[str], jobs: int, *, verbose: bool = False) -> Matrix:
    """Families in processes of their own, `jobs` at a time, so that nothing that happens in one stops the others."""
    matrix: Matrix = {}
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run_row, name, verbs) for name in names]):
            name, row, seconds = future.result()
            matrix[name] = row
            counts = Counter(cell.verdict for cell in row.values())
            print(f"{len(matrix):3} {name:20} {seconds:5.1f} s  {dict(counts)}", flush=True)
            for verb, cell in row.items():
                if cell.verdict != "right":
                    print(f"    {verb:15} {cell.verdict}: {cell.note[:300]}", flush=True)
                    if verbose:
                        print(cell.details, flush=True)
    return {name: matrix[name] for name in names}


MARKS = {"right": "✓", "alarm": "alarm", "refused": "–", "wrong": "**wrong**", "crash": "**crash**"}


def page(matrix: Matrix) -> str:
    """The matrix as Markdown: how many cells are right, a line for each that is not, and all of them."""
    counts = {verb: Counter(row[verb].verdict for row in matrix.values()) for verb in VERBS}
    total = Counter(cell.verdict for row in matrix.values() for cell in row.values())
    lines = [
        "# Families",
        "",
        f"Every verb on {len(matrix)} models of public libraries, tiny and at random (`tests/family_models.py`), "
        "measured by `make test-families`. Each verb is compared with what does not ask gramian's table of layers: the "
        "operations that torch dispatches, hooks, a file read back (`tests/family_checks.py`). ✓ right; – refused by "
        "name; alarm: a finding on a standard initialization; **wrong** and **crash** as they say. Of "
        f"{sum(total.values())} cells {total['right']} are right, {total['refused']} refused, {total['alarm']} alarms, "
        f"{total['wrong']} wrong and {total['crash']} crashes.",
        "",
        "| verb | right | refused | alarm | wrong | crash |",
        "|-|-|-|-|-|-|",
    ]
    kinds = ("right", "refused", "alarm", "wrong", "crash")
    lines += [f"| {verb} | " + " | ".join(str(counts[verb][kind]) for kind in kinds) + " |" for verb in VERBS]
    lines += ["", "## What is not right", ""]
    for name, row in matrix.items():
        for verb, cell in row.items():
            if cell.verdict != "right":
                note = " ".join(cell.note.split())[:240].replace("|", "\\|")
                lines.append(f"- {name}, {verb}, {cell.verdict}: `{note}`")
    lines += [
        "",
        "## Model by model",
        "",
        "`blocks` shows the share of hidden parameters, of those that torch multiplies as matrices, that take an "
        "optimizer's matrix direction; `capture` the number of layers compared with hooks, and the share of hidden "
        "parameters with second moments; an optimizer the rate where its usual one was too large for three steps.",
        "",
        "| family | library | " + " | ".join(VERBS) + " |",
        "|" + "-|" * (len(VERBS) + 2),
    ]
    for name, row in matrix.items():
        cells = [MARKS[c.verdict] + (f" {c.note}" if c.verdict == "right" and c.note else "") for c in row.values()]
        lines.append(f"| {name} | {FAMILIES[name].library} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def read(text: str) -> Matrix:
    """The matrix of a page that `page` made, without tracebacks."""
    verdicts = {mark: verdict for verdict, mark in MARKS.items()}
    notes = dict(re.findall(r"^- (.+?, .+?), \w+: `(.*)`$", text, re.MULTILINE))
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    verbs = next(line[2:] for line in lines if line[0] == "family")
    matrix: Matrix = {}
    for name, _, *cells in (line for line in lines if line[0] in FAMILIES):
        matrix[name] = {}
        for verb, cell in zip(verbs, cells, strict=True):
            mark, _, note = cell.partition(" ")
            matrix[name][verb] = Cell(verdicts[mark], note or notes.get(f"{name}, {verb}", ""))
    return matrix


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="by name; all by default")
    parser.add_argument("--verbs", default=",".join(VERBS), help="comma-separated")
    parser.add_argument("--write", action="store_true", help=f"writes docs/{PAGE.name}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; one for each core by default")
    parser.add_argument("--verbose", action="store_true", help="with tracebacks")
    options = parser.parse_args()
    if unknown := [name for name in options.families if name not in FAMILIES]:
        parser.error(f"no family {unknown[0]!r}; there are {', '.join(FAMILIES)}")
    verbs = [verb for verb in VERBS if verb in options.verbs.split(",")]
    matrix = run_all(options.families or list(FAMILIES), verbs, options.jobs, verbose=options.verbose)
    total = Counter(cell.verdict for row in matrix.values() for cell in row.values())
    for verb in verbs:
        print(f"{verb:15} {dict(Counter(row[verb].verdict for row in matrix.values()))}")
    print(f"{len(matrix)} families, {sum(total.values())} cells: {dict(total)}")
    if options.write:
        before = read(PAGE.read_text(encoding="utf-8")) if len(verbs) < len(VERBS) else {}
        whole = {name: {verb: (before.get(name, {}) | row)[verb] for verb in VERBS} for name, row in matrix.items()}
        PAGE.write_text(page(whole), encoding="utf-8")
    return int(bool(total["wrong"] or total["crash"]))


if __name__ == "__main__":
    sys.exit(main())
