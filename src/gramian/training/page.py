"""The report of a run: its curves, its weights before and after, and what a diagnosis says where it did not learn."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gramian import report
from gramian.autograd import Ungraded
from gramian.errors import GramianError, TaskError, some
from gramian.inspection.diagnosis import STEPS
from gramian.objective import Objective
from gramian.recording import evaluating
from gramian.remedies import inspect
from gramian.report import Document, HeatMap, Picture, Report, Section, Series, Table, Tile
from gramian.report.formatting import number
from gramian.training.task import Run, Task, calling, named

__all__ = ["check", "comparison", "curves", "diagnose", "document", "receded", "trouble", "untuned"]

NUM_BATCHES = 4

# A loss that fell by less than this share of its first value, or than twice its spread at the end, did not fall.
FALLEN, SPREADS = 0.02, 2.0

# Evaluations from which on that can be told.
LEAST_ROWS = 8

# From this ratio of the largest value of a falling curve to the smallest, its axis is logarithmic.
DECADE = 10.0


def check(path: str | Path | None, out: str | Path | None) -> None:
    """Raise `InputError` where a report cannot be written; the folder of the run, `out`, is made before it."""
    if path is not None:
        report.check_target(path, (".html",), made=out)


def diagnose(model: nn.Module, task: Task, objective: Objective) -> Report:
    """Return the diagnosis of a model on the task's first batches, or of its weights alone where it has none."""
    try:
        found = inspect(model, task.batches(NUM_BATCHES), objective, title=task.name)
        found.not_looked_at[STEPS] = "the curves show those of the run; new ones are not tried"
        return found
    except GramianError as error:
        found = inspect(model, title=task.name)
        found.not_looked_at["signal and gradients by layer"] = str(error)
        return found


def trouble(run: Run) -> str:
    """Return what is wrong with a run's loss, in a sentence; empty where it is finite and fell."""
    if run.diverged:
        return f"The loss was not finite, or its gradient; the run ended after {run.steps:,} steps."
    losses = [row["loss"] for row in run.history if math.isfinite(row["loss"])]
    if len(losses) < LEAST_ROWS:
        return ""
    first = max(losses[0], run.start) if math.isfinite(run.start) else losses[0]
    last = losses[-(len(losses) // 4) :]
    level = statistics.fmean(last)
    if first - level < max(FALLEN * abs(first), SPREADS * statistics.pstdev(last)):
        return f"The training loss did not fall: {number(first)} at first, {number(level)} at the end."
    return ""


LOWER = {"loss", "error", "perplexity", "mse", "rmse", "mae", "nll", "bpc", "wer", "cer", "fid"}
"""Words in the names of numbers that should fall."""

HIGHER = {"accuracy", "acc", "score", "f1", "auc", "r2", "precision", "recall", "bleu", "iou", "map", "psnr", "reward"}
"""Words in the names of numbers that should rise."""

ALIKE, EARLY = 0.25, 3
"""A number that at the first evaluations is the training loss up to this share, and falls with it, is a loss too,
whatever its name. Of any other number nobody knows which is its best."""

GIVEN_BACK = 0.1
"""The share of what a number gained that it may lose again before it is told."""


def best_of(run: Run, name: str) -> dict[str, float] | None:
    """Return the evaluation at which a number was best, the first of equals; `None` where that is not known."""
    rows = [row for row in run.history if math.isfinite(row.get(name, math.nan))]
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    falls, rises = bool(words & LOWER), bool(words & HIGHER)
    falls = falls or (not rises and _begins_as_the_loss(run, name))
    if not rows or falls == rises:
        return None
    return (min if falls else max)(rows, key=lambda row: row[name])


def _begins_as_the_loss(run: Run, name: str) -> bool:
    pairs = [(row["loss"], row.get(name, math.nan)) for row in run.history[:EARLY]]
    if len(pairs) < EARLY or any(not abs(value - loss) < ALIKE * abs(loss) for loss, value in pairs):
        return False
    return all(after < before for before, after in zip(pairs[0], pairs[-1], strict=True))


def receded(run: Run) -> str:
    """Return which of the task's numbers became worse again, and what keeps the best weights; empty where none did."""
    told = []
    for name in _measured(run):
        best, later = best_of(run, name), run.history[-(len(run.history) // 4) :]
        if name == "loss" or best is None or len(run.history) < LEAST_ROWS or best["step"] >= later[0]["step"]:
            continue
        first, level = run.history[0].get(name, math.nan), statistics.fmean(row.get(name, math.nan) for row in later)
        if abs(level - best[name]) > GIVEN_BACK * abs(best[name] - first):
            told.append((name, best))
    if not told or run.best_step is not None:
        return ""
    name, best = told[0]
    last = run.history[-1]
    parts = [
        f"{one} was best at step {row['step']:,.0f}, {number(row[one])}, now {number(last[one])}" for one, row in told
    ]
    falls = best[name] <= last[name]
    return (
        f"{'; '.join(parts)}: worse since then. --best {'min' if falls else 'max'}:{name} "
        f"(best='{'min' if falls else 'max'}:{name}') keeps the weights of that step, and --patience ends such a run."
    )


def document(run: Run, task: Task, before: Report | None, after: Report) -> Document:
    """Return the page of one run.

    Args:
        run: with its model.
        task: what was trained.
        before, after: the diagnoses of the model before the first step, where it is known, and now.
    """
    wrong, back = trouble(run), receded(run)
    sections = []
    if wrong:
        told = [f"The network before training: {before.verdict}"] if before is not None else []
        sections.append(Section("What went wrong", "\n".join([wrong, *told, f"The network now: {after.verdict}"])))
    if run.findings:
        columns = ["step", "severity", "title", "where", "cause", "remedy"]
        rows = [[row[name] for name in columns] for row in run.findings]
        sections.append(Section("Found while training", items=[Table("", columns, rows)]))
    sections.append(Section("Curves", items=_in_pairs(curves({"": run}))))
    if task.pictures is not None:
        with calling(task, "pictures(model)"), evaluating(run.model), torch.no_grad():
            drawn = tuple(Ungraded()(task.pictures, run.model))
        for each in drawn:
            if not isinstance(each, (Picture, HeatMap, Table)):
                raise TaskError(
                    f"{named(task)}: pictures(model) must return a list of gm.report.Picture, HeatMap or Table, one is "
                    f"a {type(each).__name__}"
                )
        sections.append(Section("What the model does", items=[drawn]))
    if before is None:
        sections += after.to_document().sections
    else:
        sections += report.compare(before, after, labels=("before training", "after training"))
    skipped = f"{run.skipped:,} steps were skipped, since the loss or a gradient was not finite. " * bool(run.skipped)
    return Document(
        f"Training {task.name}",
        wrong or " ".join(filter(None, (f"{skipped}{_told(run)}", back, _unknown(run, before)))),
        "bad" if run.diverged else "warning" if wrong or run.skipped or back else "good",
        [
            Tile("Steps", number(run.steps), f"{number(run.seconds)} s of training"),
            *(_tile(run, name, value) for name, value in _measured(run).items()),
        ],
        sections,
        footer=f"{run.optimizer}, learning rate {number(run.lr)} ({run.rate_from}) · init: {run.init}",
    )


def comparison(runs: Mapping[str, Run], task: Task) -> Document:
    """Return the page of several runs of one task, by their optimizers."""
    names = list(dict.fromkeys(name for run in runs.values() for name in _measured(run)))
    rows = [
        [optimizer, run.lr, run.steps, run.seconds, *(_measured(run).get(name) for name in names)]
        for optimizer, run in runs.items()
    ]
    columns = ["optimizer", "learning rate", "steps", "seconds", *names]
    wrong = [f"{optimizer}: {trouble(run)}" for optimizer, run in runs.items() if trouble(run)]
    losses = {
        name: run.metrics["loss"] for name, run in runs.items() if math.isfinite(run.metrics.get("loss", math.nan))
    }
    least = min(losses, key=lambda name: losses[name], default="")
    lowest = f" The lowest training loss is that of {least}, {number(losses[least])}." if least else ""
    return Document(
        f"{task.name}: {', '.join(runs)}",
        " ".join(wrong)
        or f"{len(runs)} runs from the same weights, on the same batches.{lowest} {untuned(runs)}".strip(),
        "warning" if wrong else "good",
        sections=[
            Section("Curves", items=_in_pairs(curves(runs))),
            Section("Last evaluations", items=[Table("", columns, rows)]),
        ],
    )


def untuned(runs: Mapping[str, Run]) -> str:
    """What must be said of a comparison in which rates were not tuned; empty where none is a usual one."""
    names = [name for name, run in runs.items() if run.rate_from.startswith("the usual")]
    if not names:
        return ""
    whose = f"The rate of {names[0]} is" if not names[1:] else f"The rates of {some(names)} are"
    if len(names) == len(runs):
        whose = "The rates are"
    return f"{whose} not tuned; at tuned ones, as by lr=auto, the order may be another."


def curves(runs: Mapping[str, Run]) -> list[Picture]:
    """Return a picture of each number that the evaluations measured, with a curve for each run."""
    names = list(dict.fromkeys(name for run in runs.values() for row in run.history for name in row))
    pictures = []
    for name in names:
        if name in ("step", "seconds"):
            continue
        series = []
        for label, run in runs.items():
            rows = [row for row in run.history if name in row]
            series.append(Series(label, [row["step"] for row in rows], [row[name] for row in rows]))
        values = [y for curve in series for y in curve.y if math.isfinite(y)]
        falls = any(curve.y[-1] < curve.y[0] for curve in series if curve.y)  # an error, and no score up to one
        log = falls and bool(values) and min(values) > 0 and max(values) > DECADE * min(values)
        title = "Training loss, the mean since the last evaluation" if name == "loss" else name
        pictures.append(Picture(title, series, "step", "loss" if name == "loss" else "", log_y=log))
    return pictures


def _in_pairs(pictures: list[Picture]) -> list[Any]:
    """Side by side, where there is room."""
    return [tuple(pictures[i : i + 2]) for i in range(0, len(pictures), 2)]


def _tile(run: Run, name: str, value: float) -> Tile:
    if name == "loss":
        return Tile("Training loss", number(value), "mean since the evaluation before")
    best = best_of(run, name)
    if best is None or best["step"] == run.history[-1]["step"]:
        return Tile(name, number(value), "last evaluation")
    return Tile(name, number(value), f"last evaluation; best {number(best[name])} at step {best['step']:,.0f}")


def _unknown(run: Run, before: Report | None) -> str:
    """Why a resumed run's report has nothing of the network before training."""
    if before is not None or not run.resumed:
        return ""
    why = "the run was finished before" if run.resumed == run.steps else "the run began without a report"
    return f"The network before training was not looked at: {why}."


def _measured(run: Run) -> dict[str, float]:
    return {name: value for name, value in run.metrics.items() if name not in ("step", "seconds")}


def _told(run: Run) -> str:
    first = run.history[0] if run.history else {}
    parts = [f"{name} {number(first[name])} → {number(value)}" for name, value in _measured(run).items()]
    early = f", stopped early ({run.stopped})" * bool(run.stopped)
    if run.best_step is not None:
        early += f"; the weights are those of step {run.best_step:,}, the best"
    return f"{run.steps:,} steps of {run.optimizer}{early}: {', '.join(parts)}."
