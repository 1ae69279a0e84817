"""Which rank is at fault where the others cannot be told: it is gone, it hangs, or they wait for its part of a model.

A rank that waits in a collective learns only that the connection broke, or that time ran out. So each rank leaves its
process's number in the group's store before it begins. One whose collective fails says there that it is alive, and
looks for ranks that do not: those of its machine whose process has ended are gone, at once, and others are lost if they
do not answer. The first rank that knows writes it down, and all others read it: what they see later, when that rank has
ended too, is no cause.

torchrun ends all ranks by SIGTERM as soon as it sees one that is gone, which may be before any collective fails: while
a rank loads its data, say. So a rank that a signal ends looks too, and leaves a note that it was a signal.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from gramian import placement
from gramian.checkpoint.faults import first_line
from gramian.errors import TaskError, some
from gramian.training.interrupts import is_interruption

__all__ = ["failed_collective", "naming_the_lost"]

# How long ranks that noticed a loss wait for the others' answers, and that time ran out: those who still compute learn
# of it at their next collective.
ANSWER_SECONDS, HANG_SECONDS = 3.0, 1.5

# Of one rank, and of several.
VERBS = {"hangs": ("hangs", "hang"), "gone": ("is gone", "are gone"), "ended": ("was interrupted", "were interrupted")}

TORCH = str(Path(torch.__file__).parent) + os.sep
COLLECTIVES = os.path.join(TORCH, "distributed") + os.sep

# The runs of this process so far: the same number on all ranks, for the names in the store.
_RUNS = itertools.count()


@contextmanager
def naming_the_lost() -> Iterator[None]:
    """A context that turns the error of a collective, which waited in vain, into one that names the ranks at fault.

    Any other error is noted in the store, for ranks that wait for this one. Inside another one it does nothing.
    """
    if not placement.is_distributed() or _Roll.is_open:
        yield
        return
    roll = _Roll()
    _Roll.is_open = True
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if is_interruption(error):
            with _undisturbed():
                lost = roll.lost(error)
                if lost is not None:
                    raise lost from error
        raise
    except Exception as error:
        cause = failed_collective(error)
        if cause is not None:
            with _undisturbed():
                raise roll.named(cause) from error
        if getattr(error, "rank", None) in (None, roll.rank):
            roll.write([roll.rank], "failed")
        raise
    finally:
        _Roll.is_open = False


def failed_collective(error: BaseException) -> RuntimeError | None:
    """The error that a collective of torch's raised, if that is the error or its cause; `None` otherwise."""
    found: BaseException | None = error
    while found is not None:
        files = [frame.filename for frame in traceback.extract_tb(found.__traceback__)]
        inside = list(itertools.takewhile(lambda file: file.startswith(TORCH), reversed(files)))
        if isinstance(found, RuntimeError) and any(file.startswith(COLLECTIVES) for file in inside):
            return found
        found = found.__cause__
    return None


class _Roll:
    """The names of a run in the store of the process group, through which ranks speak when collectives fail."""

    is_open = False

    def __init__(self) -> None:
        from torch.distributed import distributed_c10d

        self.rank, self.size = placement.world()
        self._store = distributed_c10d._get_default_store()
        self._name = f"gramian/train/{next(_RUNS)}"
        self._store.set(self._key("process", self.rank), json.dumps([_machine(), os.getpid()]))

    def write(self, ranks: list[int], how: str) -> dict[str, Any]:
        """Note which ranks are at fault, unless another one did before; returns what stands there."""
        text = json.dumps({"by": self.rank, "ranks": ranks, "how": how})
        with suppress(RuntimeError, ValueError):  # the process that held the store is gone
            text = self._store.compare_set(self._key("fault"), "", text).decode()
        return json.loads(text)

    def named(self, error: RuntimeError) -> TaskError:
        """The error that names the ranks that are at fault for that of a collective."""
        try:
            fault = self._look(hangs="timed out" in str(error).lower())
        except (RuntimeError, ValueError):
            return TaskError(
                f"train: rank {self.rank} of {self.size} lost the other ranks ({first_line(error)}). See their own "
                "errors"
            )
        return self._told(fault, error)

    def lost(self, error: BaseException) -> TaskError | None:
        """The error that names the ranks that are at fault where this one is ended by a signal, if any are known."""
        try:
            self._store.set(self._key("signal", self.rank), "1")
            if not self._store.check([self._key("fault")]):
                ended = [rank for rank in range(self.size) if rank != self.rank and self._has_ended(rank)]
                gone = [rank for rank in ended if not self._store.check([self._key("signal", rank)])]
                if not gone:
                    return None
                self.write(gone, "gone")
            return self._told(json.loads(self._store.get(self._key("fault"))), error)
        except (RuntimeError, ValueError):  # the process that held the store is gone
            return None

    def _told(self, fault: dict[str, Any], error: BaseException) -> TaskError:
        """The error for a fault that was noted."""
        ranks, how = fault["ranks"], fault["how"]
        if not ranks:
            return TaskError(f"train: a collective failed on rank {self.rank} of {self.size}: {first_line(error)}")
        what = f"{some([f'rank {rank}' for rank in ranks])} of {self.size}"
        if how == "failed":
            named = TaskError(f"train: {what} failed. See its own error")
        else:
            verb = VERBS[how][len(ranks) > 1]
            named = TaskError(f"train: {what} {verb}; the others waited in vain and end. See its last output")
        if fault["by"] != self.rank:
            named.rank = ranks[0]  # another rank says so
        return named

    def _look(self, *, hangs: bool) -> dict[str, Any]:
        """Wait until it is known which ranks are at fault."""
        self._store.set(self._key("alive", self.rank), "1")
        silent = set(range(self.size)) - {self.rank}
        until = time.monotonic() + (HANG_SECONDS if hangs else ANSWER_SECONDS)
        while not self._store.check([self._key("fault")]):
            silent = {rank for rank in silent if not self._store.check([self._key("alive", rank)])}
            ended = {rank for rank in silent if self._has_ended(rank)}
            if ended or not silent or time.monotonic() > until:
                if ended and all(self._store.check([self._key("signal", rank)]) for rank in ended):
                    return self.write(sorted(ended), "ended")
                return self.write(sorted(ended or silent), "hangs" if hangs and not ended else "gone")
            time.sleep(0.02)
        return json.loads(self._store.get(self._key("fault")))

    def _has_ended(self, rank: int) -> bool:
        """Whether it is known that the rank's process has ended: that can be seen on its own machine only."""
        if not self._store.check([self._key("process", rank)]):
            return False
        machine, process = json.loads(self._store.get(self._key("process", rank)))
        if machine != _machine() or not os.path.exists("/proc/self/stat"):
            return False
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return True
        return state in "ZX"  # it ended, and its parent has not looked yet

    def _key(self, *parts: object) -> str:
        return "/".join(map(str, (self._name, *parts)))


def _machine() -> str:
    """What processes share whose numbers can be compared."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A context without SIGTERM, which torchrun sends to all as soon as one is gone: the line comes first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
