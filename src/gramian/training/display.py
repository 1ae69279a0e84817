"""A training run on the terminal: its progress, and a summary at the end."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gramian.checkpoint.faults import plain
from gramian.report.live import Watch, four_digits
from gramian.training.folder import MODEL
from gramian.training.task import Run

__all__ = ["Watched", "show"]


class Watched:
    """Shows a run's progress on stderr, through the two callbacks of `gm.train`."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self._watch = Watch("train", quiet=quiet, console=console)

    def __enter__(self) -> Watched:
        self._watch.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._watch.__exit__(*error)

    def stepped(self, run: Run, share: float) -> None:
        """Show step, speed, rate and time left; pass this as `on_step`."""
        numbers = {"step": f"step {run.steps:,}"}
        if run.seconds > 0:
            numbers |= {
                "speed": f"{four_digits(run.steps / run.seconds)} steps/s",
                "rate": f"rate {four_digits(run.rate)}",
            }
        if run.skipped:
            numbers["skipped"] = f"{run.skipped:,} skipped"
        if share > 0:
            numbers["left"] = f"{_duration(run.seconds * (1 - share) / share)} left"
        self._watch.update(share, numbers)

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
    console = console or Console()
    steps = f"{run.steps:,} in {_duration(run.seconds)}"
    if run.resumed:
        steps += ", finished before" if run.resumed == run.steps else f", resumed at {run.resumed:,}"
    optimizer = f"{run.optimizer}{' (auto)' if automatic else ''}, learning rate {four_digits(run.lr)}"
    rows = {"task": task, "optimizer": optimizer, "init": run.init, "steps": steps}
    rows |= {name: four_digits(value) for name, value in _measured(run.metrics).items()}
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(max_width=max(10, console.width // 2 - 2), overflow="fold", style="dim")
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(*(Text(plain(part, 500)) for part in (name, text)))  # these may come from a file
    console.print(table, highlight=False)
    console.print()
    if run.skipped:
        console.print(f"{run.skipped:,} steps were skipped: the loss or a gradient was not finite.", highlight=False)
    if run.stopped:
        console.print(f"Stopped early: {plain(run.stopped)}.", markup=False, highlight=False)
    if run.diverged:
        console.print("The run diverged and is not finished; no model was written.", highlight=False)
    elif run.out is None:
        console.print("The model was not saved; --out DIR saves it.", highlight=False)
    else:
        console.print(
            f"Model: {plain(run.out / MODEL, 10_000)}", markup=False, highlight=False, soft_wrap=True
        )  # one line, to copy


def _measured(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in ("step", "seconds")}


def _duration(seconds: float) -> str:
    """Return seconds as text in suitable units.

    >>> _duration(3.21), _duration(74), _duration(4020)
    ('3.2 s', '1 min 14 s', '1 h 07 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
