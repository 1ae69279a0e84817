"""`gramian train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from gramian.cli.common import Quiet, complain, ranks
from gramian.errors import InputError

__all__ = ["WithOptimizers", "command"]


class WithOptimizers(TyperCommand):
    """A command whose help ends with the table of optimizers, read only then, since it loads torch."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from gramian.optim.registry import AUTO, OPTIMIZERS

        rows = [(name, f"{entry.summary}; usual rate {entry.lr:g}") for name, entry in OPTIMIZERS.items()]
        with formatter.section("Optimizers"):
            formatter.write_dl([("auto", AUTO), *rows])


def command(
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
        with ranks() as first, display.Watched(quiet=quiet or not first) as watched:
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
        complain("interrupted" if out is None else "interrupted; continue with the same command and --resume")
        raise typer.Exit(130) from None
    if first and not quiet:
        display.show(run, found.name, automatic=optimizer == "auto")
    if run.diverged:
        raise typer.Exit(1)
