"""Functions on several ranks: processes under gloo that stay alive, so that many tests share the cost of their start.

    run_on_ranks(function, 2, *arguments)      # [function(*arguments) on rank 0, on rank 1]

The function is a top-level one of a test module, and its result picklable. What it raises, or a rank that does not come
back in time, fails the test with the rank's traceback, and ends the processes: the next call starts others.

A process that crashes in C (the heap of torch 2.13 under gloo was corrupt once in some ten thousand calls;
no line of this library is C) says where on stderr and in a warning, and the call is made once more in new processes.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 600.0  # after which a call counts as hung, however busy the machine
IMPORTED = ["torch.distributed.fsdp", "torch.distributed.tensor", "sklearn.datasets", "pytest", "einops"]  # takes 4 s
CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)
GRACE = 3.0  # seconds in which the other ranks can report an error of their own after a first one has failed


class RankError(AssertionError):
    """A function failed on a rank; the message holds the rank's traceback."""


class RankCrash(RankError):
    """A rank's process was ended by one of the signals `CRASHES`."""


class Ranks:
    """`num_ranks` processes in one gloo group that run the functions that they are sent."""

    def __init__(self, num_ranks: int) -> None:
        # Forks of a process that has only imported: threads of this one's torch would not survive a fork.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self.folder = tempfile.TemporaryDirectory()
        self.processes, self.pipes = [], []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            arguments = (rank, num_ranks, os.path.join(self.folder.name, "store"), theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = SECONDS) -> list[Any]:
        message = pickle.dumps((function, args))
        for pipe in self.pipes:
            pipe.send_bytes(message)
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + seconds
        while len(results) + len(errors) < len(self.pipes):
            waiting = [p for r, p in enumerate(self.pipes) if r not in results and r not in errors]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = [r for r, p in enumerate(self.pipes) if p in waiting]
                for rank in silent:  # says on stderr where it is
                    os.kill(self.processes[rank].pid or 0, signal.SIGUSR1)
                time.sleep(1.0)
                errors.update(dict.fromkeys(silent, f"no answer within {seconds:.0f} s"))
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    failed, value = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    failed, value = True, self._death(rank)
                (errors if failed else results)[rank] = value
                if failed:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if errors:
            self.close()
            reports = "\n".join(f"rank {rank} of {len(self.pipes)}:\n{text}" for rank, text in sorted(errors.items()))
            crashed = any(process.exitcode in [-number for number in CRASHES] for process in self.processes)
            raise (RankCrash if crashed else RankError)(f"{function.__qualname__} failed\n{reports}")
        return [results[rank] for rank in range(len(self.pipes))]

    def _death(self, rank: int) -> str:
        """How the process of `rank` ended, whose pipe is closed."""
        self.processes[rank].join(GRACE)
        code = self.processes[rank].exitcode
        return f"the process died by {signal.Signals(-code).name}" if code and code < 0 else f"it ended with {code}"

    def close(self, seconds: float = 0.0) -> None:
        """Ends the processes: by themselves within `seconds`, which coverage needs to write what it saw, or killed."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(seconds)
            process.kill()
            process.join()
        self.folder.cleanup()


_started: dict[int, Ranks] = {}


def run_on_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, seconds: float = SECONDS) -> list[Any]:
    """What `function(*args)` returns on each rank, by rank."""
    try:
        return _run(function, num_ranks, *args, seconds=seconds)
    except RankCrash as crash:
        warnings.warn(f"made once more after a crash: {crash}", stacklevel=2)
        return _run(function, num_ranks, *args, seconds=seconds)


def _run(function: Callable[..., Any], num_ranks: int, *args: Any, seconds: float) -> list[Any]:
    if num_ranks not in _started:
        _started[num_ranks] = Ranks(num_ranks)
    try:
        return _started[num_ranks].run(function, *args, seconds=seconds)
    except RankError:
        del _started[num_ranks]
        raise


@atexit.register
def _close_all() -> None:
    for ranks in _started.values():
        ranks.close(seconds=5.0)


def _serve(rank: int, num_ranks: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    faulthandler.enable(all_threads=True)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=SECONDS)
    )
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the parent is gone
            return
        torch.manual_seed(0)  # what is drawn does not depend on the calls before
        try:
            answer = pickle.dumps((False, function(*args)))
        except BaseException:
            answer = pickle.dumps((True, traceback.format_exc()))
        pipe.send_bytes(answer)
