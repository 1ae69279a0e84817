"""`gramian compress`."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gramian.cli.common import Quiet, Stages, path, ranks, told_once, with_task
from gramian.errors import GramianWarning, InputError

__all__ = ["command"]


class Direction(StrEnum):
    """The direction in which a measure is better."""

    up = "higher"
    down = "lower"


class Budget(StrEnum):
    """What a search makes small."""

    parameters = "parameters"
    bytes = "bytes"


def command(
    model: Annotated[
        str, typer.Argument(help="A .safetensors file, a Hugging Face folder, a .pt state dict, or a task.")
    ],
    task: Annotated[str | None, typer.Option(help="Task whose model, data and evaluation go with the weights.")] = None,
    calibrate: Annotated[
        Path | None, typer.Option(parser=path, help="In place of a task, for a Hugging Face folder: texts, one a line.")
    ] = None,
    keep: Annotated[float | None, typer.Option(help="Target: this share of the parameters, as 0.6.")] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Target: the held-out measure worse by at most this, in its own unit, as 0.01.")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="Target: a forward pass this many times as fast on this machine, as 1.5.")
    ] = None,
    size: Annotated[
        float | None, typer.Option(help="Target: this share of the bytes, in ranks and integers of few bits, as 0.2.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Target: every layer in integers of so many bits, 2 to 8; or with --keep.")
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="Target: this share of the weights zero, as 0.5, or a pattern, as 2:4.")
    ] = None,
    by: Annotated[Budget, typer.Option(help="What --max-drop makes small.")] = Budget.parameters,
    narrow: Annotated[
        bool,
        typer.Option("--narrow", help="Remove heads, units and channels, which leaves ordinary layers, not ranks."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(parser=path, help="Folder for the model and the report; must not exist.")
    ] = None,
    metric: Annotated[str, typer.Option(help="Which number of the evaluation counts. [default: the first]")] = "",
    direction: Annotated[
        Direction | None, typer.Option("--better", help="Which direction of it is better. [default: measured]")
    ] = None,
    batches: Annotated[int, typer.Option(help="Batches of the first epoch to calibrate with.", min=1)] = 100,
    batch: Annotated[int, typer.Option(help="Samples of the larger batch whose latency is measured.", min=2)] = 32,
    plan: Annotated[
        Path | None,
        typer.Option(parser=path, help="A plan: read in place of calibrating, or written where there is none."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="With --calibrate and --keep: read the folder block by block, in this memory, as 6GB."),
    ] = None,
    curve: Annotated[bool, typer.Option("--curve/--no-curve", help="Evaluate at shares from 0.9 to 0.1.")] = True,
    json: Annotated[Path | None, typer.Option(parser=path, help="Write the figures as JSON.")] = None,
    quiet: Quiet = False,
) -> None:
    """Factor, round, prune or narrow a model's layers to a target, measure it beside bfloat16 and int8, and save it.

    Give one of --keep, --size, --bits, --sparsity, --max-drop and --speedup. DIR gets report.html, report.json and the
    model: a folder that from_pretrained loads after `import gramian.integrations.compressed`, or model.safetensors for
    gm.load_compressed. With --memory, the model is read, factored and written block by block, and --out holds what
    waits on the disk meanwhile. Under torchrun the processes calibrate and factor together, each with its share of the
    batches; the first one does the rest.
    """
    from gramian import report

    if json is not None:
        report.check_target(json, (".json",))
    if out is not None:
        _check_free(out, stopped=memory is not None)
        report.check_folder(out, "Choose another --out.")
    if plan is not None and not plan.exists():  # else it is read
        report.check_target(plan, (plan.suffix.lower(),))
    from gramian.compression import save_compressed
    from gramian.compression.choosing.deciding import decide
    from gramian.compression.choosing.making import plan_for
    from gramian.compression.choosing.target import Target
    from gramian.placement import agreed
    from gramian.training.samples_seen import samples_trained_on

    if memory is not None:
        others = [task, max_drop, speedup, size, bits, sparsity, plan, metric or None, direction, narrow or None]
        if calibrate is None or keep is None or any(one is not None for one in others):
            raise InputError("compress: --memory takes --calibrate and --keep, and no other target, task or plan")
        _in_shards(model, calibrate, out, json, {"keep": keep, "memory": memory, "batches": batches}, quiet)
        return
    zeros = None if sparsity is None else sparsity if ":" in sparsity else _number(sparsity)
    with _named_as_options():
        target = Target(keep, max_drop, speedup, size, bits, zeros, by.value, narrow)
    with told_once(), ranks() as first, Stages(quiet or not first) as stages:
        if not first:
            warnings.simplefilter("ignore", GramianWarning)  # the first rank has the same
        with agreed("compress"):
            network, found, better = _loaded(model, task, calibrate)
            given = found.batches(batches)
            num = None if task is None or narrow else samples_trained_on(model, found)
        begin = time.perf_counter()
        options: dict[str, Any] = {"narrower": narrow, "plan_file": plan, "trained_on": num, "progress": stages}
        made_of = plan_for(network, given, found.objective, **options)
        seconds = time.perf_counter() - begin
    if not first:
        return
    with Stages(quiet) as stages:
        made = decide(
            network,
            given,
            found.objective,
            found.evaluate,
            target,
            measure=metric,
            better=better if direction is None else direction.value,
            title=Path(model).name,
            batch=batch,
            curve=curve,
            plan=made_of,
            seconds=seconds,
            progress=stages,
        )
    if out is not None:
        _make(out)
        is_folder = hasattr(made.model, "save_pretrained")
        save_compressed(made.model, out if is_folder else out / "model.safetensors")
        if is_folder and Path(model).is_dir():
            from gramian.integrations.texts import copy_companions

            copy_companions(model, out)
    _report(made.outcome, json, out, quiet)


def _in_shards(
    model: str, calibrate: Path, out: Path | None, json: Path | None, options: dict[str, Any], quiet: bool
) -> None:
    """Compress a folder that does not fit into memory."""
    from gramian import report
    from gramian.integrations.shards import compress_folder

    if json is not None:
        report.check_target(json, (".json",))
    with told_once(), Stages(quiet) as stages:
        outcome = compress_folder(model, calibrate, out, tell=stages, **options)
    _report(outcome, json, out, quiet)


def _report(outcome: Any, json: Path | None, out: Path | None, quiet: bool) -> None:
    """Write the figures and the page, and show it."""
    from gramian import report

    numbers, page = outcome.to_json(), outcome.to_document()
    if json is not None:
        report.write_text(json, numbers)
    if out is not None:
        report.write_text(out / "report.json", numbers)
        page.save(out / "report.html")
    if not quiet:
        report.show(page)
        if out is not None:
            print(f"\nModel and report: {out}")


def _loaded(model: str, task: str | None, calibrate: Path | None) -> tuple[Any, Any, str]:
    """The network, the task, and which direction of its measure is better where that is known."""
    if calibrate is not None:
        if task is not None:
            raise InputError("compress: --calibrate takes the place of a task; leave out one of the two")
        from gramian.integrations.texts import BETTER, task_of_texts

        found = task_of_texts(model, calibrate)
        network = found.model()
        return network, found, BETTER[next(iter(found.evaluate(network)))]
    named = with_task(model, task, verb="compress")
    if named is None:
        raise InputError(
            f"compress: {model} holds weights alone, and compressing needs data: add --task path/file.py:function, or "
            "for a Hugging Face folder --calibrate texts.txt"
        )
    return *named, ""


@contextmanager
def _named_as_options() -> Iterator[None]:
    """A context in which an error names a target's arguments as they are given here: `--max-drop` for `max_drop`."""
    try:
        yield
    except InputError as error:
        verb, _, told = str(error).partition(": ")
        names = r"\b(keep|max_drop|speedup|size|sparsity|bits|narrow)\b"
        told = re.sub(names, lambda found: f"--{found[0].replace('_', '-')}", told.replace("by='bytes'", "--by bytes"))
        raise InputError(f"{verb}: {told}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"compress: --sparsity is a share, as 0.5, or a pattern, as 2:4; got {text!r}") from None


def _check_free(out: Path, *, stopped: bool = False) -> None:
    """Refuse a folder that holds something, before anything is computed; not what a stopped run left there."""
    from gramian.compression.sharded.sharded_plan import was_stopped

    if stopped and was_stopped(out):
        return
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"compress: {out} exists already. Choose another --out, or delete it")


def _make(out: Path) -> None:
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"compress: cannot write to {out}: {error.strerror}. Choose another --out") from None
