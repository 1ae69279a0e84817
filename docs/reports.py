"""The reports of the gallery, made at each build as a user makes them; half a minute of one processor."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

import torch

import gramian as gm
from gramian import report, tasks
from gramian.cli import main

DOCS = Path(__file__).parent


def write_gallery(folder: Path) -> None:
    """Write them, where a file of the library is newer."""
    newest = max(path.stat().st_mtime for path in [Path(__file__), *(DOCS.parent / "src").rglob("*.py")])
    made = [folder / f"{name}.html" for name in ("twins", "run", "transformer", "compression")]
    if all(path.exists() and path.stat().st_mtime > newest for path in made):
        return
    folder.mkdir(parents=True, exist_ok=True)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that the figures are the same on every machine of one kind
    try:
        write_twins(made[0])
        with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
            write_run(made[1], made[2])
            write_compression(made[3])
    finally:
        torch.set_num_threads(num_threads)


def write_twins(file: Path) -> None:
    """A plain network of 50 layers as PyTorch initializes it, and the same after the repair and 150 steps."""
    task = tasks.digits(depth=50)
    before = gm.inspect(task.model(), task.batches(), task.objective)
    run = gm.train(task, init="isometric", optimizer="muon", steps=150)
    after = gm.inspect(run.model, task.batches(), task.objective)
    verdict = f"Before: {before.outcome} After: {after.outcome}"
    sections = report.compare(before, after)
    report.Document("A broken network and its repaired twin", verdict, after.status, sections=sections).save(file)


def write_run(run_file: Path, model_file: Path) -> None:
    """A transformer that learns the characters of these pages, as a run and as a network."""
    pages = [path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))]
    Path("pages.txt").write_bytes("".join(pages).encode("ascii", "ignore"))
    Path("pages.py").write_text("from gramian import tasks\n\n\ndef task():\n    return tasks.chars('pages.txt')\n")
    call(f"train pages.py:task --steps 200 --out run --html {run_file} --quiet")
    call(f"inspect run --task pages.py:task --html {model_file} --quiet")


def write_compression(file: Path) -> None:
    """The network of the demo, made smaller until it loses half a per cent of accuracy."""
    call("train digits --steps 150 --out digits --quiet")
    call("compress digits --task digits --max-drop 0.005 --out small --quiet")
    shutil.copy("small/report.html", file)


def call(words: str) -> None:
    """A command of `gramian`, which has to succeed."""
    assert main(words.split()) == 0, words


if __name__ == "__main__":
    write_gallery(DOCS / "_gallery" / "gallery")
