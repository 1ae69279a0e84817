"""The whole story on real handwritten digits: diagnose, show what fails, mend, train, diagnose again, compress."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gramian import linalg, report, tasks
from gramian.capturing import capture
from gramian.checkpoint import save_tensors
from gramian.compression import Plan, compress, load_compressed, save_compressed
from gramian.errors import InputError
from gramian.inspection import inspect
from gramian.report import Document, Picture, Report, Section, Series, Table, Tile
from gramian.tasks import Digits
from gramian.training import Run, Task, train

__all__ = ["KEEP", "Story", "demo"]

KEEP = 0.30

# The 2 × 2: (initialisation, optimizer), the untreated network first and the mended one last.
CELLS = (("default", "adamw"), ("default", "muon"), ("isometric", "adamw"), ("isometric", "muon"))
NAMES = {"default": "PyTorch's initialisation", "isometric": "isometric", "adamw": "AdamW", "muon": "Muon"}

# Learning rates by cell: the best on seeds 100–102, as `python benchmarks/demo_rates.py` finds them; depth 1000 in the
# second column. The demo's own seeds are others.
RATES: dict[tuple[str, str], tuple[float, float]] = {
    ("default", "adamw"): (1e-3, 1e-3),
    ("default", "muon"): (0.1, 0.1),
    ("isometric", "adamw"): (1e-4, 1e-5),
    ("isometric", "muon"): (0.1, 0.1),
}

Tell = Callable[[str, float, str], None]


@dataclass
class Story:
    """Everything the demo measured, for the report and the summary."""

    depth: int
    classes: int
    seed: int
    seconds_each: float
    accuracy_logistic: float = math.nan
    accuracy_affine: float = math.nan
    accuracy_compressed: float = math.nan
    before: Report | None = None
    after: Report | None = None
    runs: dict[tuple[str, str], Run] = field(default_factory=dict)
    plan: Plan | None = None
    bytes_trained: int = 0
    bytes_compressed: int = 0
    seconds: float = 0.0

    def accuracy(self, cell: tuple[str, str]) -> float:
        """Held-out accuracy at the end of a run of the 2 × 2."""
        return self.runs[cell].metrics["accuracy"]

    def summary(self) -> dict[str, Any]:
        """The numbers of `summary.json`."""
        assert self.plan is not None
        return {
            "accuracy_logistic": self.accuracy_logistic,
            "accuracy_untreated": self.accuracy(CELLS[0]),
            "accuracy_trained": self.accuracy(CELLS[-1]),
            "accuracy_compressed": self.accuracy_compressed,
            "accuracy_affine": self.accuracy_affine,
            "accuracy_grid": {f"{init} + {opt}": self.accuracy((init, opt)) for init, opt in CELLS},
            "parameters": self.plan.parameters_dense,
            "parameters_compressed": self.plan.parameters,
            "bytes": self.bytes_trained,
            "bytes_compressed": self.bytes_compressed,
            "steps": {f"{init} + {opt}": self.runs[init, opt].steps for init, opt in CELLS},
            "seconds_each": self.seconds_each,
            "seconds": round(self.seconds, 2),
            "depth": self.depth,
            "classes": self.classes,
            "seed": self.seed,
        }


def demo(
    *,
    depth: int = 100,
    classes: int = 2,
    seed: int = 0,
    out: str | os.PathLike[str] = "gramian-demo",
    plots: bool = True,
    seconds: float | None = None,
    tell: Tell | None = None,
) -> Story:
    """Runs the story and writes `report.html`, the two models, `metrics.jsonl` and `summary.json` to the folder `out`.

    Args:
        depth: of the plain tanh network, at least 3.
        classes: 2 (is the digit odd?) or 10 (which digit?).
        seed: of the split, the initialisation and the order of the batches.
        out: a folder, made if it is missing; files of an earlier demo in it are replaced.
        plots: whether the report has pictures.
        seconds: of training for each of the four runs; 12 at depth 100, and proportional to the depth up to 90.
        tell: called as `tell(stage, share done, remark)`.

    Raises:
        InputError: depth, classes, seconds out of range, or a folder that cannot be written.
    """
    begin = time.perf_counter()
    tell = tell or (lambda stage, share, remark: None)
    if depth < 3:
        raise InputError(f"demo: depth must be at least 3, got {depth}")
    seconds = min(90.0, max(6.0, 0.12 * depth)) if seconds is None else seconds
    folder = _folder(out)
    story = Story(depth, classes, seed, seconds)
    data = Digits.load(classes=classes, seed=seed)
    task = tasks.digits(depth=depth, classes=classes, seed=seed)
    batches = task.batches()

    tell("Logistic regression", 0.0, "5-fold cross-validation")
    story.accuracy_logistic = _logistic(data)
    tell("Logistic regression", 1.0, f"{story.accuracy_logistic:.1%} of held-out digits")

    story.before = _diagnose(task.model(), task, batches, "as PyTorch initialises it", tell)

    with (folder / "metrics.jsonl").open("w") as metrics:
        for cell in CELLS:
            story.runs[cell] = _run(task, cell, story, metrics, tell)
    model = story.runs[CELLS[-1]].model

    story.after = _diagnose(model, task, batches, "mended and trained", tell)

    tell("Compress", 0.0, "Gram matrices")
    stats = capture(model, batches, task.objective, fisher="gauss_newton")
    story.plan = compress(model, stats, keep=KEEP, progress=lambda done: tell("Compress", 0.9 * done / depth, "spectra"))
    story.bytes_trained = _size(folder / "model.safetensors", lambda path: save_tensors(path, model.state_dict()))
    compressed = folder / "compressed.safetensors"
    story.bytes_compressed = _size(compressed, lambda path: save_compressed(story.plan.apply(), path))  # type: ignore[union-attr]
    story.accuracy_compressed = data.evaluate(load_compressed(task.model(), compressed).eval())["accuracy"]
    story.accuracy_affine = _affine(model, data)
    tell("Compress", 1.0, f"{story.accuracy_compressed:.1%} with {story.plan.parameters / story.plan.parameters_dense:.1%}")

    tell("Report", 0.0, "pictures" if plots else "tables")
    story.seconds = time.perf_counter() - begin
    report.save(document(story, plots=plots), folder / "report.html")
    story.seconds = time.perf_counter() - begin
    _write(folder / "summary.json", json.dumps(story.summary(), indent=2) + "\n")
    tell("Report", 1.0, str(folder / "report.html"))
    return story


# ---- the steps -----------------------------------------------------------------------------------------------------


def _folder(out: str | os.PathLike[str]) -> Path:
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").touch()
    except OSError as error:
        raise InputError(f"demo: cannot write to {folder}: {error.strerror}. Choose another folder with --out") from None
    return folder


def _logistic(data: Digits) -> float:
    """Held-out accuracy of logistic regression, its penalty chosen by 5-fold cross-validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    penalties = {"C": [10.0**k for k in range(-2, 4)]}
    search = GridSearchCV(LogisticRegression(max_iter=2000), penalties, cv=5)
    search.fit(data.x_train.numpy(), data.y_train.numpy())
    return float(search.score(data.x_test.numpy(), data.y_test.numpy()))


def _diagnose(model: nn.Module, task: Task, batches: list[Any], which: str, tell: Tell) -> Report:
    stage = f"Diagnose, {which}"
    tell(stage, 0.0, "")
    title = f"The network {which}"
    found = inspect(model, batches, task.objective, title=title, progress=lambda w, i, n: tell(stage, i / (n + 1), w))
    tell(stage, 1.0, found.verdict)
    return found


def _run(task: Task, cell: tuple[str, str], story: Story, metrics: Any, tell: Tell) -> Run:
    init, optimizer = cell
    stage = f"Train, {NAMES[init]} + {NAMES[optimizer]}"
    tell(stage, 0.0, "")

    def progress(row: dict[str, float], share: float) -> None:
        line = {k: v if math.isfinite(v) else None for k, v in row.items()}
        metrics.write(json.dumps({"init": init, "optimizer": optimizer, **line}) + "\n")
        metrics.flush()
        tell(stage, share, f"{row['accuracy']:.1%} of held-out digits")

    return train(
        task,
        optimizer=optimizer,
        init=init,
        lr=RATES[cell][story.depth > 300],
        seconds=story.seconds_each,
        seed=story.seed,
        progress=progress,
    )


def _affine(model: nn.Module, data: Digits) -> float:
    """Held-out accuracy of the affine map nearest to the network's own scores on the training digits (least squares)."""
    with torch.no_grad():
        scores = model(data.x_train).double()
    x, x_test = (torch.cat([x.double(), torch.ones(len(x), 1)], dim=1) for x in (data.x_train, data.x_test))
    weights = linalg.solve(linalg.second_moment(x), x.T @ scores / len(x), damping=1e-6)
    return float(((x_test @ weights).argmax(-1) == data.y_test).float().mean())


def _size(path: Path, write: Callable[[Path], None]) -> int:
    write(path)
    return path.stat().st_size


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


# ---- the report ----------------------------------------------------------------------------------------------------


def document(story: Story, *, plots: bool = True) -> Document:
    """The story as a page: the verdict, then the pictures, then the tables."""
    assert story.before is not None
    assert story.after is not None
    assert story.plan is not None
    trained, untreated = story.accuracy(CELLS[-1]), story.accuracy(CELLS[0])
    question = "odd or even?" if story.classes == 2 else "which digit?"
    good = trained > story.accuracy_logistic and story.accuracy_compressed >= trained - 0.01
    sections = [
        *report.compare(story.before, story.after, labels=("before", "after")),
        _training_section(story),
        _compression_section(story),
    ]
    if not plots:
        sections = [_without_pictures(section) for section in sections]
    return Document(
        title=f"A plain {story.depth}-layer tanh network on handwritten digits: {question}",
        verdict=f"The network that did not learn ({untreated:.1%} of held-out digits) now reaches {trained:.1%}, "
        f"{100 * (trained - story.accuracy_logistic):+.1f} points against logistic regression; with "
        f"{story.plan.parameters / story.plan.parameters_dense:.0%} of its parameters, {story.accuracy_compressed:.1%}.",
        status="good" if good else "warning",
        tiles=[
            Tile("Logistic regression", f"{story.accuracy_logistic:.1%}", "cross-validated; no hidden layer", "baseline"),
            Tile("Untreated", f"{untreated:.1%}", "PyTorch's initialisation, AdamW", "before"),
            Tile("Mended and trained", f"{trained:.1%}", "isometric initialisation, Muon", "after"),
            Tile("Compressed", f"{story.accuracy_compressed:.1%}", f"{story.plan.parameters:,} parameters", "accent"),
        ],
        sections=sections,
        footer=f"seed {story.seed} · {story.seconds_each:g} s of training for each run · {story.seconds:.0f} s in all · "
        "accuracy on the 30 % of the digits that were held out",
    )


def _training_section(story: Story) -> Section:
    roles = {CELLS[0]: "before", CELLS[1]: "muted", CELLS[2]: "accent", CELLS[3]: "after"}
    curves = [
        Series(
            f"{NAMES[init]} + {NAMES[opt]}",
            [row["seconds"] for row in story.runs[init, opt].history],
            [100 * row["accuracy"] for row in story.runs[init, opt].history],
            role=roles[init, opt],  # type: ignore[arg-type]
        )
        for init, opt in CELLS
    ]
    rows: list[list[str | float | int | None]] = [
        ["logistic regression", "", None, None, f"{story.accuracy_logistic:.1%}"],
        *[
            [NAMES[i], NAMES[o], RATES[i, o][story.depth > 300], story.runs[i, o].steps, f"{story.accuracy((i, o)):.1%}"]
            for i, o in CELLS
        ],
    ]
    return Section(
        "Which half of the cure does what",
        _which_half(story),
        [
            Picture(
                "Held-out accuracy by seconds of training",
                curves,
                x_label="seconds of training",
                y_label="held-out accuracy, %",
                reference=(100 * story.accuracy_logistic, f"logistic regression {story.accuracy_logistic:.1%}"),
                caption=f"Equal seconds for all four ({story.seconds_each:g} s); learning rates tuned beforehand on "
                "other splits, each on the same grid.",
            ),
            Table(
                "The four runs and the baseline",
                ["initialisation", "optimizer", "learning rate", "steps", "held-out accuracy"],
                rows,
                emphasis=[len(rows) - 1],
            ),
        ],
    )


def _which_half(story: Story) -> str:
    """What the 2 × 2 shows, in words that follow from its numbers."""
    base = max(0.5 if story.classes == 2 else 0.1, 0.0)
    by = {cell: story.accuracy(cell) for cell in CELLS}
    points = {cell: 100 * (by[cell] - story.accuracy_logistic) for cell in CELLS}

    def learned(cell: tuple[str, str]) -> bool:
        return by[cell] > base + 0.1

    optimizer_alone = (
        "A matrix optimizer alone does not help: with PyTorch's initialisation the input is lost in rounding on its way "
        f"up, and Muon ends at {by[CELLS[1]]:.1%}."
        if not learned(CELLS[1])
        else f"With PyTorch's initialisation Muon reaches {by[CELLS[1]]:.1%}."
    )
    init_alone = (
        f"Isometric initialisation alone lets AdamW learn ({by[CELLS[2]]:.1%}, {points[CELLS[2]]:+.1f} points against "
        "logistic regression)."
        if learned(CELLS[2])
        else f"Isometric initialisation alone is not enough for AdamW ({by[CELLS[2]]:.1%})."
    )
    gain = 100 * (by[CELLS[3]] - by[CELLS[2]])
    both = (
        f"Both together reach {by[CELLS[3]]:.1%} ({points[CELLS[3]]:+.1f}): in the same seconds Muon adds {gain:.1f} points."
        if gain > 0
        else f"Both together reach {by[CELLS[3]]:.1%} ({points[CELLS[3]]:+.1f}): on this split Muon adds nothing ({gain:+.1f})."
    )
    return " ".join((optimizer_alone, init_alone, both))


def _compression_section(story: Story) -> Section:
    assert story.plan is not None
    plan = story.plan
    trained = story.accuracy(CELLS[-1])
    names = list(plan.ranks)
    shapes = {name: spectrum.block.shape for name, spectrum in zip(names, plan.spectra, strict=True)}
    kept = [rank if rank is not None else min(shapes[name]) for name, rank in plan.ranks.items()]
    dense = sum(rank is None for rank in plan.ranks.values())
    rows: list[list[str | float | int | None]] = [
        ["as trained", plan.parameters_dense, story.bytes_trained, f"{trained:.1%}"],
        ["factored, no fine-tuning", plan.parameters, story.bytes_compressed, f"{story.accuracy_compressed:.1%}"],
        ["the nearest affine map", None, None, f"{story.accuracy_affine:.1%}"],
        ["logistic regression", None, None, f"{story.accuracy_logistic:.1%}"],
    ]
    return Section(
        "Smaller",
        f"Every layer is factored where the loss notices least: the SVD of G^½ W A^½, one list of singular values for all "
        f"{len(names)} layers, one budget of {KEEP:.0%} of the parameters. {dense} layers stay dense. The affine map "
        "nearest to the network's own scores shows that it is not a linear network in disguise.",
        [
            Picture(
                "Rank kept by layer",
                [Series("rank kept", list(range(1, len(kept) + 1)), kept, role="after", style="bars")],
                x_label="layer",
                y_label="rank",
                reference=(float(min(shapes[names[len(names) // 2]])), "full rank"),
            ),
            Table("Compression", ["", "parameters", "bytes on disk", "held-out accuracy"], rows, emphasis=[1]),
        ],
    )


def _without_pictures(section: Section) -> Section:
    items = [item for item in section.items if isinstance(item, Table) or isinstance(item, list)]
    return Section(section.heading, section.text, items)
