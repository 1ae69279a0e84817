"""The steps of the demo, each a few calls of the library."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gramian import linalg, report, tasks
from gramian.block import blocks
from gramian.checkpoint import save_tensors
from gramian.compression import compress, load_compressed, save_compressed
from gramian.demo.page import document
from gramian.demo.story import CELLS, KEEP, NAMES, RATES, Story
from gramian.errors import InputError
from gramian.inspection import inspect
from gramian.recording import capture
from gramian.report import Report
from gramian.tasks import Digits
from gramian.training import Run, Task, train

__all__ = ["run"]

Progress = Callable[[str, float, str], None]


def run(
    *,
    depth: int = 100,
    classes: int = 2,
    seed: int = 0,
    out: str | os.PathLike[str] = "gramian-demo",
    plots: bool = True,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Story:
    """Run the demo and write `report.html`, two models, `metrics.jsonl` and `summary.json` to a folder.

    Args:
        depth: of the plain tanh network, at least 3.
        classes: 2 (is the digit odd?) or 10 (which digit?).
        seed: of the split, the initialization and the order of the batches.
        out: the folder, created if it is missing; the files of an earlier demo are replaced.
        plots: whether the report has pictures.
        seconds: training time of each of the four runs, in place of 350 steps of Muon and 1,050 of AdamW (fewer above
            depth 600), which take about as long and repeat to the bit.
        progress: called as `progress(stage, share done, remark)`.
    Returns: the measurements.
    Raises:
        InputError: depth, classes or seconds out of range, or a folder that cannot be written.
    """
    begin = time.perf_counter()
    progress = progress or (lambda stage, share, remark: None)
    if depth < 3:
        raise InputError(f"demo: depth must be at least 3, got {depth}")
    data = Digits.load(classes=classes, seed=seed)
    folder = _folder(out)
    story = Story(depth, classes, seed, seconds)
    task = tasks.digits(depth=depth, classes=classes, seed=seed)
    batches = task.batches()

    progress("Logistic regression", 0.0, "5-fold cross-validation")
    story.accuracy_logistic = _logistic(data)
    progress("Logistic regression", 1.0, f"{story.accuracy_logistic:.1%} held out")

    story.before = _diagnose("before", "as PyTorch initializes it", task.model(), task, batches, progress)

    with (folder / "metrics.jsonl").open("w") as metrics, _one_thread():
        for cell in CELLS:
            story.runs[cell] = _train(task, cell, story, metrics, progress)
    model = story.runs[CELLS[-1]].model

    story.after = _diagnose("after", "repaired and trained", model, task, batches, progress)

    progress("Compress", 0.0, "Gram matrices")
    stats = capture(model, batches, task.objective, fisher="gauss_newton")
    story.plan = compress(
        model, stats, keep=KEEP, progress=lambda done: progress("Compress", 0.9 * done / depth, "spectra")
    )
    about = blocks(model).metadata()
    story.bytes_trained = _size(
        folder / "model.safetensors", lambda path: save_tensors(path, model.state_dict(), about)
    )
    compressed = folder / "compressed.safetensors"
    small = story.plan.apply()
    story.bytes_compressed = _size(compressed, lambda path: save_compressed(small, path))
    story.accuracy_compressed = data.evaluate(load_compressed(task.model(), compressed).eval())["accuracy"]
    story.accuracy_affine = _affine(model, data)
    progress("Compress", 1.0, f"{story.accuracy_compressed:.1%} held out")

    progress("Report", 0.0, "pictures" if plots else "tables")
    story.seconds = time.perf_counter() - begin
    report.save(document(story, plots=plots), folder / "report.html")
    story.seconds = time.perf_counter() - begin
    report.write_text(folder / "summary.json", json.dumps(story.summary(), indent=2) + "\n")
    progress("Report", 1.0, "written")
    return story


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: for 64 × 64 matrices a second one gains a tenth, and on a busy machine costs a factor of 20."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _folder(out: str | os.PathLike[str]) -> Path:
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").touch()
    except OSError as error:
        raise InputError(
            f"demo: cannot write to {folder}: {error.strerror}. Choose another folder with --out"
        ) from None
    return folder


def _logistic(data: Digits) -> float:
    """Return the held-out accuracy of logistic regression, with the penalty chosen by 5-fold cross-validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    penalties = {"C": [10.0**k for k in range(-2, 4)]}
    search = GridSearchCV(LogisticRegression(max_iter=2000), penalties, cv=5)
    search.fit(data.x_train.numpy(), data.y_train.numpy())
    return float((search.predict(data.x_test.numpy()) == data.y_test.numpy()).mean())


def _diagnose(when: str, which: str, model: nn.Module, task: Task, batches: list[Any], progress: Progress) -> Report:
    stage = f"Diagnose {when}"
    steps = ("spectra", "steps", "signal", "gains", "jacobian")

    def update(what: str, done: int, total: int) -> None:
        progress(stage, (steps.index(what) + done / max(1, total)) / len(steps), what)

    found = inspect(model, batches, task.objective, title=f"The network {which}", progress=update)
    progress(stage, 1.0, found.verdict.partition(":")[0].partition(" in ")[0].rstrip("."))
    return found


def _train(task: Task, cell: tuple[str, str], story: Story, metrics: Any, progress: Progress) -> Run:
    init, optimizer = cell
    stage = f"Train {'PyTorch init' if init == 'default' else init} + {NAMES[optimizer]}"
    progress(stage, 0.0, "")

    def update(row: dict[str, float], share: float) -> None:
        line = {k: v if math.isfinite(v) else None for k, v in row.items()}
        metrics.write(json.dumps({"init": init, "optimizer": optimizer, **line}) + "\n")
        metrics.flush()
        progress(stage, share, f"{row['accuracy']:.1%} held out")

    return train(
        task,
        optimizer=optimizer,
        init=init,
        lr=RATES[cell][story.depth > 300],
        **story.budget(optimizer),
        seed=story.seed,
        progress=update,
    )


def _affine(model: nn.Module, data: Digits) -> float:
    """Return the held-out accuracy of the affine map fitted to the network's scores on the training digits."""
    with torch.no_grad():
        scores = model(data.x_train).double()
    x, x_test = (torch.cat([x.double(), torch.ones(len(x), 1)], dim=1) for x in (data.x_train, data.x_test))
    weights = linalg.solve(linalg.second_moment(x), x.T @ scores / len(x), damping=1e-6)
    return float(((x_test @ weights).argmax(-1) == data.y_test).float().mean())


def _size(path: Path, write: Callable[[Path], None]) -> int:
    write(path)
    return path.stat().st_size
