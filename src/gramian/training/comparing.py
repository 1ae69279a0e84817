"""Several optimizers on one task, with equal budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gramian.errors import InputError
from gramian.optim.registry import with_rate
from gramian.training import agreement, page
from gramian.training.folder import holds_finished
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
            `"adamw:lr=auto"`. One may come several times, at different rates. `"auto"` beside the one that it stands
            for, at the same rate, adds none.
        out: a folder that gets one for each run, by its name, with a hyphen for the colon.
        report: an HTML file for their curves.
        begun: called with the name of each run before it.
        options: as for `train`, but `optimizer`; `lr` is that of the optimizers that are given without one.
    Returns: the runs by the optimizer's name, and its rate where it comes several times (`"adamw:lr=0.003"`), in the
        order given.
    Raises:
        InputError: fewer than two optimizers, one of them twice at one rate, or an unknown one; and as `train`.
    Cost: that of the runs, one after the other.
    Source: this library's own.

    >>> from gramian import tasks
    >>> runs = compare(tasks.diabetes(), ["adamw", "sgd"], steps=20)
    >>> [(name, run.steps) for name, run in runs.items()]
    [('adamw', 20), ('sgd', 20)]
    """
    asked = [with_rate("train: compare", text) for text in optimizers]
    if "auto" in optimizers and asked.count(with_rate("train: compare", "auto")) > 1:
        asked.pop(list(optimizers).index("auto"))  # it stands for one that is there
    names = _told_apart(asked)
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise InputError(
            "train: compare takes two different optimizers or more, or one at several rates; got "
            f"{', '.join(names) or 'none'}"
        )
    places = [None if out is None else Path(out) / name.replace(":", "-") for name in names]
    for place in places:
        if place is not None and not options.get("resume") and (place / "model.safetensors").exists():
            raise InputError(holds_finished(place))
    page.check(report, out)
    runs, usual = {}, options.pop("lr", None)
    for name, (optimizer, lr), place in zip(names, asked, places, strict=True):
        if begun is not None:
            begun(name)
        runs[name] = train(task, optimizer=optimizer, lr=usual if lr is None else lr, out=place, **options)
    if report is not None and agreement.first():
        page.comparison(runs, task).save(report)
    return runs


def _told_apart(asked: Sequence[tuple[str, float | str | None]]) -> list[str]:
    """A name for each run: the optimizer's, with its rate where the same one comes several times.

    >>> _told_apart([("adamw", 0.003), ("adamw", None), ("muon", 0.2)])
    ['adamw:lr=0.003', 'adamw', 'muon']
    """
    often = [name for name, _ in asked]
    return [
        name
        if lr is None or often.count(name) == 1
        else f"{name}:lr={lr if isinstance(lr, str) else format(lr, '.12g')}"
        for name, lr in asked
    ]
