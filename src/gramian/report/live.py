"""Progress of a long run: a bar with numbers on a terminal, lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gramian.errors import plain

__all__ = ["Watch", "four_digits"]

REFRESHES_PER_SECOND = 4


class Watch:
    """A context manager that shows progress: a bar redrawn in place on a terminal, elsewhere one line per `log`.

    Args:
        what: a word for the work.
        console: where to print; stderr by default.
        quiet: show nothing.

    >>> import io
    >>> console = Console(file=io.StringIO(), width=60)
    >>> with Watch("train", console=console) as watch:
    ...     watch.update(0.5, {"step": "step 50"})
    ...     watch.log({"loss": "loss 0.69"})
    >>> console.file.getvalue()
    'train  50%  loss 0.69\\n'
    """

    def __init__(self, what: str, *, console: Console | None = None, quiet: bool = False) -> None:
        self.what, self.share = what, 0.0
        self.numbers: dict[str, str] = {}
        self.console = console or Console(stderr=True)
        self.quiet = quiet
        self._begin = time.monotonic()
        self._live = Live(
            console=self.console,
            get_renderable=self._render,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
        )

    def __enter__(self) -> Watch:
        if not self.quiet and self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live.is_started:
            self._live.stop()

    def update(self, share: float, numbers: Mapping[str, str]) -> None:
        """Set the share that is done, and texts by key, which replace earlier ones; cheap enough for every step."""
        self.share = share
        self.numbers.update(numbers)

    def log(self, numbers: Mapping[str, str]) -> None:
        """Update the texts, and print them as a line where there is no terminal."""
        self.numbers.update(numbers)
        if not self.quiet and not self.console.is_terminal:
            line = f"{self.what} {self.share:4.0%}  {'  '.join(numbers.values())}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line that stays, above the progress."""
        if not self.quiet:
            self.console.print(plain(text, 2000), markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        bar = Table.grid(padding=(0, 1), expand=False)
        bar.add_row(
            self.what,
            ProgressBar(total=1.0, completed=self.share, width=max(8, min(30, self.console.width - 24))),
            f"{self.share:4.0%}",
            _clock(time.monotonic() - self._begin),
        )
        return Group(bar, Text(_filled(self.numbers.values(), self.console.width), style="dim"))


def four_digits(value: float) -> str:
    """Return a number with four significant digits."""
    return f"{value:.4g}"


def _filled(texts: Iterable[str], width: int) -> str:
    """Return the texts in lines of at most `width`, none of them broken.

    >>> _filled(["loss 0.69", "accuracy 0.5"], 24)
    'loss 0.69 · accuracy 0.5'
    >>> _filled(["loss 0.69", "accuracy 0.5"], 23).splitlines()
    ['loss 0.69', 'accuracy 0.5']
    """
    lines: list[str] = []
    for text in texts:
        if lines and len(lines[-1]) + 3 + len(text) <= width:
            lines[-1] += f" · {text}"
        else:
            lines.append(text)
    return "\n".join(lines)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
