"""The command line: parse, call, print; nothing else. Exit codes: 0 fine, 1 findings, 2 bad input."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from typer.core import TyperCommand

import gramian
from gramian.checkpoint.faults import plain
from gramian.errors import GramianError, GramianWarning, InputError

__all__ = ["app", "main", "program"]

# typer has its own copy of click: these are the base classes of an error that it exports.
UsageError = typer.BadParameter.__bases__[0]
ClickException = UsageError.__bases__[0]

app = typer.Typer(
    help="See a network as its matrices: diagnose, repair, train and compress it.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


# Arguments that several commands share.
Model = Annotated[str, typer.Argument(help="A .safetensors file, a Hugging Face folder, a .pt state dict, or a task.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


class FailOn(StrEnum):
    """The least severe finding for which `inspect` exits with 1."""

    error = "error"
    warning = "warning"
    info = "info"
    never = "never"


def _version(asked: bool) -> None:
    if asked:
        print(f"gramian {gramian.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """See a network as its matrices: diagnose, repair, train and compress it."""


@app.command("demo")
def demo_command(
    depth: Annotated[int, typer.Option(help="Layers of the plain tanh network.", min=3)] = 100,
    classes: Annotated[int, typer.Option(help="2: odd or even?  10: which digit?")] = 2,
    seed: Annotated[int, typer.Option(help="Of the split, the initialization and the batches.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the report and the models.")] = Path("gramian-demo"),
    seconds: Annotated[
        float | None, typer.Option(help="Training time of each of the four runs. [default: 12 at depth 100]", min=0.1)
    ] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw pictures in the report.")] = True,
    quiet: Quiet = False,
) -> None:
    """Diagnose, repair, train and compress a network that cannot learn, on handwritten digits."""
    from gramian import demo

    with _Stages(quiet) as stages:
        story = demo.run(
            depth=depth, classes=classes, seed=seed, out=out, plots=plots, seconds=seconds, progress=stages
        )
    if quiet:
        return
    numbers = story.summary()
    console = Console()
    console.print()
    console.print(f"  logistic regression   {numbers['accuracy_logistic']:7.1%}", highlight=False)
    console.print(f"  untreated             {numbers['accuracy_untreated']:7.1%}", highlight=False)
    console.print(f"  repaired and trained  {numbers['accuracy_trained']:7.1%}", highlight=False)
    share = numbers["parameters_compressed"] / numbers["parameters"]
    console.print(f"  compressed to {share:4.0%}    {numbers['accuracy_compressed']:7.1%}", highlight=False)
    console.print(f"\nReport: {out / 'report.html'}", highlight=False, soft_wrap=True)


@app.command("inspect")
def inspect_command(
    model: Model,
    task: Annotated[str | None, typer.Option(help="Task whose model and data go with the weights.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Another checkpoint: the spectrum of every difference MODEL − OTHER.")
    ] = None,
    extract_lora: Annotated[
        int | None, typer.Option(help="With --against: write the difference as a PEFT adapter of this rank.", min=1)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")] = Path("adapter"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Norms and ranks with error bounds, from a few products.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Try each remedy on a copy by 50 training steps; offer what helps.")
    ] = False,
    curvature: Annotated[
        bool, typer.Option("--curvature", help="With a task: also the leading eigenvalues of the loss's Hessian.")
    ] = False,
    layouts: Annotated[
        Path | None,
        typer.Option(help="JSON that maps name patterns to layouts, for fused tensors of unknown architectures."),
    ] = None,
    input_size: Annotated[int, typer.Option(help="Side of the images for convolutions' operator norms.", min=1)] = 32,
    html: Annotated[Path | None, typer.Option(help="Write the report as a page.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report as JSON.")] = None,
    fail_on: Annotated[FailOn, typer.Option(help="Exit with 1 for findings of this severity or worse.")] = FailOn.never,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show every layer.")] = False,
    quiet: Quiet = False,
) -> None:
    """Find what is wrong with a network, with evidence, causes and remedies.

    From a file: the spectra of its weights. From a task, or a file with a task: also the size of signals and gradients,
    the gain of each layer, and the end-to-end Jacobian.
    """
    from gramian import report
    from gramian.report import SEVERITIES

    for path in (html, json):
        if path is not None:
            report.check_target(path)
    if extract_lora is not None and against is None:
        raise InputError("--extract-lora needs --against BASE: an adapter is a difference from a base model")
    options: dict[str, Any] = {"quick": quick, "input_size": (input_size, input_size)}
    if verify and against is not None:
        raise InputError("--verify tries the remedies of one model; --against compares two")
    if verify:
        options["verify"] = True
    if curvature and against is not None:
        raise InputError("--curvature is that of one model's loss; leave out --against")
    if layouts is not None:
        from gramian.inspection.matrices import read_layouts

        options["layouts"] = read_layouts(layouts)
    with _ranks() as first, _Stages(quiet or not first) as tell:

        def progress(what: str, done: int, total: int) -> None:
            tell(what, done / max(1, total), "")

        if against is not None:
            found = _compare(model, against, task, extract_lora, out, options | {"progress": progress})
        else:
            found = _inspect(model, task, options | {"curvature": curvature, "progress": progress})
        if not found.layers and against is None:
            reasons = "".join(f". {note}" for note in found.notes)
            raise InputError(
                f"{model}: nothing was inspected, since it holds no matrix that is known{reasons}. "
                "Give a model with weight matrices, or --layouts for tensors of unknown names."
            )
    if not first:
        return
    for path in (html, json):
        if path is not None:
            found.save(path)
    if not quiet:
        report.show(found, verbose=verbose)
    broken = next((f for f in found.findings if f.code == "non-finite-weights"), None)
    if broken is not None:
        _complain(f"{model}: {broken.title}. {broken.remedy}")
        raise typer.Exit(2)
    if fail_on is not FailOn.never:
        grave = SEVERITIES[: SEVERITIES.index(fail_on.value) + 1]
        if any(f.severity in grave for f in found.findings):
            raise typer.Exit(1)


class _WithOptimizers(TyperCommand):
    """A command whose help ends with the table of optimizers, read only then, since it loads torch."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from gramian.optim.registry import AUTO, OPTIMIZERS

        rows = [(name, f"{entry.summary}; usual rate {entry.lr:g}") for name, entry in OPTIMIZERS.items()]
        with formatter.section("Optimizers"):
            formatter.write_dl([("auto", AUTO), *rows])


@app.command("train", cls=_WithOptimizers)
def train_command(
    task: Annotated[str, typer.Argument(help="A built-in task's name, or path/file.py:function.")],
    optimizer: Annotated[str, typer.Option(help="One of the names below.")] = "auto",
    lr: Annotated[float | None, typer.Option(help="Learning rate. [default: the optimizer's usual one]")] = None,
    init: Annotated[
        str, typer.Option(help="auto (repaired only if it cannot learn as it is), default or isometric.")
    ] = "auto",
    steps: Annotated[int | None, typer.Option(help="Budget in steps.", min=1)] = None,
    epochs: Annotated[int | None, typer.Option(help="Budget in epochs.", min=1)] = None,
    seconds: Annotated[float | None, typer.Option(help="Budget in seconds of training alone.", min=0.1)] = None,
    seed: Annotated[
        int, typer.Option(help="Of the model, the order of the batches and dropout.", min=0, max=2**63 - 1)
    ] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the model, the checkpoint and metrics.jsonl.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, if there is one.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train a task's network, evaluate it during the run, and save it.

    Give one of --steps, --epochs and --seconds. To continue a run that was killed, give the same command with --resume.
    Under torchrun each process takes its share of every batch. Exit code 1: the loss stopped being finite.
    """
    given = [name for name, value in (("--steps", steps), ("--epochs", epochs), ("--seconds", seconds)) if value]
    if len(given) != 1:
        wanted = "give one of --steps, --epochs, --seconds, as in --seconds 60"
        raise InputError(f"train: {wanted}; got {' and '.join(given) or 'none'}")
    if resume and out is None:
        raise InputError("train: --resume needs --out DIR, the folder of the run to continue")
    if out is not None and not resume and (out / "model.safetensors").exists():
        raise InputError(f"train: {out} holds a finished run. Choose another folder, or delete model.safetensors there")
    from gramian import tasks
    from gramian.training import display, train

    found = tasks.load(task, write="gramian train {}")
    try:
        with _ranks() as first, display.Watched(quiet=quiet or not first) as watched:
            run = train(
                found,
                optimizer=optimizer,
                lr=lr,
                init=init,
                steps=steps,
                epochs=epochs,
                seconds=seconds,
                seed=seed,
                out=out,
                resume=resume,
                progress=watched.evaluated,
                on_step=watched.stepped,
            )
    except KeyboardInterrupt:
        _complain("interrupted" if out is None else "interrupted; continue with the same command and --resume")
        raise typer.Exit(130) from None
    if first and not quiet:
        display.show(run, found.name, automatic=optimizer == "auto")
    if run.diverged:
        raise typer.Exit(1)


@app.command("bench")
def bench_command(
    name: Annotated[str, typer.Argument(help="Which benchmark; without one, their names.")] = "",
    json: Annotated[Path | None, typer.Option(help="Write the figures and the machine's features.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds; medians are shown.", min=1)] = 5,
    only: Annotated[str, typer.Option(help="Only tasks whose name contains this.")] = "",
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Measure the costs that linalg's automatic choices use, save them, and stop."),
    ] = False,
    diagnose: Annotated[str, typer.Option(help="faults: score this diagnoser, module:function.")] = "",
    held_out: Annotated[
        bool, typer.Option("--held-out", help="faults and remedies: on the seeds that are held out.")
    ] = False,
    seeds: Annotated[
        list[int] | None, typer.Option(help="faults and remedies: only these of the seeds; may be repeated.")
    ] = None,
    kinds: Annotated[
        list[str] | None, typer.Option(help="faults and remedies: only these kinds; may be repeated.")
    ] = None,
    architectures: Annotated[
        list[str] | None, typer.Option(help="faults and remedies: only these; may be repeated.")
    ] = None,
    cases: Annotated[Path | None, typer.Option(help="faults and remedies: the list of verified cases.")] = None,
    freeze: Annotated[
        bool, typer.Option("--freeze", help="faults: train all cases and their twins, write the list, and stop.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Time gramian on this machine, interleaved with the peers that are installed."""
    from gramian import bench, report

    ours: dict[str, Any] = {"diagnose": diagnose, "held_out": held_out, "seeds": seeds, "kinds": kinds}
    ours |= {"architectures": architectures, "cases": cases}
    options = {key: value for key, value in ours.items() if value}
    if (options or freeze) and (name != "faults" and (freeze or diagnose or name != "remedies")):
        wrong = "--freeze" if freeze else f"--{next(iter(options)).replace('_', '-')}"
        raise InputError(f"bench: {wrong} is for faults, got {name!r}. Write: gramian bench faults {wrong}")
    if freeze:
        from gramian.bench.faults import freeze as freeze_cases

        with _Stages(quiet) as stages:
            path = freeze_cases(lambda what: stages(what, 0.0, ""), held_out=held_out, cases=cases)
        if not quiet:
            print(f"wrote {path}")
        return

    if calibrate:
        if name != "linalg":
            raise InputError(f"bench: --calibrate is for linalg, got {name!r}. Write: gramian bench linalg --calibrate")
        with _Stages(quiet) as stages:
            path = bench.keep_calibration(lambda what: stages(what, 0.0, ""))
        if not quiet:
            print(f"wrote {path}")
        return
    if not name:
        print("\n".join(bench.BENCHES))
        return
    if json is not None:
        report.check_target(json)
    with _Stages(quiet) as stages:
        rows = bench.run(name, repeats=repeats, only=only, tell=lambda task: stages(task, 0.0, ""), **options)
    if json is not None:
        bench.as_json(name, rows, json)
    if not quiet:
        bench.show(rows)


def _inspect(model: str, task: str | None, options: dict[str, Any]) -> Any:
    from gramian.remedies import inspect

    found = _with_task(model, task)
    if found is None:
        if options.get("verify"):
            raise InputError(f"--verify trains on data, and {model} is a file: add --task")
        if options.get("curvature"):
            raise InputError(f"--curvature is that of a loss on data, and {model} is a file: add --task")
        return inspect(model, **options)
    network, its_task = found
    return inspect(network, its_task.batches(), its_task.objective, title=model, **options)


def _with_task(model: str, task: str | None) -> tuple[Any, Any] | None:
    """Return the network that MODEL and --task name, and its task; `None` where MODEL is a file without a task."""
    from gramian import tasks
    from gramian.checkpoint import load_into

    is_task = model in tasks.TASKS or ".py:" in model or model.endswith(".py")
    if task is None and not is_task:
        return None
    write = "gramian inspect {}" if is_task else f"gramian inspect {model} --task {{}}"
    found = tasks.load(model if is_task else str(task), write=write)
    network = found.model()
    if not is_task:
        load_into(network, model)
    return network, found


def _compare(model: str, against: str, task: str | None, rank: int | None, out: Path, options: dict[str, Any]) -> Any:
    from gramian.inspection import compare_checkpoints, extract_lora

    if task is not None:
        raise InputError("--against compares two checkpoints; leave out --task")
    options.pop("input_size")
    report = compare_checkpoints(model, against, **options)
    if rank is not None:
        options.pop("quick")
        adapter = extract_lora(model, against, rank, out, **options)
        report.notes += adapter.notes()
    return report


@contextmanager
def _ranks() -> Iterator[bool]:
    """Join torchrun's process group, if there is one; yields whether this process prints."""
    if _num_ranks() < 2:
        yield True
        return
    from torch import distributed

    distributed.init_process_group("gloo")
    try:
        yield distributed.get_rank() == 0
    finally:
        distributed.destroy_process_group()


class _Stages:
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

    def __enter__(self) -> _Stages:
        return self

    def __exit__(self, error: object, *rest: object) -> None:
        if not self.lines:
            return
        if error is None:
            self.progress.stop()
        else:  # leave no frame of a stage that did not end; Progress.stop would print a line outside a terminal
            self.progress.live.transient = True
            self.progress.live.stop()


def _complain(message: str) -> None:
    print(f"gramian: {plain(' '.join(message.split()), len(message))}", file=sys.stderr)


def main(args: list[str] | None = None) -> int:
    """Run the command line and return the exit code; a user's error is one line on stderr."""
    warnings.showwarning = _show_warning
    args = sys.argv[1:] if args is None else args
    try:
        code = app(args=args or ["--help"], prog_name="gramian", standalone_mode=False)
    except GramianError as error:
        _complain(str(error))
        return 2
    except ClickException as error:  # type: ignore[misc]
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "gramian"
        _complain(f"{error.format_message().rstrip('.')}. See '{where} --help'.")  # type: ignore[attr-defined]
        return 2
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted")
        return 130
    except Exception:
        traceback.print_exc()
        return 3
    return code if isinstance(code, int) else 0


def program() -> NoReturn:
    """Run the command line as a process of its own and end it with the exit code.

    A rank of torchrun ends without finalizing the interpreter. DistributedDataParallel keeps the threads of its process
    group, and Python before 3.14 unwinds a thread that asks for the GIL during finalization, through C++ frames that
    may not be unwound: now and then a run that was finished and written ended with "terminate called without an active
    exception" and exit code 134.
    """
    code = main()
    if _num_ranks() > 1:
        atexit._run_exitfuncs()  # of the user's task and its loggers
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **kwargs: Any) -> None:
    if issubclass(category, GramianWarning):
        print(f"gramian: warning: {plain(message, len(str(message)))}", file=sys.stderr)


if __name__ == "__main__":
    program()
