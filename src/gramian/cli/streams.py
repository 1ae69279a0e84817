"""Standard output and error that may be full or closed: what is written there is lost, and the work goes on."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

__all__ = ["Lasting", "protect", "reason_lost"]


class Lasting(io.TextIOWrapper):
    """A text stream whose first failure is kept in `failure`, after which all that is written goes nowhere.

    Args:
        stream: the one that it takes the place of.
    """

    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write, or drop."""
        if self.closed:  # by the user's code
            return len(text)
        try:
            super().write(text)
        except OSError as error:
            self._failed(error)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop."""
        if self.closed:
            return
        try:
            super().flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        self.failure = self.failure or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # what the buffers still hold would fail again when the process ends
        os.close(nowhere)


def protect() -> None:
    """Make standard output and error last."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and not isinstance(stream, Lasting):
            stream.flush()
            setattr(sys, name, Lasting(stream))


def reason_lost() -> str:
    """Why standard output was lost; empty where it was not, or where its reader went away, as `head` does."""
    if isinstance(sys.stdout, Lasting):
        sys.stdout.flush()
        failure = sys.stdout.failure
        if failure is not None and not isinstance(failure, BrokenPipeError):
            return failure.strerror or str(failure)
    return ""
