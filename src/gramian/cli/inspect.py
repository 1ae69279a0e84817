"""`gramian inspect`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gramian.cli import completion
from gramian.cli.common import Model, Quiet, Stages, complain, path, ranks, with_task
from gramian.cli.completion import completing
from gramian.errors import InputError

__all__ = ["command"]


class FailOn(StrEnum):
    """The least severe finding for which `inspect` exits with 1."""

    error = "error"
    warning = "warning"
    info = "info"
    never = "never"


def command(
    model: Model,
    task: Annotated[str | None, typer.Option(help="Task whose model and data go with the weights.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Another checkpoint: the spectrum of every difference MODEL − OTHER.")
    ] = None,
    extract_lora: Annotated[
        int | None, typer.Option(help="With --against: write the difference as a PEFT adapter of this rank.", min=1)
    ] = None,
    out: Annotated[Path, typer.Option(parser=path, help="Folder for the adapter.")] = Path("adapter"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Norms and ranks with error bounds, from a few products.")
    ] = False,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="With a task: also judge this optimizer at a rate, as muon or adamw:lr=3e-4.",
            autocompletion=completing(completion.OPTIMIZERS),
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Try each remedy on a copy by 50 training steps; offer what helps.")
    ] = False,
    curvature: Annotated[
        bool, typer.Option("--curvature", help="With a task: also the leading eigenvalues of the loss's Hessian.")
    ] = False,
    unchecked: Annotated[
        bool,
        typer.Option("--no-checksums", help="Do not compare a file's tensors with its checksums, as for a huge file."),
    ] = False,
    old_unchecked: Annotated[bool, typer.Option("--no-verify", hidden=True)] = False,
    layouts: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="JSON that maps name patterns to layouts, for fused tensors of unknown architectures."
        ),
    ] = None,
    input_size: Annotated[int, typer.Option(help="Side of the images for convolutions' operator norms.", min=1)] = 32,
    html: Annotated[Path | None, typer.Option(parser=path, help="Write the report as a page.")] = None,
    json: Annotated[Path | None, typer.Option(parser=path, help="Write the report as JSON.")] = None,
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

    unchecked = unchecked or old_unchecked  # the name before --verify came to try remedies
    for target in (html, json):
        if target is not None:
            report.check_target(target)
    if extract_lora is not None and against is None:
        raise InputError("--extract-lora needs --against BASE: an adapter is a difference from a base model")
    if extract_lora is not None:
        report.check_folder(out, "Choose another --out.")
    options: dict[str, Any] = {"quick": quick, "input_size": (input_size, input_size)}
    if verify and against is not None:
        raise InputError("--verify tries the remedies of one model; --against compares two")
    if verify:
        options["verify"] = True
    if optimizer is not None and against is not None:
        raise InputError("--optimizer trains one model; leave out --against")
    if curvature and against is not None:
        raise InputError("--curvature is that of one model's loss; leave out --against")
    if unchecked and task is not None:
        raise InputError("--no-checksums is for files that are inspected alone; leave out --task")
    if layouts is not None:
        from gramian.inspection.weights.matrices import read_layouts

        options["layouts"] = read_layouts(layouts)
    with ranks() as first, Stages(quiet or not first) as tell:

        def progress(what: str, done: int, total: int) -> None:
            tell(what, done / max(1, total), "")

        if against is not None:
            found = _compare(model, against, unchecked, task, extract_lora, out, options | {"progress": progress})
        else:
            options |= {"curvature": curvature, "progress": progress}
            found = _inspect(model, unchecked, task, options, optimizer)
        if not found.layers and against is None:
            reasons = "".join(f". {note}" for note in found.notes)
            raise InputError(
                f"{model}: nothing was inspected, since it holds no matrix that is known{reasons}. "
                "Give a model with weight matrices, or --layouts for tensors of unknown names."
            )
    if not first:
        return
    for target in (html, json):
        if target is not None:
            found.save(target)
    if not quiet:
        report.show(found, verbose=verbose)
    broken = next((f for f in found.findings if f.code == "non-finite-weights"), None)
    if broken is not None:
        complain(f"{model}: {broken.title}. {broken.remedy}")
        raise typer.Exit(2)
    if fail_on is not FailOn.never:
        grave = SEVERITIES[: SEVERITIES.index(fail_on.value) + 1]
        if any(f.severity in grave for f in found.findings):
            raise typer.Exit(1)


def _inspect(model: str, unchecked: bool, task: str | None, options: dict[str, Any], optimizer: str | None) -> Any:
    from gramian.checkpoint import open_checkpoint
    from gramian.remedies import inspect

    found = with_task(model, task)
    if found is None:
        if options.get("verify"):
            raise InputError(f"--verify trains on data, and {model} holds weights alone: add --task")
        if options.get("curvature"):
            raise InputError(f"--curvature is that of a loss on data, and {model} holds weights alone: add --task")
        if optimizer is not None:
            raise InputError(f"--optimizer steps on data, and {model} holds weights alone: add --task")
        return inspect(open_checkpoint(model, verify=False) if unchecked else model, **options)
    if unchecked:
        raise InputError(f"--no-checksums is for files, and {model} is a task")
    network, its_task = found
    if optimizer is not None:
        options["optimizer"] = _made(optimizer, network)
    return inspect(network, its_task.batches(), its_task.objective, title=model, **options)


def _made(optimizer: str, network: Any) -> Any:
    """The optimizer that a name and a rate ask for, of the network's parameters."""
    from gramian.optim.registry import OPTIMIZERS, with_rate

    name, lr = with_rate("inspect --optimizer", optimizer)
    if isinstance(lr, str):
        raise InputError("inspect --optimizer: a rate that is used is judged: give a number, as adamw:lr=3e-4")
    return OPTIMIZERS[name].make(network, lr)


def _compare(
    model: str, against: str, unchecked: bool, task: str | None, rank: int | None, out: Path, options: dict[str, Any]
) -> Any:
    from gramian.checkpoint import open_checkpoint
    from gramian.inspection import compare_checkpoints, extract_lora

    if task is not None:
        raise InputError("--against compares two checkpoints; leave out --task")
    options.pop("input_size")
    tuned, base = (open_checkpoint(path, verify=not unchecked) for path in (model, against))
    report = compare_checkpoints(tuned, base, **options)
    if rank is not None:
        options.pop("quick")
        adapter = extract_lora(tuned, base, rank, out, **options)
        report.notes += adapter.notes()
    return report
