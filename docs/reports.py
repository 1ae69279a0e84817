"""The reports of the gallery, made at each build as a user makes them; half a minute of one processor."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import gramian as gm
from gramian import report, tasks

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
        with tempfile.TemporaryDirectory() as name:
            write_run(Path(name), made[1], made[2])
            write_compression(Path(name), made[3])
    finally:
        torch.set_num_threads(num_threads)


def write_twins(file: Path) -> None:
    """A plain network of 50 layers as PyTorch initializes it, and the same after the repair and 150 steps."""
    task = tasks.digits(depth=50)
    before = gm.inspect(task.model(), task.batches(), task.objective)
    run = gm.train(task, init="isometric", optimizer="muon", lr=0.05, steps=150)
    after = gm.inspect(run.model, task.batches(), task.objective)
    verdict = f"Before: {before.outcome} After: {after.outcome.partition(' Looked at')[0]}"
    sections = report.compare(before, after)
    report.Document("A broken network and its repaired twin", verdict, after.status, sections=sections).save(file)


def write_run(folder: Path, run_file: Path, model_file: Path) -> None:
    """A transformer that learns the characters of these pages, as a run and as a network."""
    pages = [path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))]
    (folder / "pages.txt").write_bytes("".join(pages).encode("ascii", "ignore"))
    (folder / "pages.py").write_text("from gramian import tasks\ndef task(): return tasks.chars('pages.txt')\n")
    call(folder, f"train pages.py:task --steps 200 --out run --html {run_file} --quiet")
    call(folder, f"inspect run --task pages.py:task --html {model_file} --quiet")


def write_compression(folder: Path, file: Path) -> None:
    """The network of the demo, made smaller until it loses half a per cent of accuracy."""
    call(folder, "train digits --lr 0.05 --steps 150 --out trained --quiet")
    call(folder, "compress trained --task digits --max-drop 0.005 --out small --quiet")
    shutil.copy(folder / "small" / "report.html", file)


def call(folder: Path, words: str) -> None:
    """A command of `gramian`, run in a folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(DOCS.parent / "src")}
    subprocess.run([sys.executable, "-m", "gramian", *words.split()], cwd=folder, env=environment, check=True)


if __name__ == "__main__":
    write_gallery(DOCS / "_gallery" / "gallery")
