"""`gramian train`."""

from __future__ import annotations

import json as as_json
import math
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand

from gramian.cli import completion
from gramian.cli.common import Quiet, check_text, complain, num_ranks, path, ranks, told_once
from gramian.cli.completion import completing
from gramian.cli.config import read_config
from gramian.errors import GramianError, InputError, plain

__all__ = ["WithOptimizers", "command"]

AUTO = "auto"
"""The rate that is to be suggested."""


class WithOptimizers(TyperCommand):
    """A command whose help ends with the table of optimizers, read only then, since it loads torch."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from gramian.optim.registry import AUTO, OPTIMIZERS

        rows = [(name, f"{entry.summary}; usual rate {entry.rate}") for name, entry in OPTIMIZERS.items()]
        with formatter.section("Optimizers"):
            formatter.write_dl([("auto", AUTO), *rows])


def _list(asked: bool) -> None:
    if asked:
        from gramian.tasks import TASKS

        for name, entry in {"chars": None, **TASKS}.items():
            print(f"{name:12} {entry.summary if entry else 'the next character of a text: --text FILE'}")
        raise typer.Exit


def command(
    task: Annotated[
        str,
        typer.Argument(
            help="A built-in task's name, or path/file.py:function.", autocompletion=completing(completion.TASKS)
        ),
    ],
    listed: Annotated[
        bool, typer.Option("--list", callback=_list, is_eager=True, help="Show the built-in tasks.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            callback=read_config,
            is_eager=True,
            help="A TOML file of these options by their names; flags win.",
        ),
    ] = None,
    text: Annotated[Path | None, typer.Option(parser=path, help="The text file of the task chars.")] = None,
    model: Annotated[str | None, typer.Option(help="Of the task chars: transformer or lstm.")] = None,
    optimizer: Annotated[
        str, typer.Option(help="One of the names below.", autocompletion=completing(completion.OPTIMIZERS))
    ] = "auto",
    lr: Annotated[
        str | None,
        typer.Option(
            help="Learning rate; auto: as gm.suggest_lr finds. [default: the optimizer's usual one; muon's is up to "
            "1.7 times as large in runs of under 300 steps]"
        ),
    ] = None,
    init: Annotated[
        str,
        typer.Option(
            help="auto (repaired only if it cannot learn as it is), default or isometric.",
            autocompletion=completing(completion.INITS),
        ),
    ] = "auto",
    compare: Annotated[
        str | None,
        typer.Option(
            help="Train once with each of these optimizers, as adamw,sgd:lr=0.3,auto, and compare; one may come at "
            "several rates; with --lr auto each at its suggested rate.",
            autocompletion=completing(completion.OPTIMIZERS, several=True),
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Budget in steps.", min=1)] = None,
    epochs: Annotated[int | None, typer.Option(help="Budget in epochs.", min=1)] = None,
    seconds: Annotated[float | None, typer.Option(help="Budget in seconds of training alone.", min=0.1)] = None,
    schedule: Annotated[
        str,
        typer.Option(
            help="Of the rate: linear, constant, cosine, step, exponential or plateau.",
            autocompletion=completing(completion.SCHEDULES),
        ),
    ] = "linear",
    warmup: Annotated[
        int | None, typer.Option(help="Steps over which the rate rises first. [default: 10]", min=0)
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="In place of the optimizer's own.", min=0)] = None,
    regularize: Annotated[
        str | None,
        typer.Option(
            help="l1=X, l2=X, both, nuclear=X, spectral=X or orthogonal=X, exact by proximal maps.",
            autocompletion=completing(completion.PENALTIES, several=True, end="="),
        ),
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option(
            help="Of inputs: shift=PIXELS, rotate=DEGREES, scale=X, flip=X, cutout=X, noise=X, mask=X, mixup=X.",
            autocompletion=completing(completion.AUGMENTATIONS, several=True, end="="),
        ),
    ] = None,
    clip: Annotated[float | None, typer.Option(help="Largest norm of all gradients together.")] = None,
    accumulate: Annotated[int, typer.Option(help="Batches in a step.", min=1)] = 1,
    precision: Annotated[
        str,
        typer.Option(
            help="Of the forward pass: float32, bfloat16, or float16 with a loss scale.",
            autocompletion=completing(completion.PRECISIONS),
        ),
    ] = "float32",
    ema: Annotated[float | None, typer.Option(help="Decay of a moving average of the weights, as 0.999.")] = None,
    best: Annotated[str | None, typer.Option(help="Keep the best evaluation's model: max:NAME or min:NAME.")] = None,
    patience: Annotated[int | None, typer.Option(help="End after so many evaluations without a better one.")] = None,
    seed: Annotated[
        int, typer.Option(help="Of the model, the order of the batches and dropout.", min=0, max=2**63 - 1)
    ] = 0,
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun: divide the model over the processes (FSDP2).")
    ] = False,
    slices: Annotated[
        int | None,
        typer.Option(
            help="Take a batch in so many passes, shared out over processes: the same run on any number of them.", min=1
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look at some steps while it trains (gm.watch), and tell what is wrong.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(parser=path, help="Folder for the model, the checkpoint and metrics.jsonl.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, if there is one.")] = False,
    html: Annotated[
        Path | None,
        typer.Option(parser=path, help="Write a report: curves, spectra before and after, and what went wrong."),
    ] = None,
    json: Annotated[Path | None, typer.Option(parser=path, help="Write settings and figures as JSON.")] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log to the folder tensorboard in --out too.")
    ] = False,
    timeout: Annotated[
        float,
        typer.Option(help="Seconds after which a process of torchrun counts as hung.", min=1, max=10**8),
    ] = 1800.0,
    trace: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
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
    if out is not None and not resume and os.path.exists(out / "model.safetensors"):
        from gramian.training.folder import holds_finished

        raise InputError(holds_finished(out))
    if tensorboard and out is None:
        raise InputError("train: --tensorboard needs --out DIR, the folder that it writes to")
    if compare and not compare.strip(" ,"):  # an empty one takes back that of a file
        raise InputError(f"train: --compare names two optimizers or more, as adamw:lr=3e-3,sgd; got {compare!r}")
    if compare and (optimizer != "auto" or lr not in (None, AUTO)):
        raise InputError(
            "train: --compare names the optimizers, with their rates, as --compare adamw:lr=3e-3,sgd; leave out "
            "--optimizer, and --lr but for --lr auto"
        )
    if json is not None:
        from gramian import report

        report.check_target(json, (".json",), made=out)
        json = json.absolute()
    rate = _rate(lr)
    options = {"schedule": schedule, "warmup": warmup, "weight_decay": weight_decay, "clip": clip, "ema": ema}
    options |= {"accumulate": accumulate, "precision": precision, "best": best, "patience": patience}
    options |= {
        "regularize": _strengths("--regularize", regularize, "l1=1e-4,l2=1e-3"),
        "augment": _strengths("--augment", augment, "shift=2,noise=0.1"),
    }
    budget = {"steps": steps, "epochs": epochs, "seconds": seconds}
    again = "" if out is None else "; continue with the same command and --resume"
    try:
        with told_once(), ranks(timeout) as first, _naming_the_lost():
            options |= {"init": init, "seed": seed, "out": out, "resume": resume, "report": html}
            options |= budget | {"shard": shard, "slices": slices, "watch": watch}
            options |= {"lr": rate} if compare else {"optimizer": optimizer, "lr": rate}
            logs = tensorboard and first
            runs, name = _train(_Asked(task, text, model), first and not quiet, compare or "", logs, options)
    except KeyboardInterrupt:
        complain(f"interrupted{again}")
        raise typer.Exit(130) from None
    except SystemExit as error:  # SIGTERM
        complain(f"terminated{again}")
        raise typer.Exit(error.code if isinstance(error.code, int) else 2) from None
    except GramianError:
        if trace:
            traceback.print_exc()
        raise
    if first and not quiet:
        from gramian.training import display

        if compare:
            display.show_comparison(runs)
        else:
            display.show(runs[optimizer], name, automatic=optimizer == "auto")
    if first and json is not None:
        from gramian import report

        found = {"task": name, "runs": {key: run.to_dict() for key, run in runs.items()}}
        report.write_text(json, as_json.dumps(found, indent=2) + "\n")
    if any(run.diverged for run in runs.values()):
        raise typer.Exit(1)


@contextmanager
def _naming_the_lost() -> Iterator[None]:
    """`naming_the_lost` of training, which loads torch; from here on, so that it covers the loading of the task."""
    if num_ranks() < 2:
        yield
        return
    from gramian.training.lost_ranks import naming_the_lost

    with naming_the_lost():
        yield


class _Asked(NamedTuple):
    """The task that was asked for, and its own options."""

    task: str
    text: Path | None
    model: str | None

    def load(self) -> Any:
        """The task."""
        from gramian import tasks

        if self.task == "chars":
            if self.text is None:
                raise InputError("train: the task chars needs a text: gramian train chars --text FILE")
            return tasks.chars(self.text) if self.model is None else tasks.chars(self.text, model=self.model)
        for flag, value in (("--text FILE", self.text), ("--model", self.model)):
            if value is not None:
                raise InputError(f"train: {flag} belongs to the task chars, as in gramian train chars --text FILE")
        return tasks.load(self.task, write="gramian train {}")


def _train(
    asked: _Asked, shown: bool, compared: str, logs: bool, options: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Load the task and train it; returns the runs by their optimizers, and the task's name."""
    from gramian.training import compare, display, train

    here = Path.cwd()
    check_text(asked.task, "a task's path")
    found = _loaded(asked)
    for name in ("out", "report"):
        if options[name] is not None:  # the task's file may have gone elsewhere
            options[name] = here / options[name] if Path.cwd() != here else options[name]
    listeners: list[Any] = []
    if logs:
        from gramian.integrations import RunBoard

        listeners.append(RunBoard())

    def progress(row: dict[str, float], share: float) -> None:
        for listener in listeners:
            listener.evaluated(row, share)

    def on_step(run: Any, share: float) -> None:
        for listener in listeners:
            listener.stepped(run, share)

    if options["lr"] == AUTO and not compared:
        options["lr"] = _suggested(found, options, shown)
    with display.Watched(quiet=not shown) as watched:
        listeners.append(watched)
        options |= {"progress": progress, "on_step": on_step}
        if compared:
            return compare(found, compared.split(","), begun=watched.begun, **options), found.name
        return {options["optimizer"]: train(found, **options)}, found.name


def _loaded(asked: _Asked) -> Any:
    """The task, if it can be loaded on all ranks."""
    from gramian import placement

    with placement.agreed("train"):
        return asked.load()


def _rate(text: str | None) -> float | str | None:
    """The rate that was asked for: a number, or `"auto"`."""
    if text is None or text == AUTO:
        return text
    try:
        rate = float(text)
        if rate == 0 and text.lower().partition("e")[0].strip("+-0_. "):
            raise InputError(f"train: --lr {plain(text, 50)} is too small for a number of the machine; give 0, or more")
        return rate
    except ValueError as error:
        if isinstance(error, GramianError):
            raise
        raise InputError(f"train: --lr must be zero, a positive number or auto, got {text!r}") from None


def _suggested(task: Any, options: dict[str, Any], shown: bool) -> float | None:
    """The rate that is suggested for the task's model, to two digits; tells each rate that is tried."""
    from gramian.training.suggesting import rounded, suggested

    def tell(rate: float, loss: float) -> None:
        if shown:
            complain(f"rate {rate:.2g}: held-out loss {loss:.4g}")

    found = suggested(task, options["optimizer"], options["init"], options["seed"], tell)
    if shown and found is not None:
        complain(str(found))
    return rounded(found)


def _strengths(option: str, text: str | None, example: str) -> dict[str, float]:
    """Parse `name=number,name=number`."""
    found: dict[str, float] = {}
    if text is not None and not text.strip(" ,"):
        raise InputError(f"train: {option} wants name=number, as in {example}; got {text!r}. Leave it out for none")
    text = text or ""
    for part in filter(None, text.split(",")):
        name, equals, number = part.partition("=")
        name = name.strip()
        if name in found:
            raise InputError(f"train: {option} has {name!r} twice; leave out one of the two")
        try:
            found[name] = float(number) if equals else math.nan
        except ValueError:
            found[name] = math.nan
        if math.isnan(found[name]):
            raise InputError(f"train: {option} wants name=number, as in {example}; got {part!r}")
    return found
