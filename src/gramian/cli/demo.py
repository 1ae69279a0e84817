"""`gramian demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gramian.cli.common import Quiet, Stages, path

__all__ = ["command"]


def command(
    depth: Annotated[int, typer.Option(help="Layers of the plain tanh network.", min=3)] = 100,
    classes: Annotated[int, typer.Option(help="2: odd or even?  10: which digit?")] = 2,
    seed: Annotated[int, typer.Option(help="Of the split, the initialization and the batches.", min=0)] = 0,
    out: Annotated[Path, typer.Option(parser=path, help="Folder for the report and the models.")] = Path(
        "gramian-demo"
    ),
    seconds: Annotated[
        float | None,
        typer.Option(help="Training time of each of the four runs, in place of steps.", min=0.1),
    ] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw pictures in the report.")] = True,
    quiet: Quiet = False,
) -> None:
    """Diagnose, repair, train and compress a network that cannot learn, on handwritten digits."""
    from gramian import demo

    with Stages(quiet) as stages:
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
    steps = numbers["steps"]["isometric + muon"]
    console.print(f"  repaired and trained  {numbers['accuracy_trained']:7.1%}  in {steps} steps", highlight=False)
    if numbers["accuracy_trained"] < numbers["accuracy_logistic"]:
        console.print("    too few for this depth: give each run more time with --seconds")
    share = numbers["parameters_compressed"] / numbers["parameters"]
    console.print(f"  compressed to {share:4.0%}    {numbers['accuracy_compressed']:7.1%}", highlight=False)
    console.print(f"\nReport: {out / 'report.html'}", highlight=False, soft_wrap=True)
