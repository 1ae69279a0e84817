"""What commands share: arguments, progress, ranks, and the network that MODEL and --task name."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from gramian.checkpoint.faults import first_line
from gramian.errors import GramianError, GramianWarning, InputError, plain

__all__ = [
    "Model",
    "Quiet",
    "Stages",
    "check_text",
    "complain",
    "num_ranks",
    "path",
    "rank_number",
    "ranks",
    "told_once",
    "with_task",
]


def path(text: str) -> Path:
    """A path that an option names, as its `parser`: an empty one, as of a shell's variable that is not set, is none.

    Python would take it for the folder in which the command runs.
    """
    if not str(text):
        raise typer.BadParameter("an empty path; was a variable of the shell not set?")
    check_text(text, "a path")
    return Path(text)


def check_text(text: str, what: str) -> None:
    """Raise where a path is not UTF-8: it would stand in files that are."""
    try:
        str(text).encode()
    except UnicodeEncodeError:
        raise typer.BadParameter(f"{what} that is not UTF-8: {plain(text, 200)}; rename it") from None


# Arguments that several commands share.
Model = Annotated[str, typer.Argument(help="A .safetensors file, a Hugging Face folder, a .pt state dict, or a task.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def with_task(model: str, task: str | None, verb: str = "inspect") -> tuple[Any, Any] | None:
    """Return the network that MODEL and --task name, and its task; `None` where MODEL is a file without a task.

    A MODEL that is the name of a task and of what is here is the latter beside --task, and the task alone.
    """
    import torch

    from gramian import tasks
    from gramian.checkpoint import load_into, open_checkpoint
    from gramian.checkpoint.trees import UNFINISHED
    from gramian.compression import load_compressed
    from gramian.compression.storage.files import has_ranks

    is_task = model in tasks.TASKS or ".py:" in model or model.endswith(".py")
    if model in tasks.TASKS and Path(model).exists():
        is_task = task is None
        if is_task:
            told = f"{verb}: {model} is the task. For the folder of that name write ./{model} --task {model}"
            warnings.warn(told, GramianWarning, stacklevel=3)
    if task is None and not is_task:
        _check_not_a_module(model, verb)
        return None
    write = f"gramian {verb} {{}}" if is_task else f"gramian {verb} {model} --task {{}}"
    found = tasks.load(model if is_task else str(task), write=write)
    torch.manual_seed(0)  # so that a network that the task draws is the same each time
    network = found.model()
    if not is_task:
        network = load_compressed(network, model) if has_ranks(model) else load_into(network, model)
        if UNFINISHED in open_checkpoint(model).notes:
            complain(f"{model}: {UNFINISHED}")
    return network, found


def _check_not_a_module(model: str, verb: str) -> None:
    """Raise where MODEL is the name of a Python file without its ending, as `tagger` or `tagger:task`."""
    name, _, function = model.partition(":")
    file = Path(f"{name}.py")
    if name and not Path(model).exists() and file.is_file():
        told = f"no such file, folder or task; there is {file}. A function in it that returns a gm.Task is one"
        raise InputError(f"{model}: {told}: gramian {verb} {file}:{function or 'task'}")


@contextmanager
def ranks(timeout: float = 1800.0) -> Iterator[bool]:
    """Join torchrun's process group, if there is one; yields whether this process prints.

    A collective that waits longer than `timeout` seconds fails.
    """
    if num_ranks() < 2:
        yield True
        return
    from torch import distributed

    patience = timedelta(seconds=timeout)
    _ = rank_number(), _of_environment("MASTER_PORT", 0, range(2**16))  # or they are refused
    try:
        store, rank, size = next(distributed.rendezvous("env://", timeout=patience))
    except (ValueError, RuntimeError) as error:  # of the environment, or of the network
        raise InputError(f"the processes do not find each other: {first_line(error)}. Start them by torchrun") from None
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun on one machine keeps the store when it starts the processes again, and with it the addresses of those
        # that are gone. On several machines the counts may differ, and its c10d rendezvous makes a new store each time.
        store = distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
    try:
        yield distributed.get_rank() == 0
    finally:
        distributed.destroy_process_group()


@contextmanager
def told_once() -> Iterator[None]:
    """A context in which an error that all ranks raise is told by the one that failed; the others exit with 2."""
    try:
        yield
    except GramianError as error:
        if error.rank not in (None, rank_number()):
            raise typer.Exit(2) from None
        raise


class Stages:
    """Progress on stderr, one line for each stage."""

    def __init__(self, quiet: bool) -> None:
        self.progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            TimeElapsedColumn(),
            TextColumn("{task.fields[remark]}", markup=False),
            console=Console(stderr=True),
            disable=quiet,
        )
        self.lines: dict[str, Any] = {}

    def __call__(self, stage: str, share: float, remark: str) -> None:
        if not self.lines:
            self.progress.start()
        if stage not in self.lines:
            self.lines[stage] = self.progress.add_task(stage, total=1.0, remark="")
        self.progress.update(self.lines[stage], completed=share, remark=remark)

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, error: object, *rest: object) -> None:
        if not self.lines:
            return
        if error is None:
            self.progress.stop()
        else:  # leave no frame of a stage that did not end; Progress.stop would print a line outside a terminal
            self.progress.live.transient = True
            self.progress.live.stop()


def complain(message: str) -> None:
    print(f"gramian: {plain(' '.join(message.split()), len(message))}", file=sys.stderr)


def num_ranks() -> int:
    """How many processes torchrun started; one without it."""
    return _of_environment("WORLD_SIZE", 1, range(1, 2**20))


def rank_number() -> int:
    """This process's number under torchrun."""
    return _of_environment("RANK", 0, range(num_ranks()))


def _of_environment(name: str, default: int, known: range) -> int:
    """What torchrun writes into the environment."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) in known):
        raise InputError(
            f"{name} in the environment must be a number from {known[0]} to {known[-1]}, as torchrun sets it; got "
            f"{plain(text, 50)!r}"
        )
    return int(text)
