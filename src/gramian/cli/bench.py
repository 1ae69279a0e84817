"""`gramian bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gramian.cli.common import Quiet, Stages, path
from gramian.errors import InputError

__all__ = ["command"]


def command(
    name: Annotated[str, typer.Argument(help="Which benchmark; without one, their names.")] = "",
    json: Annotated[
        Path | None, typer.Option(parser=path, help="Write the figures and the machine's features.")
    ] = None,
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
    cases: Annotated[
        Path | None, typer.Option(parser=path, help="faults and remedies: the list of verified cases.")
    ] = None,
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

        if cases is not None:
            report.check_target(cases, (cases.suffix.lower(),))
        with Stages(quiet) as stages:
            path = freeze_cases(lambda what: stages(what, 0.0, ""), held_out=held_out, cases=cases)
        if not quiet:
            print(f"wrote {path}")
        return

    if calibrate:
        if name != "linalg":
            raise InputError(f"bench: --calibrate is for linalg, got {name!r}. Write: gramian bench linalg --calibrate")
        with Stages(quiet) as stages:
            path = bench.keep_calibration(lambda what: stages(what, 0.0, ""))
        if not quiet:
            print(f"wrote {path}")
        return
    if not name:
        print("\n".join(bench.BENCHES))
        return
    if json is not None:
        report.check_target(json)
    with Stages(quiet) as stages:
        rows = bench.run(name, repeats=repeats, only=only, tell=lambda task: stages(task, 0.0, ""), **options)
    if json is not None:
        bench.as_json(name, rows, json)
    if not quiet:
        bench.show(rows)
