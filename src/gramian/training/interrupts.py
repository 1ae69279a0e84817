"""Ctrl-C and SIGTERM during a run: it ends after the step that it is in, so that it can be kept."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from gramian.errors import GramianWarning

__all__ = ["Interrupts", "end", "is_interruption", "noticing"]

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
    workers of a DataLoader were killed, which get the signal too where it is sent to the whole group. A signal whose
    exception was raised and lost ends the process when the context begins.

    Args:
        active: whether to note signals in place of raising their exceptions; otherwise only those that were lost.

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
        self.active, self._noted = active, 0
        self._raising: list[Any] = []  # handlers that raise, and note it
        self._timer: threading.Timer | None = None
        self.is_writing = False  # the finished model, which may take long and is not cut short
        self._before: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    @property
    def received(self) -> int:
        """The signal that is to end the run; zero without one."""
        received = self._noted
        if not received:
            for handler in self._raising:
                received = max(received, handler.received)
        return received

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._raising = _raising()
            _end_if_lost(self._raising)
            for number in HANDLED if self.active else ():
                before = signal.getsignal(number)
                if before in self._raising or before in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def reached(self) -> None:
        """Tell that the step, with its evaluation, has ended, so that it does not hang."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.reached()
        for number, handler in reversed(self._before.items()):  # Ctrl-C last: its own handler raises
            signal.signal(number, handler)
        if self.received and (error is None or (isinstance(error, Exception) and "DataLoader worker" in str(error))):
            end(self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker's, forked by the run, which Ctrl-C reaches too: the run ends it
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        if self._noted:
            end(number)
        self._noted = number
        if number == signal.SIGINT:
            self._timer = threading.Timer(SILENCE, _tell)
        elif not self.is_writing:
            self._timer = threading.Timer(PATIENCE, signal.pthread_kill, [threading.get_ident(), number])
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()


class _Raising:
    """A handler of Ctrl-C that raises what Python's own raises, and notes it, as the command line's does."""

    def __init__(self) -> None:
        self.received = 0

    def __call__(self, number: int, frame: FrameType | None) -> NoReturn:
        self.received = number
        end(number)


def _raising() -> list[Any]:
    """The present handlers that raise what a signal stands for, and have noted in `received` that they did."""
    return [handler for handler in map(signal.getsignal, HANDLED) if hasattr(handler, "received")]


@contextmanager
def noticing() -> Iterator[None]:
    """A context in which Ctrl-C raises `KeyboardInterrupt` as ever, and ends the run also where that is lost.

    Python drops what is raised in a callback or in `__del__`, and torch's import drops it or makes another error of it.
    The run then ends where `Interrupts` looks, before the first step and after each, or else with this context.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, own = signal.getsignal(signal.SIGINT), _Raising()
    handlers: list[Any] = []
    try:
        if before == signal.default_int_handler:
            signal.signal(signal.SIGINT, own)
        handlers = _raising()
        yield
    except Exception:  # perhaps what the exception was turned into
        _end_if_lost(handlers)
        raise
    else:
        _end_if_lost(handlers)
    finally:
        if signal.getsignal(signal.SIGINT) is own:
            signal.signal(signal.SIGINT, before)


def _end_if_lost(handlers: list[Any]) -> None:
    for handler in handlers:
        if handler.received:
            end(handler.received)


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


def end(number: int) -> NoReturn:
    """Raise what a signal stands for: `KeyboardInterrupt` for Ctrl-C, else an exit with 128 and its number."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
