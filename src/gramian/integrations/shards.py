"""Compressing a language model in a folder by texts, with one part at a time in memory: what the command does."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gramian.compression.choosing.contending import planned_layers
from gramian.compression.sharded.holding import shown
from gramian.compression.sharded.losses import loss_of
from gramian.compression.sharded.sharded_plan import ShardedPlan
from gramian.compression.sharded.shards import Shards
from gramian.compression.sharded.streaming import compress_shards
from gramian.integrations.texts import batches_of_texts, copy_companions
from gramian.objective import Objective
from gramian.report.compression import Outcome
from gramian.report.contenders import Contender

__all__ = ["compress_folder"]


def compress_folder(
    folder: str | Path,
    texts: str | Path,
    out: str | Path | None,
    *,
    keep: float,
    memory: str,
    batches: int = 100,
    tell: Callable[[str, float, str], None] | None = None,
) -> Outcome:
    """Calibrates and factors a language model part by part, writes it, and measures it on texts that are held out.

    Args:
        folder: of the model and its tokenizer.
        texts: a file with one text a line; every fifth is held out.
        out: a new folder for the smaller model, and for what waits on the disk meanwhile, or one that a stopped run
            left; without one nothing is written, and only the model as it came is measured.
        keep: share of the parameters.
        memory: that the process may have, as `"6GB"`.
        batches: of texts to calibrate with, at most.
        tell: called as `tell(stage, share done, remark)`.

    Returns: what was done, with the held-out loss of both models.
    Raises: as `compress` of a folder, and as `batches_of_texts`.
    Cost: three sweeps: that of `compress`, and the loss of the model before and after.

    >>> compress_folder("missing", "texts.txt", None, keep=0.5, memory="1GB")
    Traceback (most recent call last):
    gramian.errors.CheckpointError: missing: no such file or folder. Check the path.
    """
    tell, objective = tell or (lambda stage, share, remark: None), Objective.next_token()
    shards = Shards(folder)
    given, tests = batches_of_texts(folder, texts, shards.model)
    if out is not None:
        Path(out).mkdir(exist_ok=True)
    options = {"memory": memory, "scratch": out}
    begin = time.perf_counter()
    plan = compress_shards(folder, given[:batches], objective, keep=keep, tell=tell, **options)
    seconds = time.perf_counter() - begin
    quality, name = None, f"keep {keep:g}"
    plan.spool.keep()  # until the model is written
    if out is not None:
        plan.write(Path(out), lambda part: tell("Write", 1.0, part or "outside of the blocks"))
        copy_companions(folder, out)
    plan.spool.close()
    tell("Measure", 0.0, f"{len(tests)} batches held out")
    dense = Contender("dense", plan.parameters_dense, plan.bytes_dense, loss_of(folder, tests, objective, **options))
    if out is not None:
        quality = loss_of(out, tests, objective, **options)
    tell("Measure", 1.0, f"peak {shown(peak())} of memory")
    return Outcome(
        title=Path(folder).name,
        asked=name,
        measure="loss",
        better="lower",
        keep=keep,
        contenders=(dense, Contender(name, plan.parameters, plan.bytes, quality)),
        curve=(),
        layers=planned_layers(plan),
        batch=1,
        predicted=plan.predicted_loss,
        seconds=seconds,
        notes=(*plan.notes, _held(plan, memory)),
    )


def _held(plan: ShardedPlan, memory: str) -> str:
    told = max(row["peak"] for row in plan.told)
    return f"one part at a time in memory: allowed {memory}, expected {told}, most so far {shown(peak())}"


def peak() -> int:
    """The most bytes of memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
