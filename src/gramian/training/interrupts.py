"""Ctrl-C and SIGTERM during a run: it ends after the step that it is in, so that it can be kept."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from types import FrameType
from typing import Any

from gramian.errors import GramianWarning

__all__ = ["Interrupts", "end", "is_interruption"]

# Seconds that a step may go on after SIGTERM, with its evaluation: whoever sends it often kills after 30.
PATIENCE = 20.0

# Seconds after which a step that goes on after Ctrl-C is told of.
SILENCE = 3.0

HANDLED = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """A context that notes Ctrl-C and SIGTERM instead of ending the process; a second one ends it at once.

    So does the first SIGTERM where the step does not end within `PATIENCE` seconds, which is then taken to hang.

    A signal for which the program has a handler of its own, or that it ignores, is left alone (the handler of the
    command line gives way), and so are all of them outside the main thread, where Python has no handlers.

    The context ends with what a signal stands for that it noted and nobody acted on; also in place of an error that the
    workers of a DataLoader were killed, which get the signal too where it is sent to the whole group. A signal that the
    command line noted before, and whose exception was lost, ends the process when the context begins.

    Args:
        active: whether to note signals at all.

    >>> try:
    ...     with Interrupts() as interrupts:
    ...         signal.raise_signal(signal.SIGTERM)
    ...         print(interrupts.received == signal.SIGTERM)
    ... except SystemExit as ended:
    ...     print(ended.code)
    True
    143
    """

    def __init__(self, *, active: bool = True) -> None:
        self.active, self.received = active, 0
        self._timer: threading.Timer | None = None
        self.is_writing = False  # the finished model, which may take long and is not cut short
        self._before: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED:
                before = signal.getsignal(number)
                if getattr(before, "received", 0):
                    end(number)
                if not self.active:
                    continue
                gives_way = type(before).__module__.startswith("gramian.cli")
                if gives_way or before in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def reached(self) -> None:
        """Tell that the step, with its evaluation, has ended, so that it does not hang."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.reached()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.received and (error is None or (isinstance(error, Exception) and "DataLoader worker" in str(error))):
            end(self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker's, forked by the run, which Ctrl-C reaches too: the run ends it
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        if self.received:
            end(number)
        self.received = number
        if number == signal.SIGINT:
            self._timer = threading.Timer(SILENCE, _tell)
        elif not self.is_writing:
            self._timer = threading.Timer(PATIENCE, signal.pthread_kill, [threading.get_ident(), number])
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()


def _tell() -> None:
    warnings.warn(
        "train: interrupted; the run ends, and is kept, after the step that it is in. Ctrl-C again ends it at once",
        GramianWarning,
        stacklevel=1,
    )


def is_interruption(error: BaseException) -> bool:
    """Whether an exception is Ctrl-C, or the exit that stands for a signal; any other exit is an error of its code."""
    number = error.code - 128 if isinstance(error, SystemExit) and isinstance(error.code, int) else 0
    return isinstance(error, KeyboardInterrupt) or 0 < number < signal.NSIG


def end(number: int) -> None:
    """Raise what a signal stands for: `KeyboardInterrupt` for Ctrl-C, else an exit with 128 and its number."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
