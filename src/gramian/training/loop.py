"""`gm.train`: the options of a run, checked, and its parts put together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gramian import placement
from gramian.errors import GramianWarning, InputError
from gramian.objective import as_objective
from gramian.optim.given_optimizer import given
from gramian.report import Report
from gramian.seeding import seeded
from gramian.training import agreement, page, start
from gramian.training.argument_errors import check, is_whole
from gramian.training.checks import check_best, check_inputs, check_model, check_path, check_state, identity_of
from gramian.training.folder import Folder, read
from gramian.training.interrupts import Interrupts, noticing
from gramian.training.lost_ranks import naming_the_lost
from gramian.training.optimizers import choose, rate_from
from gramian.training.options import Options
from gramian.training.running import NONFINITE_STEPS, Loop
from gramian.training.schedule import WARMUP_STEPS, Schedule, as_budget, check_warmup
from gramian.training.sharding import shard_, whole_copy
from gramian.training.slices import check_slices
from gramian.training.stream import Stream
from gramian.training.suggesting import AUTO, rounded, suggested
from gramian.training.task import Run, Task, as_task, calling
from gramian.training.watched_run import watched

__all__ = ["train"]


def train(
    task: Task,
    *,
    optimizer: str | Callable[..., torch.optim.Optimizer] = "auto",
    lr: float | Literal["auto"] | None = None,
    init: str = "default",
    steps: int | None = None,
    epochs: int | None = None,
    seconds: float | None = None,
    schedule: str = "linear",
    warmup: int | None = None,
    weight_decay: float | None = None,
    regularize: Mapping[str, float] | None = None,
    clip: float | None = None,
    accumulate: int = 1,
    precision: str = "float32",
    ema: float | None = None,
    augment: Mapping[str, float] | None = None,
    best: str | None = None,
    patience: int | None = None,
    seed: int = 0,
    shard: bool = False,
    slices: int | None = None,
    watch: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
    report: str | Path | None = None,
    progress: Callable[[dict[str, float], float], None] | None = None,
    on_step: Callable[[Run, float], None] | None = None,
) -> Run:
    """Train a fresh model of the task and evaluate it during the run.

    The learning rate rises over the first 10 steps and then, by default, falls linearly to zero at the end.

    With `out`, a checkpoint is written after each evaluation and every half minute (less often where writing would take
    more than a tenth of the time), and at Ctrl-C or SIGTERM after the step that the run is in. A run that was killed at
    any moment and is started again with `resume=True` ends, for steps and epochs, with bitwise the same weights and
    numbers as an uninterrupted one; for seconds it continues with the time that is left. This requires that the batches
    of an epoch depend only on its number, the generator and the global generators: to resume, the epoch is drawn again
    from its beginning. Where the last checkpoint is damaged, the one before is used, and a warning says so.

    A step whose loss, or a gradient that the optimizer would take, is not finite is skipped (`Run.skipped`). Ten in a
    row end the run as diverged: it is not finished, and the last checkpoint with finite weights stays. A batch without
    units, whose labels are all ignored, adds nothing.

    In a process group, call it on all ranks. Each takes its rows of every batch, and the step is that of the whole
    batch: the same as in one process, within rounding, except for dropout, and to the bit with `slices`. All ranks draw
    all batches and evaluate; the first one writes. Gradients are added up after the backward pass, not during it; with
    `shard`, as FSDP2 does. A run may be resumed on another number of ranks, with `shard` or without, within
    rounding; a warning says so.

    Args:
        task: what to train.
        optimizer: `"auto"` (the best one in `gramian bench optim`), another name of `gm.optim.OPTIMIZERS` (AdamW and
            SGD are torch's), a class of optimizers, or a function `(model, lr) -> optimizer` or `model -> optimizer`.
        lr: learning rate; the optimizer's usual one by default, which `Muon` makes up to 1.7 times as large in a run of
            fewer than 300 steps (by `steps` or `epochs`) that decays to zero. `"auto"` is what `gm.suggest_lr` finds
            for the initialized model and the first batches, to two digits; the usual rate, with a warning, where its
            trial steps tell nothing. A class without it has its own default; a function of the model alone, its own.
        init: `"default"` leaves the model as the task makes it; `"isometric"` applies `gm.init.isometric_`; `"auto"`
            applies the actions of the errors that `gm.inspect` finds, if all weights are still random and fewer errors
            remain afterwards. `Run.init` says what was done.
        steps, epochs, seconds: the budget; give one. Seconds are of training alone, without evaluation and
            checkpoints. The same seed gives the same run for steps and epochs; for seconds, how far a run gets depends
            on the machine.
        schedule: of the learning rate after the warm-up: `"linear"` to zero, `"constant"`, `"cosine"` to zero, `"step"`
            (a tenth after each third of the budget), `"exponential"` to a hundredth, or `"plateau"` (half after two
            evaluations without a smaller training loss).
        warmup: steps over which the rate rises first, not more than the run has; 10 by default.
        weight_decay: of all parameter groups, in place of the optimizer's own.
        regularize: one of the penalties `l1`, `l2`, `nuclear`, `spectral`, `orthogonal` with its strength, or `l1` and
            `l2`, on every parameter that holds matrices; exact, by its proximal map after each step (`gm.optim.
            Proximal`).
        clip: the largest norm of all gradients together.
        accumulate: batches whose gradients make one step. The step is that of their union.
        precision: `"bfloat16"` runs the forward pass under autocast; weights and the optimizer stay as they are.
        ema: the decay of a moving average of the weights, which is evaluated and is the finished model.
        augment: changes of the inputs of training batches, with their strengths: `shift` (pixels), `rotate` (degrees),
            `scale`, `flip`, `cutout` (shares) for images; `noise` and `mask` for any inputs.
        best: `"max:NAME"` or `"min:NAME"` of a number that `evaluate` returns: the finished model is that of the best
            evaluation.
        patience: end the run after so many evaluations without a better one.
        seed: of the model, the order of the batches, `init`, dropout and `augment`. The global generators of torch,
            Python and numpy are seeded with it, and are left as they were.
        shard: whether parameters, gradients and the optimizer's state are divided over the ranks (FSDP2). On one rank
            the model stays whole, and a warning says so.
        slices: take every batch in so many forward and backward passes, each over every `slices`-th row, which ranks
            share out. A run is then the same to the bit on 1, 2 … ranks that divide the number, with dropout and
            `shard` too, and may move from one to another; AdamW's with `shard` within rounding. On one rank, a large
            batch in little memory. Sums of gradients take 8 bytes an entry.
        watch: whether `gm.watch` looks at the first step and every 50th or fewer, so that it takes no more than 2 % of
            the time: `Run.findings` has what it found, and the report too. It changes no number of the run.
        out: a folder for `metrics.jsonl` (a line for each evaluation, as it happens), `checkpoint.safetensors` while
            the run is unfinished, and `model.safetensors` when it is finished.
        resume: continue the run in `out`, if there is one; a finished one is returned as it is.
        report: an HTML file for the run's curves, the diagnosis and the spectra of its weights before and after, and
            `task.pictures`. Where the loss is not finite or did not fall, it says what `gm.inspect` finds.
        progress: called after each evaluation with its row and the share of the budget that is spent.
        on_step: called before the first and after each step with the run so far and the share that is spent.
    Returns: the run, with its model and history.
    Raises:
        InputError: not exactly one budget, an unknown optimizer, init or option, or a folder that cannot be written, in
            which another process trains, which holds an unfinished run, a run of other settings, or files that are not
            of a run.
        TaskError: the task's functions raise, or return the wrong thing; a rank hangs, is gone, or its batches end
            earlier than those of the others.
        CheckpointError: a checkpoint is damaged, or cannot be written.
        UnsupportedError: the state of the optimizer or model cannot be saved without a pickle; or, on several ranks,
            the model uses statistics of a whole batch (batch norm), or its loss is not a sum over the rows of a batch's
            tensors.
    Cost: the steps, 20 evaluations, and checkpoints for at most a tenth of the time.
    Source: this library's own.

    >>> from gramian import tasks
    >>> run = train(tasks.digits(depth=3), optimizer="adamw", steps=40)
    >>> run.steps, run.metrics["accuracy"] > 0.5
    (40, True)
    """
    task = as_task(task)
    budget = as_budget(steps, epochs, seconds)
    check("seed", seed, lambda n: is_whole(n) and 0 <= n < 2**63, "a whole number from 0 to 2**63 - 1")
    options = Options(
        schedule,
        WARMUP_STEPS if warmup is None else warmup,
        weight_decay,
        regularize or {},
        clip,
        accumulate,
        precision,
        ema,
        augment or {},
        best,
        patience,
        slices,
    )
    check_slices(slices)

    def length() -> float:
        """The number of steps, where it is known."""
        if budget[0] == "epochs":  # of which an epoch's last may be of fewer batches than are accumulated
            return budget[1] * stream.count() / accumulate
        return budget[1] if budget[0] == "steps" else math.inf

    automatic = optimizer if lr == AUTO and given("train", optimizer).takes_rate else None
    choice = choose(optimizer, lr if automatic is None else 1.0, options, length)
    check_warmup(warmup, budget, 0, accumulate)
    start.check(init)
    for path in (out, report):
        check_path(path)
    for name, function in (("progress", progress), ("on_step", on_step)):
        check(name, function, lambda f: f is None or callable(f), "a function")
    page.check(report, out)
    objective = as_objective(task.objective)
    if resume and out is None:
        raise InputError("train: resume needs out=, the folder of the run to resume")
    if shard and not placement.is_distributed():
        _warn(
            "train: shard divides the model over processes, and there is one, which keeps the whole model. For more: "
            "torchrun --nproc-per-node=2 -m gramian train … --shard"
        )
    place = None if out is None else Path(out).absolute()  # before anything of the task runs, which may change folders
    if automatic is not None:
        with noticing(), placement.agreed("train"):
            lr = rounded(suggested(task, automatic, init, seed))
        choice = choose(automatic, lr, options, length)
    with naming_the_lost(), noticing(), seeded(seed), ExitStack() as stack:
        model = _model_of(task, slices, saved=place is not None)
        run = Run(model, out=None if out is None else Path(out), optimizer=choice.name)
        identity = identity_of(task, model, choice, init, seed, budget) | options.identity()
        agreement.check_identity(identity)
        folder = saved = None
        if place is not None:
            folder = _opened(stack, place, identity, run, resume=resume)
            with placement.agreed("train"):
                saved = read(place, identity, run.out) if resume else None
        stream = Stream(task, torch.Generator().manual_seed(seed), counted=budget[0] == "epochs")
        if saved is None:
            with placement.agreed("train"):
                if stream.counted:
                    stream.count()
                if isinstance(optimizer, str):
                    choice.make(model)  # refuses options that do not suit it before the diagnosis; made again below
                check_inputs(task, options)
                check_best(task, model, options)
                if warmup is not None and stream.counted:
                    check_warmup(warmup, budget, stream.count(), accumulate)
                if stream.counted and accumulate > stream.count():
                    _warn(
                        f"train: accumulate is {accumulate:,}, more than the batches of an epoch, {stream.count():,}; "
                        f"the steps of the run: {math.ceil(length()):,}"
                    )
            agreement.check_length(stream.length)
            with calling(task, f"the initialization ({init}) of the model"):
                run.init = start.initialize(init, model, task, objective, seed)
            agreement.same_weights_(model)
            if not agreement.first() and slices is None:
                torch.manual_seed(seed + placement.world().rank)  # dropout masks differ, as the rows do
        before = ""
        if report is not None and saved is None:
            with seeded(seed):
                before = page.diagnose(model, task, objective).to_json()
        if shard:
            shard_(model, wide=slices is not None)
        with calling(None, "optimizer(model)"):
            opt = choice.make(model)
        run.rate_from = "suggested" if automatic and lr is not None else rate_from(optimizer, lr, options, length)
        rates = Schedule(*budget, opt, name=schedule, warmup=warmup, accumulate=accumulate)
        loop = Loop(run, task, objective, rates, stream, options, seed)
        loop.before = before
        if saved is not None:
            loop.restore(saved, place)
            if saved["damage"] and folder is not None:
                folder.sound = False
                _warn(f"train: {saved['damage']} Resumed from the checkpoint before, of step {run.steps:,}")
        if not loop.finished:
            _take_steps(loop, folder, progress, on_step, watch=watch)
        elif folder is not None:
            folder.write(run.history)
        if report is not None:
            _report(loop, report, seed)
    loop.warn_of_warmup()
    _warn_of_skipped(run)
    return run


def _model_of(task: Task, slices: int | None, *, saved: bool) -> nn.Module:
    """The task's model, checked, also whether its state can be `saved`, and the same on all ranks."""
    model = None
    with placement.agreed("train"):
        with calling(task, "model()"):
            model = task.model()
        check_model(model, task)
        if saved:
            check_state(model, task)
    assert model is not None
    agreement.check_model(model, slices)
    return model


def _opened(stack: ExitStack, place: Path, identity: dict[str, Any], run: Run, *, resume: bool) -> Folder | None:
    """The folder of the run, locked until the stack is left; on the first rank, which writes."""
    folder = None
    with placement.agreed("train"):
        if agreement.first():
            folder = stack.enter_context(closing(Folder(place, identity, run.out)))
            folder.open(resume=resume)
    return folder


def _take_steps(
    loop: Loop,
    folder: Folder | None,
    progress: Callable[[dict[str, float], float], None] | None,
    on_step: Callable[[Run, float], None] | None,
    *,
    watch: bool,
) -> None:
    """Take the steps of the run, and write the finished model; a signal ends the process when the run is kept."""
    run = loop.run
    with _telling_how_to_go_on(run), Interrupts(active=run.out is not None or placement.is_distributed()) as interrupts:
        with watched(run, loop.optimizer) if watch else nullcontext() as loop.watching:
            loop.go(folder, progress, on_step, interrupts)
        interrupts.is_writing = True
        interrupts.reached()
        loop.finish(folder)


@contextmanager
def _telling_how_to_go_on(run: Run) -> Iterator[None]:
    """Ctrl-C's exception says where the run is, and how it goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        again = "" if run.out is None else f"; continue with the same call and resume=True (out={str(run.out)!r})"
        error.args = error.args or (f"train: interrupted at step {run.steps:,}{again}",)
        raise


def _report(loop: Loop, path: str | Path, seed: int) -> None:
    """Write the report of the run, on the first rank; collective."""
    run, task = loop.run, loop.task
    with seeded(seed):
        before = Report.from_json(loop.before) if loop.before else None
        whole = replace(run, model=whole_copy(run.model, task) if loop.divided else run.model)
        after = page.diagnose(whole.model, task, loop.stepper.objective)
        with placement.agreed("train"):
            if agreement.first():
                page.document(whole, task, before, after).save(path)


def _warn(told: str) -> None:
    """A `GramianWarning` at the line that calls `train`."""
    warnings.warn(told, GramianWarning, stacklevel=3)


def _warn_of_skipped(run: Run) -> None:
    told = ""
    if run.diverged:
        told = (
            f"train: the loss is not finite in {min(NONFINITE_STEPS, run.steps)} steps in a row; stopped after "
            f"{run.steps} steps. {_advice(run)}"
        )
    elif run.skipped and run.resumed != run.steps:
        told = f"train: {run.skipped} of {run.steps} steps were skipped, since the loss or a gradient was not finite"
    if told:
        warnings.warn(told, GramianWarning, stacklevel=3)


def _advice(run: Run) -> str:
    """What to do where the loss is not finite."""
    if math.isnan(run.start):
        return (
            "No step was ever finite, so that no rate is at fault: look for inf and NaN in the inputs, the targets and "
            "the weights, and for logarithms, roots and divisions of zero in the loss (gm.inspect names them)"
        )
    return "Lower the learning rate, or clip the gradients"
