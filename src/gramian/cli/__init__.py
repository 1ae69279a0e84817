"""The command line: parse, call, print; nothing else. Exit codes: 0 fine, 1 findings, 2 bad input."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import traceback
import warnings
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

import gramian
from gramian.cli import bench, compress, demo, doctor, inspect, train
from gramian.cli.common import complain
from gramian.cli.streams import protect, reason_lost
from gramian.errors import GramianError, GramianWarning, plain

__all__ = ["app", "main", "program"]

# typer has its own copy of click: these are the base classes of an error that it exports.
UsageError = typer.BadParameter.__bases__[0]
ClickException = UsageError.__bases__[0]


app = typer.Typer(
    help="See a network as its matrices: diagnose, repair, train and compress it.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"gramian {gramian.__version__}")
        raise typer.Exit


WELCOME = """\
gramian {version}: see a network as its matrices

What is wrong with it? gramian inspect model.safetensors --html report.html
Train one              gramian train digits --steps 350 --out run
Make one smaller       gramian compress run --task digits --keep 0.5 --out small
See it all in a minute gramian demo
Is this machine ready? gramian doctor

Each has --help; all commands: gramian --help"""


HINTS = {"watch": "A training is watched by gramian train --watch, and your own loop by gm.watch in Python. "}
"""What to say where somebody looks for a command that is none."""


@app.callback(invoke_without_command=True)
def _common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """See a network as its matrices: diagnose, repair, train and compress it."""
    if context.invoked_subcommand is None:
        print(WELCOME.format(version=gramian.__version__))


app.command("demo", short_help="Diagnose, repair, train and compress a network in a minute.")(demo.command)
app.command("inspect", short_help="Find what is wrong with a network, with causes and remedies.")(inspect.command)
app.command("train", short_help="Train a task's network, and go on after any interruption.", cls=train.WithOptimizers)(
    train.command
)
app.command("compress", short_help="Make a model smaller, to a share, a quality or a speed.")(compress.command)
app.command("bench", short_help="Time gramian on this machine against the peers installed.")(bench.command)
app.command("doctor", short_help="Show versions, the processor, and what is installed.")(doctor.command)


def main(args: list[str] | None = None) -> int:
    """Run the command line and return the exit code; a user's error is one line on stderr."""
    warnings.showwarning = _show_warning
    args = sys.argv[1:] if args is None else args
    try:
        code = app(args=args, prog_name="gramian", standalone_mode=False)
    except GramianError as error:
        complain(str(error))
        return 2
    except ClickException as error:  # type: ignore[misc]
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "gramian"
        told = error.format_message()  # type: ignore[attr-defined]
        hint = HINTS.get(args[0], "") if args and told.startswith("No such command") else ""
        complain(f"{told}{'' if told.endswith(('.', '?')) else '.'} {hint}See '{where} --help'.")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        complain("interrupted")
        return 130
    except BaseException as error:
        told = _of_a_task(error)
        if told is None:
            if not isinstance(error, Exception):
                raise
            traceback.print_exc()
            return 3
        complain(told)
        return 2
    return code if isinstance(code, int) else 0


def _of_a_task(error: BaseException) -> str | None:
    """What an exception says that a task's own code raised, `sys.exit()` too; `None` for any other and a signal's."""
    if "gramian.training" not in sys.modules:
        return None  # no task was loaded
    from gramian.training.task import described, is_of_user

    return f"the task raised {described(error)}" if is_of_user(error) else None


def program() -> NoReturn:
    """Run the command line as a process of its own and end it with the exit code.

    SIGTERM ends it with 143, after what has to be undone, such as a half-written file; `gm.train` saves its run first.
    Standard output or error that is full or closed ends nothing: the rest of it is lost. A full standard output makes
    the code 2, with a line; a reader that went away, as `head` does, changes none.

    Once the exit code is known, and the exit functions have run, it ends with that code: Python restores the signal's
    default while it still takes the interpreter apart, which would turn a finished run into a killed one.

    A rank of torchrun ends without finalizing the interpreter. DistributedDataParallel keeps the threads of its process
    group, and Python before 3.14 unwinds a thread that asks for the GIL during finalization, through C++ frames that
    may not be unwound: now and then a run that was finished and written ended with "terminate called without an active
    exception" and exit code 134.
    """
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, Ending())
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, Ending())
        atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)  # registered first, so that it runs last
    protect()
    code = main()
    lost = reason_lost()
    if lost:
        complain(f"what was to be printed could not be written ({lost}); the work itself is done")
        code = code or 2
    if os.environ.get("WORLD_SIZE", "1") != "1":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's to all, where one rank ended with an error
        atexit._run_exitfuncs()  # of the user's task and its loggers
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class Ending:
    """The handler of a signal that is to end the process: it raises what the signal stands for, and notes it.

    Python drops what is raised in a callback or in `__del__`: then the run acts on the note. While a module is
    imported, the process ends at once: torch's import drops the exception, or turns it into another.
    """

    def __init__(self) -> None:
        self.received = 0

    def __call__(self, number: int, frame: FrameType | None) -> NoReturn:
        self.received = number
        while frame is not None:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                complain("interrupted" if number == signal.SIGINT else "terminated")
                os._exit(128 + number)
            frame = frame.f_back
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **kwargs: Any) -> None:
    if issubclass(category, GramianWarning):
        print(f"gramian: warning: {plain(message, len(str(message)))}", file=sys.stderr)
