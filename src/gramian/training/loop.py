"""The training loop, and its state, from which a run resumes exactly."""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gramian import placement
from gramian.checkpoint import load_tensors
from gramian.errors import CheckpointError, GramianError, GramianWarning, InputError, TaskError
from gramian.objective import Objective, as_objective
from gramian.recording import evaluating
from gramian.training import agreement, start
from gramian.training.folder import MODEL, Folder, read
from gramian.training.optimizers import Choice, choose
from gramian.training.schedule import Schedule, as_budget
from gramian.training.stream import Stream
from gramian.training.task import Run, Task, as_task, calling

__all__ = ["train"]


def train(
    task: Task,
    *,
    optimizer: str | Callable[[nn.Module], torch.optim.Optimizer] = "auto",
    lr: float | None = None,
    init: str = "default",
    steps: int | None = None,
    epochs: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Callable[[dict[str, float], float], None] | None = None,
    on_step: Callable[[Run, float], None] | None = None,
) -> Run:
    """Train a fresh model of the task and evaluate it during the run.

    The learning rate rises over the first 10 steps and then falls linearly to zero at the end.

    With `out`, a checkpoint is written after each evaluation and every half minute (less often where writing would take
    more than a tenth of the time). A run that was killed at any moment and is started again with `resume=True` ends,
    for steps and epochs, with bitwise the same weights and numbers as an uninterrupted one; for seconds it continues
    with the time that is left. This requires that the batches of an epoch depend only on its number and the generator:
    to resume, the epoch is drawn again from its beginning.

    In a process group, call it on all ranks. Each takes its rows of every batch, and the step is that of the whole
    batch: the same as in one process, within rounding, except for dropout. All ranks draw all batches and evaluate; the
    first one writes. Gradients are added up after the backward pass, not during it.

    Args:
        task: what to train.
        optimizer: `"auto"` (the best one in `gramian bench optim`), another name of `gm.optim.OPTIMIZERS` (AdamW and
            SGD are torch's), or a function `model -> optimizer`.
        lr: learning rate; the optimizer's usual one by default. Not used with a function.
        init: `"default"` leaves the model as the task makes it; `"isometric"` applies `gm.init.isometric_`; `"auto"`
            applies the actions of the errors that `gm.inspect` finds, if all weights are still random and fewer errors
            remain afterwards. `Run.init` says what was done.
        steps, epochs, seconds: the budget; give one. Seconds are of training alone, without evaluation and
            checkpoints. The same seed gives the same run for steps and epochs; for seconds, how far a run gets depends
            on the machine.
        seed: of the model, the order of the batches, `init` and dropout. The global generator is left as it was.
        out: a folder for `metrics.jsonl` (a line for each evaluation, as it happens), `checkpoint.safetensors` while
            the run is unfinished, and `model.safetensors` when it is finished.
        resume: continue the run in `out`, if there is one; a finished one is returned as it is.
        progress: called after each evaluation with its row and the share of the budget that is spent.
        on_step: called before the first and after each step with the run so far and the share that is spent.
    Returns: the run, with its model and history.
    Raises:
        InputError: not exactly one budget, an unknown optimizer or init, or a folder that cannot be written, in which
            another process trains, which holds an unfinished run, or a run of another task, optimizer, rate, seed or
            budget.
        TaskError: the task's functions return the wrong thing.
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
    choice = choose(optimizer, lr)
    start.check(init)
    objective = as_objective(task.objective)
    if resume and out is None:
        raise InputError("train: resume needs out=, the folder of the run to resume")
    with _seeded(seed), ExitStack() as stack:
        with calling(task, "model()"):
            model = task.model()
        if not isinstance(model, nn.Module):
            raise TaskError(f"task {task.name!r}: model() must return a torch.nn.Module, got {type(model).__name__}")
        if not any(p.requires_grad for p in model.parameters()):
            raise TaskError(
                f"task {task.name!r}: no parameter of the model requires a gradient, so nothing can be trained"
            )
        agreement.check_model(model)
        run = Run(model, out=None if out is None else Path(out), optimizer=choice.name)
        identity = _identity(task, model, choice, init, seed, budget)
        folder, saved = None, None
        if run.out is not None:
            with placement.agreed("train"):
                if agreement.first():
                    folder = stack.enter_context(closing(Folder(run.out, identity)))
                    folder.open(resume=resume)
            with placement.agreed("train"):
                saved = read(run.out, identity) if resume else None
        if saved is None:
            run.init = start.initialize(init, model, task, objective, seed)
            agreement.same_weights_(model)
            if not agreement.first():
                torch.manual_seed(seed + placement.world().rank)  # dropout masks differ, as the rows do
        opt = choice.make(model)
        stream = Stream(task, torch.Generator().manual_seed(seed), counted=budget[0] == "epochs")
        loop = Loop(run, task, objective, Schedule(*budget, opt), stream)
        if saved is not None:
            loop.restore(saved)
        if folder is not None:
            folder.write(run.history)
        if not loop.finished:
            loop.go(folder, progress, on_step)
            with placement.agreed("train"):
                if folder is not None:
                    folder.finish(model, loop.summary())
    if run.diverged:
        warnings.warn(f"train: the loss is not finite after {run.steps} steps; stopped", GramianWarning, stacklevel=2)
    return run


class Loop:
    """The state of a run that changes from step to step, to be saved and restored."""

    def __init__(self, run: Run, task: Task, objective: Objective, schedule: Schedule, stream: Stream) -> None:
        self.run, self.task, self.objective, self.schedule, self.stream = run, task, objective, schedule, stream
        self.optimizer = schedule.optimizer
        self.device = next(run.model.parameters()).device
        # Sums of the loss since the last evaluation.
        self.total, self.units = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        self.finished = False
        run.lr = schedule.rates[0]

    def go(
        self,
        folder: Folder | None,
        progress: Callable[[dict[str, float], float], None] | None,
        on_step: Callable[[Run, float], None] | None,
    ) -> None:
        """Take steps until the budget is spent or the loss is not finite."""
        run, schedule = self.run, self.schedule
        run.model.train()
        started = time.perf_counter() - run.seconds
        ended = schedule.share(run) >= 1
        if on_step is not None:
            on_step(run, schedule.share(run))
        while not ended:
            self._step()
            due = [folder is not None and folder.due(evaluated=evaluated) for evaluated in (False, True)]
            run.seconds, *due = agreement.first_ranks([time.perf_counter() - started, *due])
            if on_step is not None:
                on_step(run, schedule.share(run))
            evaluate = schedule.due(run)
            if evaluate:
                row = self._evaluate()
                if folder is not None:
                    folder.append(row)
                if progress is not None:
                    progress(row, schedule.share(run))
                ended = run.diverged or schedule.share(run) >= 1
            if due[evaluate] and not ended:
                state = self.state()
                with placement.agreed("train"):
                    if folder is not None:
                        folder.keep(state)
            started = time.perf_counter() - run.seconds  # only steps count
        self.finished = True

    def _step(self) -> None:
        batch = self.stream.take()
        self.schedule.batches_per_epoch = self.stream.length
        self.schedule.set_rates(self.run)
        if self.stream.taken == 1:
            agreement.check_batch(self.run.model, self.objective, batch)
        self.optimizer.zero_grad()
        loss, count = self.objective.loss(self.run.model, agreement.rows(batch))
        total, units = agreement.sums(loss, count)
        (loss / units).backward()
        agreement.add_gradients(self.run.model)
        self.optimizer.step()
        self.total += total
        self.units += units
        self.run.steps += 1

    def _evaluate(self) -> dict[str, float]:
        run, task = self.run, self.task
        loss = float(self.total / self.units)
        self.total.zero_()
        self.units.zero_()
        with evaluating(run.model), torch.no_grad(), calling(task, "evaluate(model)"):
            numbers = task.evaluate(run.model)
        if not isinstance(numbers, dict) or not all(isinstance(v, (int, float)) for v in numbers.values()):
            raise TaskError(f"task {task.name!r}: evaluate(model) must return a dict of floats, got {numbers!r}")
        row = {"step": run.steps, "seconds": round(run.seconds, 4), "loss": loss}
        for name in row.keys() & numbers.keys():
            raise TaskError(
                f"task {task.name!r}: evaluate(model) returned {name!r}, which is the run's own (loss: of training); "
                f"choose another name, as in 'held_out_{name}'"
            )
        row |= numbers
        run.history.append(row)
        run.diverged = not math.isfinite(loss)
        return row

    def summary(self) -> dict[str, Any]:
        """Return the run's numbers without its weights; enough for `restore` if the run is finished."""
        run = self.run
        numbers = {"steps": run.steps, "seconds": run.seconds, "diverged": run.diverged, "init": run.init}
        return numbers | {"rates": self.schedule.rates, "history": run.history}

    def state(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on."""
        return self.summary() | {
            "since": {"total": self.total, "units": self.units},
            "evaluations": self.schedule.evaluations,
            "stream": self.stream.state(),
            "random": agreement.random_states(self.device),
            "model": self.run.model.state_dict(),
            "buffers": _nonpersistent(self.run.model),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Restore what `state` returned, or the end of a finished run."""
        run, schedule = self.run, self.schedule
        assert run.out is not None
        try:
            if saved["rates"] != schedule.rates:
                raise InputError(
                    f"train: cannot resume, the run in {run.out} is of learning rates {saved['rates']}, not "
                    f"{schedule.rates}. Give the optimizer that it began with, or choose another folder"
                )
            run.steps, run.seconds, run.resumed = int(saved["steps"]), float(saved["seconds"]), int(saved["steps"])
            run.init, run.diverged = str(saved["init"]), bool(saved["diverged"])
            run.history = [{str(name): value + 0 for name, value in row.items()} for row in saved["history"]]
            if saved.get("finished"):
                run.model.load_state_dict(load_tensors(run.out / MODEL)[0], strict=False)  # extra state is not in it
                self.finished = True
                return
            run.model.load_state_dict(saved["model"])
            for name, buffer in _nonpersistent(run.model).items():
                buffer.copy_(saved["buffers"][name])
            self.optimizer.load_state_dict(saved["optimizer"])
            schedule.evaluations = saved["evaluations"]
            self.total.copy_(saved["since"]["total"])
            self.units.copy_(saved["since"]["units"])
            agreement.restore_random_state(saved["random"], self.device)
            self.stream.restore(saved["stream"])
            schedule.batches_per_epoch = self.stream.length
        except GramianError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"train: the run in {run.out} cannot be resumed ({type(error).__name__}: {reason}). Was it written by "
                "this task and version? Choose another folder for a new run"
            ) from error


def _identity(
    task: Task, model: nn.Module, choice: Choice, init: str, seed: int, budget: tuple[str, float]
) -> dict[str, str]:
    """Return the settings, as text, that a run must share with a checkpoint to resume it."""
    return {
        "task": task.name,
        "model": _fingerprint(model),
        "optimizer": choice.name,
        "learning rate": "its own" if choice.lr is None else _number(choice.lr),
        "init": init,
        "seed": f"{seed}",
        "budget": f"{_number(budget[1])} {budget[0]}",
        "ranks": f"{placement.world().size}",
    }


def _nonpersistent(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that are not in the state dict."""
    kept = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name not in kept}


def _fingerprint(model: nn.Module) -> str:
    """Return a text that differs for models whose parameters have other names or shapes."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]
    return f"{type(model).__name__} of {sum(map(math.prod, shapes.values())):,} parameters ({digest})"


def _number(value: float) -> str:
    """Return the same text for an int and an equal float."""
    return f"{int(value)}" if float(value).is_integer() else repr(float(value))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of the CPU and of GPUs in use, and restore them afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
