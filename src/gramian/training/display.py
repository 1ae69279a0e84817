"""A training run on the terminal: its progress, and a summary at the end."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gramian.checkpoint.faults import plain
from gramian.durations import in_words
from gramian.report.formatting import plural
from gramian.report.live import Watch, four_digits
from gramian.report.terminal import unpadded
from gramian.training.folder import MODEL
from gramian.training.page import receded, untuned
from gramian.training.start import leaves_error
from gramian.training.task import Run
from gramian.training.watched_run import told

__all__ = ["Watched", "show", "show_comparison"]

BLOCKS = "▁▂▃▄▅▆▇█"


class Watched:
    """Shows a run's progress on stderr, through the two callbacks of `gm.train`."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self._watch = Watch("train", quiet=quiet, console=console)
        self._told: dict[int, int] = {}  # how many findings of a run

    def __enter__(self) -> Watched:
        self._watch.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._watch.__exit__(*error)

    def stepped(self, run: Run, share: float) -> None:
        """Show step, speed, rate, time left, and what a watch found; pass this as `on_step`.

        Before the first step, an error that no initialization repairs is told, and that the run trains on.
        """
        if id(run) not in self._told and not run.steps and leaves_error(run.init):
            self._watch.note(f"init: {run.init}. The run trains on; gm.inspect tells all that was found")
        self._told.setdefault(id(run), 0)
        if len(run.findings) > self._told[id(run)]:
            for row in run.findings[self._told[id(run)] :]:
                self._watch.note(f"{row['severity']}, {told(row)}")
            self._told[id(run)] = len(run.findings)
        numbers = {"step": f"step {run.steps:,}"}
        if run.seconds > 0:
            numbers |= {
                "speed": f"{four_digits(run.steps / run.seconds)} steps/s",
                "rate": f"rate {four_digits(run.rate)}",
            }
        if run.skipped:
            numbers["skipped"] = f"{run.skipped:,} skipped"
        if share > 0:
            numbers["left"] = f"{in_words(run.seconds * (1 - share) / share)} left"
        self._watch.update(share, numbers)

    def begun(self, optimizer: str) -> None:
        """Show which optimizer's run follows; pass this as `begun` of `gm.training.compare`."""
        self._watch.log({"optimizer": optimizer})

    def evaluated(self, row: dict[str, float], share: float) -> None:
        """Show an evaluation; pass this as `progress`."""
        measured = {name: f"{plain(name, 100)} {four_digits(value)}" for name, value in _measured(row).items()}
        self._watch.log({"step": f"step {row['step']:,.0f}"} | measured)


def show(run: Run, task: str, *, automatic: bool = False, console: Console | None = None) -> None:
    """Print what was trained and how, the last evaluation, and where the model was saved.

    Args:
        run: a finished run.
        task: the name of its task.
        automatic: whether `"auto"` chose its optimizer.
        console: where to print; stdout by default.
    """
    with unpadded(console or Console()) as console:
        steps = f"{run.steps:,} in {in_words(run.seconds)}"
        if run.resumed:
            steps += ", finished before" if run.resumed == run.steps else f", resumed at {run.resumed:,}"
        optimizer = f"{run.optimizer}{' (auto)' if automatic else ''}, learning rate {four_digits(run.lr)}"
        if run.rate_from.startswith("the usual"):
            optimizer += f", {run.rate_from}"
        rows = {"task": task, "optimizer": optimizer, "init": run.init, "steps": steps}
        if run.best_step is not None:
            rows["weights"] = f"of step {run.best_step:,}, the best"
        rows |= {name: four_digits(value) for name, value in _measured(run.metrics).items()}
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(max_width=max(10, console.width // 2 - 2), overflow="fold", style="dim")
        table.add_column(overflow="fold")
        for name, text in rows.items():
            table.add_row(*(Text(plain(part, 500)) for part in (name, text)))  # these may come from a file
        console.print(table, highlight=False)
        console.print()
        if run.skipped:
            why = "the loss or a gradient was not finite"
            console.print(f"{run.skipped:,} steps were skipped: {why}.", highlight=False)
        for row in run.findings:
            console.print(f"{row['severity']}, {plain(told(row), 2000)}", markup=False, highlight=False)
        if run.looks and not run.findings:
            console.print(f"watch: nothing found in {plural(run.looks, 'look')}", highlight=False)
        if run.stopped:
            console.print(f"Stopped early: {plain(run.stopped)}.", markup=False, highlight=False)
        if back := receded(run):
            console.print(back, markup=False, highlight=False)
        if run.diverged:
            console.print("The run diverged and is not finished; no model was written.", highlight=False)
        elif run.out is None:
            console.print("The model was not saved; --out DIR saves it.", highlight=False)
        else:
            console.print(
                f"Model: {plain(run.out / MODEL, 10_000)}", markup=False, highlight=False, soft_wrap=True
            )  # one line, to copy


def show_comparison(runs: dict[str, Run], console: Console | None = None) -> None:
    """Print the numbers of each run's last evaluation side by side, and the curves of their training losses.

    Args:
        runs: by the optimizer's name.
        console: where to print; stdout by default.
    """
    with unpadded(console or Console()) as console:
        losses = [row["loss"] for run in runs.values() for row in run.history if math.isfinite(row["loss"])]
        scale = (min(losses), max(losses)) if losses else (0.0, 1.0)
        table, wide = Table(box=None, pad_edge=False), sum(2 + max(9, len(name)) for name in runs)  # as 1.235e-05
        table.add_column("", max_width=max(10, console.width - wide), overflow="fold", style="dim")
        for name in runs:
            table.add_column(name, overflow="fold")
        table.add_row("rate", *(four_digits(run.lr) for run in runs.values()))
        for key in dict.fromkeys(key for run in runs.values() for key in run.metrics):
            values = (four_digits(run.metrics[key]) if key in run.metrics else "" for run in runs.values())
            table.add_row(Text(plain(key, 100)), *values)
        console.print(table, highlight=False)
        if told := untuned(runs):
            console.print(f"\n{told}", markup=False, highlight=False)
        curves = Table.grid(padding=(0, 2, 0, 0))
        for name, run in runs.items():
            curve = _curve([row["loss"] for row in run.history], *scale)
            curves.add_row(name, Text(curve), "diverged" * run.diverged)
        console.print("\nTraining loss, all on one scale")
        console.print(curves, highlight=False)


def _curve(values: list[float], least: float, greatest: float) -> str:
    """Return numbers as a line of blocks; "!" stands for what is not finite.

    >>> _curve([3.0, 2.0, 1.0, float("nan")], 1.0, 3.0)
    '█▅▁!'
    """
    span = (greatest - least) or 1.0
    places = [round((v - least) / span * (len(BLOCKS) - 1)) if math.isfinite(v) else -1 for v in values]
    return "".join("!" if place < 0 else BLOCKS[place] for place in places)


def _measured(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in ("step", "seconds")}
