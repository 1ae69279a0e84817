"""The training loop: a task, an optimizer, a budget in steps, epochs or seconds."""

from __future__ import annotations

import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gramian.checkpoint import save_tensors
from gramian.errors import GramianWarning, InputError, TaskError
from gramian.init import isometric_
from gramian.objective import Objective, as_objective
from gramian.optim import SOAP, Muon, Shampoo, SOAPMuon
from gramian.recording import evaluating

__all__ = ["OPTIMIZERS", "Run", "Task", "train"]

# Evaluations spread over a run.
NUM_EVALUATIONS = 20

WARMUP_STEPS = 10

# name: (constructor, learning rate that serves where none is given)
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], float]] = {
    "soap_muon": (lambda model, lr: SOAPMuon(model, lr=lr), 0.1),
    "muon": (lambda model, lr: Muon(model, lr=lr), 0.05),
    "soap": (lambda model, lr: SOAP(model, lr=lr), 0.1),
    "shampoo": (lambda model, lr: Shampoo(model, lr=lr), 0.1),
    "adamw": (lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr, fused=True), 1e-3),
}
AUTO = "soap_muon"


@dataclass(frozen=True)
class Task:
    """What to train on and how to tell whether it worked.

    Args:
        model: a factory of fresh models.
        objective: `gm.Objective`, or `loss(model, batch) -> scalar mean`.
        train_batches: `train_batches(epoch, generator)`, the batches of one epoch; the generator shuffles.
        evaluate: `evaluate(model) -> {"accuracy": …}`, held-out numbers by name.
        name: for reports.
    """

    model: Callable[[], nn.Module]
    objective: Objective | Callable[..., Any]
    train_batches: Callable[[int, torch.Generator], Iterable[Any]]
    evaluate: Callable[[nn.Module], dict[str, float]]
    name: str = "task"

    def batches(self, num: int | None = None) -> list[Any]:
        """The first `num` training batches (all of an epoch by default), in the order of epoch 0 and seed 0."""
        batches = []
        for batch in self.train_batches(0, torch.Generator().manual_seed(0)):
            if num is not None and len(batches) >= num:
                break
            batches.append(batch)
        if not batches:
            raise TaskError(f"task {self.name!r}: train_batches(0, generator) gave no batches")
        return batches


@dataclass
class Run:
    """A finished training: the model, what was measured on the way, and where it was written.

    `history` has one row for each evaluation: `step`, `seconds` (of training alone, without evaluation), `loss` (mean
    since the last row), and the task's numbers. `diverged` is set where the loss stopped being finite.
    """

    model: nn.Module
    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    diverged: bool = False
    out: Path | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The last row of the history."""
        return self.history[-1] if self.history else {}


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
    progress: Callable[[dict[str, float], float], None] | None = None,
) -> Run:
    """Trains a fresh model of the task and evaluates it on the way.

    The learning rate rises over the first 10 steps and then falls linearly to zero at the end.

    Args:
        task: what to train.
        optimizer: `"auto"` (`AUTO`: what `gramian bench optim` shows to be best), another name of `OPTIMIZERS` (AdamW
            is torch's, fused), or a function `model -> optimizer`.
        lr: learning rate; the optimizer's usual one by default. Not used with a function.
        init: `"default"` leaves the model as the task makes it; `"isometric"` applies `gm.init.isometric_`.
        steps, epochs, seconds: the budget; give one. Seconds are of training alone, without evaluation. The same seed
            gives the same run for steps and epochs; for seconds, how far a run gets depends on the machine.
        seed: of the order of the batches, of `init` and of dropout. The global generator is left as it was.
        out: a folder for `metrics.jsonl` (a line for each evaluation, as it happens) and `model.safetensors`.
        progress: called after each evaluation with its row and the share of the budget that is done.

    Raises:
        InputError: not exactly one budget, or an unknown optimizer or init.
        TaskError: the task's functions return the wrong thing.
    """
    budget = _budget(steps, epochs, seconds)
    objective = as_objective(task.objective)
    generator = torch.Generator().manual_seed(seed)
    model = task.model()
    if not isinstance(model, nn.Module):
        raise TaskError(f"task {task.name!r}: model() must return a torch.nn.Module, got {type(model).__name__}")
    if init == "isometric":
        isometric_(model, task.batches(1)[0], generator=torch.Generator().manual_seed(seed), predict=objective.predict)
    elif init != "default":
        raise InputError(f"train: init must be 'default' or 'isometric', got {init!r}")
    opt = _optimizer(optimizer, model, lr)
    schedule = _Schedule(*budget, opt)
    device = next(model.parameters()).device
    run = Run(model, out=None if out is None else Path(out))
    log = _Log(run, task, progress)
    model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # of dropout
        _loop(run, task, objective, opt, schedule, generator, log)
    if run.diverged:
        warnings.warn(f"train: the loss is not finite after {run.steps} steps; stopped", GramianWarning, stacklevel=2)
    if run.out is not None:
        save_tensors(run.out / "model.safetensors", model.state_dict(), {"gramian.task": task.name})
    return run


def _loop(
    run: Run,
    task: Task,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    schedule: _Schedule,
    generator: torch.Generator,
    log: _Log,
) -> None:
    """Steps until the budget is spent or the loss is not finite."""
    device = next(run.model.parameters()).device
    total, units, started = torch.zeros((), device=device), torch.zeros((), device=device), time.perf_counter()
    for batch in _stream(task, generator, schedule):
        schedule.set_rates(run)
        optimizer.zero_grad()
        loss, count = objective.loss(run.model, batch)
        (loss / count).backward()
        optimizer.step()
        total += loss.detach()
        units += count
        run.steps += 1
        run.seconds = time.perf_counter() - started - log.pause
        if not schedule.due(run):
            continue
        mean = float(total / units)
        log.write(mean, schedule.share(run))
        total.zero_()
        units.zero_()
        run.diverged = not math.isfinite(mean)
        if run.diverged or schedule.share(run) >= 1:
            return


def _budget(steps: int | None, epochs: int | None, seconds: float | None) -> tuple[str, float]:
    given = {k: v for k, v in (("steps", steps), ("epochs", epochs), ("seconds", seconds)) if v is not None}
    if len(given) != 1:
        raise InputError(f"train: give one of steps=, epochs=, seconds=; got {', '.join(given) or 'none'}")
    ((kind, amount),) = given.items()
    if not amount > 0:
        raise InputError(f"train: {kind} must be positive, got {amount}")
    return kind, amount


def _optimizer(
    optimizer: str | Callable[[nn.Module], torch.optim.Optimizer], model: nn.Module, lr: float | None
) -> torch.optim.Optimizer:
    if callable(optimizer):
        if lr is not None:
            warnings.warn("train: lr is ignored, the optimizer is a function", GramianWarning, stacklevel=3)
        return optimizer(model)
    name = AUTO if optimizer == "auto" else optimizer
    if name not in OPTIMIZERS:
        raise InputError(f"train: unknown optimizer {optimizer!r}; wanted auto, {', '.join(OPTIMIZERS)}, or a function")
    make, usual = OPTIMIZERS[name]
    return make(model, usual if lr is None else lr)


class _Schedule:
    """How much of the budget is spent, the learning rate there, and when to evaluate."""

    def __init__(self, kind: str, amount: float, optimizer: torch.optim.Optimizer) -> None:
        self.kind, self.amount = kind, amount
        self.groups = optimizer.param_groups
        self.rates = [group["lr"] for group in self.groups]
        self.batches_per_epoch = 0
        self.evaluations = 0

    def share(self, run: Run) -> float:
        """The share of the budget that is spent; 1 at the end."""
        if self.kind == "seconds":
            return min(1.0, run.seconds / self.amount)
        total = self.amount * self.batches_per_epoch if self.kind == "epochs" else self.amount
        return min(1.0, run.steps / math.ceil(total))

    def set_rates(self, run: Run) -> None:
        factor = min(1.0, (run.steps + 1) / WARMUP_STEPS) * (1 - self.share(run))
        for group, rate in zip(self.groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def due(self, run: Run) -> bool:
        """Whether another twentieth of the budget is spent since the last evaluation."""
        passed = math.floor(self.share(run) * NUM_EVALUATIONS + 1e-9)
        if passed <= self.evaluations:
            return False
        self.evaluations = passed
        return True


def _stream(task: Task, generator: torch.Generator, schedule: _Schedule) -> Iterator[Any]:
    """Batches, epoch after epoch, without end."""
    for epoch in itertools.count():
        batches: Iterable[Any] = task.train_batches(epoch, generator)
        if schedule.kind == "epochs" and not schedule.batches_per_epoch:
            batches = list(batches)
            schedule.batches_per_epoch = len(batches)
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise TaskError(f"task {task.name!r}: train_batches({epoch}, generator) gave no batches")


class _Log:
    """Evaluates, keeps the history, writes it as it happens. `pause` is the time spent here."""

    def __init__(self, run: Run, task: Task, progress: Callable[[dict[str, float], float], None] | None) -> None:
        self.run, self.task, self.progress = run, task, progress
        self.pause = 0.0
        if run.out is not None:
            try:
                run.out.mkdir(parents=True, exist_ok=True)
                (run.out / "metrics.jsonl").write_text("")
            except OSError as error:
                raise InputError(f"train: cannot write to {run.out}: {error.strerror}. Choose another folder") from None

    def write(self, loss: float, share: float) -> None:
        begin = time.perf_counter()
        with evaluating(self.run.model), torch.no_grad():
            numbers = self.task.evaluate(self.run.model)
        if not isinstance(numbers, dict) or not all(isinstance(v, (int, float)) for v in numbers.values()):
            raise TaskError(f"task {self.task.name!r}: evaluate(model) must return a dict of floats, got {numbers!r}")
        row = {"step": self.run.steps, "seconds": round(self.run.seconds, 4), "loss": loss, **numbers}
        self.run.history.append(row)
        if self.run.out is not None:
            line = {k: v if math.isfinite(v) else None for k, v in row.items()}
            with (self.run.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self.progress is not None:
            self.progress(row, share)
        self.pause += time.perf_counter() - begin
