"""Several optimizers on one task, with equal budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gramian.errors import InputError
from gramian.optim.registry import known_name, with_rate
from gramian.training import agreement, page
from gramian.training.loop import train
from gramian.training.task import Run, Task

__all__ = ["compare"]


def compare(
    task: Task,
    optimizers: Sequence[str],
    *,
    out: str | Path | None = None,
    report: str | Path | None = None,
    begun: Callable[[str], None] | None = None,
    **options: Any,
) -> dict[str, Run]:
    """Train a task once with each optimizer, from the same initial weights, on the same batches, for the same budget.

    With `seconds`, each optimizer has the same time of training alone, so that one whose steps are cheap takes more of
    them. A fair comparison gives each its best rate: `"muon:lr=0.3"` after a grid, or `lr="auto"` for all.

    Args:
        task: what to train.
        optimizers: names, as for `train`, with a rate where it is not the usual one: `"adamw"`, `"adamw:lr=3e-3"`,
            `"adamw:lr=auto"`. `"auto"` beside the one that it stands for adds none.
        out: a folder that gets one for each optimizer, by its name.
        report: an HTML file for their curves.
        begun: called with the name of each optimizer before its run.
        options: as for `train`, but `optimizer`; `lr` is that of the optimizers that are given without one.
    Returns: the runs by the optimizer's name, in the order given.
    Raises:
        InputError: fewer than two optimizers, one of them twice, or an unknown one; and as `train`.
    Cost: that of the runs, one after the other.
    Source: this library's own.

    >>> from gramian import tasks
    >>> runs = compare(tasks.diabetes(), ["adamw", "sgd"], steps=20)
    >>> [(name, run.steps) for name, run in runs.items()]
    [('adamw', 20), ('sgd', 20)]
    """
    asked = [with_rate("train: compare", text) for text in optimizers]
    names = [name for name, _ in asked]
    if "auto" in optimizers and names.count(known_name("train: compare", "auto")) > 1:
        place = list(optimizers).index("auto")
        names.pop(place)  # it stands for one that is there
        asked.pop(place)
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise InputError(f"train: compare takes two different optimizers or more; got {', '.join(names) or 'none'}")
    for name in names:
        if out is not None and not options.get("resume") and (Path(out) / name / "model.safetensors").exists():
            raise InputError(
                f"train: {Path(out) / name} holds a finished run. Choose another folder, or delete model.safetensors "
                "there"
            )
    page.check(report)
    runs, usual = {}, options.pop("lr", None)
    for name, lr in asked:
        if begun is not None:
            begun(name)
        place = None if out is None else Path(out) / name
        runs[name] = train(task, optimizer=name, lr=usual if lr is None else lr, out=place, **options)
    if report is not None and agreement.first():
        page.comparison(runs, task).save(report)
    return runs
