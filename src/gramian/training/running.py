"""The state of a run that changes from step to step: taken forward, saved, and restored exactly."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gramian import placement
from gramian.autograd import Ungraded
from gramian.batch import tensors
from gramian.block import blocks
from gramian.checkpoint import load_tensors
from gramian.checkpoint.names import without_wrappers
from gramian.errors import CheckpointError, GramianError, GramianWarning, InputError, TaskError
from gramian.inspection import Watch
from gramian.inspection.live.gradients import all_finite
from gramian.objective import Objective
from gramian.recording import evaluating
from gramian.training import agreement
from gramian.training.averaging import Average
from gramian.training.checks import holding, plain_numbers, warn_of_plain_numbers
from gramian.training.folder import MODEL, Folder
from gramian.training.interrupts import Interrupts, end
from gramian.training.options import Options, best_row
from gramian.training.randomness import random_states, restore_python, restore_random_state, state_of_python
from gramian.training.schedule import Schedule
from gramian.training.sharding import as_parts, gathered, is_divided, load_model, optimizer_parts
from gramian.training.stepping import Stepper
from gramian.training.stream import Stream
from gramian.training.task import Run, Task, as_numbers, calling, named

__all__ = ["NONFINITE_STEPS", "Loop"]

# So many steps in a row without a finite loss or gradient end a run.
NONFINITE_STEPS = 10

NOT_DUE = (False, False)  # a checkpoint, without and after an evaluation


class Loop:
    """The state of a run that changes from step to step.

    Args:
        run, task, objective, schedule, stream, options, seed: of the run.
    """

    def __init__(
        self,
        run: Run,
        task: Task,
        objective: Objective,
        schedule: Schedule,
        stream: Stream,
        options: Options,
        seed: int,
    ) -> None:
        self.run, self.task, self.schedule, self.stream = run, task, schedule, stream
        self.options = options
        self.optimizer = schedule.optimizer
        self.stepper = Stepper(run.model, task, objective, self.optimizer, options, seed)
        self.failure, self.device = self.stepper.failure, self.stepper.device
        self.ungraded = Ungraded()  # how the task's evaluation is called
        # Sums of the loss since the last evaluation.
        self.total = self.units = 0.0
        self.streak = 0  # skipped steps in a row
        self.divided = is_divided(run.model)
        self.average = None if options.ema is None else Average(run.model, options.ema)
        self.best: dict[str, Tensor] = {}  # the weights of the best evaluation
        self.watching: Watch | None = None
        self.finished = False
        self.before = ""  # the diagnosis before the first step, as JSON, for the report
        run.lr = schedule.rates[0]
        schedule.set_epoch(stream.length)

    def go(
        self,
        folder: Folder | None,
        progress: Callable[[dict[str, float], float], None] | None,
        on_step: Callable[[Run, float], None] | None,
        interrupts: Interrupts,
    ) -> None:
        """Take steps until the budget is spent, nothing improves any more, or the loss stays not finite.

        A signal that is noted in `interrupts` ends the process after the step, when the run was kept.
        """
        run, schedule = self.run, self.schedule
        run.model.train()
        started = time.perf_counter() - run.seconds
        share = schedule.share(run)
        ended = share >= 1
        if on_step is not None:
            on_step(run, share)
        first = True
        numbers = plain_numbers(run.model) if folder is not None else {}
        while not ended:
            self._step(share)
            if first:
                self.stepper.check_parameters()
                if folder is not None:
                    warn_of_plain_numbers(self.task, numbers, plain_numbers(run.model))
                    folder.room.make(self._size())
                first = False
            run.seconds, due, signal = self._agreed(time.perf_counter() - started, folder, interrupts)
            share = schedule.share(run)
            if on_step is not None:
                on_step(run, share)
            run.diverged = self.streak >= min(NONFINITE_STEPS, run.steps)
            evaluate = schedule.due(share)
            ended = share >= 1 or self.streak >= NONFINITE_STEPS
            run.diverged = ended and run.diverged
            self._check_units(ended)
            if evaluate or run.diverged:
                row = self._evaluate()
                if folder is not None:
                    folder.append(run.history)
                if progress is not None:
                    progress(row, share)
                ended = ended or self._stops()
            if signal:
                interrupts.reached()
            if (due[evaluate] or (signal and run.out is not None)) and not ended and self._is_sound():
                self._keep(folder, wait=bool(signal))
            if signal and not ended:
                end(signal)
            started = time.perf_counter() - run.seconds  # only steps count
        self.finished = not run.diverged
        if self.finished:
            self._take_final_weights()

    def _agreed(
        self, seconds: float, folder: Folder | None, interrupts: Interrupts
    ) -> tuple[float, tuple[bool, bool], int]:
        """The first rank's seconds, whether its folder wants a checkpoint, without and after an evaluation, and the
        signal that any rank received; raises where another one failed.
        """
        due = NOT_DUE
        if folder is not None:
            with self.failure.caught():
                due = folder.due()
        if self.stepper.alone:
            return seconds, due, interrupts.received
        facts = {"seconds": seconds, "due": due, "signal": interrupts.received}
        told = agreement.exchanged(facts, self.failure)
        return told[0]["seconds"], told[0]["due"], max([other["signal"] for other in told])

    def _step(self, share: float) -> None:
        run, schedule = self.run, self.schedule
        schedule.set_rates(run, share)
        total, units, taken = self.stepper.step(self.stream, schedule.num_batches(run))
        run.steps += 1
        if taken:
            self.total += total
            self.units += units
            self.streak = 0
            if math.isnan(run.start) and units > 0:
                run.start = total / units
            if self.average is not None and not self.stepper.overflowed:
                self.average.update()
            return
        self.streak += 1
        run.skipped += 1
        if self.watching is not None and not self.divided:  # of a divided model, a pass again would be a collective
            self.watching.left_out()

    def _check_units(self, ended: bool) -> None:
        """Raise `TaskError` where a whole epoch, or the run, had no unit, so that nothing was trained."""
        if math.isnan(self.run.start) and not self.run.skipped and (ended or self.stream.epoch):
            raise TaskError(
                f"{named(self.task)}: no batch had a row whose loss counts. Are the batches empty, or all labels "
                "ignored?"
            )

    def _evaluate(self) -> dict[str, float]:
        run, task = self.run, self.task
        loss = self.total / self.units if self.units else math.nan
        self.total = self.units = 0.0
        found: Any = {}
        python = state_of_python()
        with (
            self.failure.caught() if self.divided else placement.agreed("train"),  # where they are collectives
            evaluating(run.model),
            torch.no_grad(),
            calling(task, "evaluate(model)"),
            self._averaged(),
        ):
            found = self.ungraded(task.evaluate, run.model)
        restore_python(python)
        measured = as_numbers(found, task)
        row = {"step": run.steps, "seconds": round(run.seconds, 4), "loss": loss}
        for name in row.keys() & measured.keys():
            raise TaskError(
                f"{named(task)}: evaluate(model) returned {name!r}, which is the run's own (loss: of training); "
                f"choose another name, as in 'held_out_{name}'"
            )
        row |= measured
        run.history.append(row)
        if self.options.best is not None and best_row(self.options.best, run.history)[1] == 0:
            with self._averaged():
                self.best = {name: t.detach().clone() for name, t in _tensors(run.model).items()}
        return row

    def _averaged(self) -> AbstractContextManager[None]:
        """A context with the weights that are evaluated."""
        return nullcontext() if self.average is None else self.average.used()

    def _stops(self) -> bool:
        """Whether the best evaluation lies too far back."""
        options, run = self.options, self.run
        if options.best is None or options.patience is None or run.diverged:
            return False
        since = best_row(options.best, run.history)[1]
        if since >= options.patience:
            run.stopped = f"{options.best} did not improve in {since} evaluations"
        return since >= options.patience

    def _is_sound(self) -> bool:
        """Whether the weights are worth keeping: the last loss was finite, and so are they."""
        parts = placement.locals_of(list(self.run.model.parameters()))
        sound = self.streak == 0 and all_finite(parts)
        return not placement.any_rank(not sound) if self.divided else sound

    def _size(self) -> int:
        """The bytes of a checkpoint's tensors, roughly, once the optimizer has its state."""
        average = None if self.average is None else self.average.state()
        held = [_tensors(self.run.model), average, *self.optimizer.state.values()]
        return sum(t.numel() * t.element_size() for t in tensors(held))

    def _keep(self, folder: Folder | None, *, wait: bool) -> None:
        with holding():
            state = self.state()
        with placement.agreed("train"):
            if folder is not None:
                folder.keep(state)
                if wait:
                    folder.wait()

    def finish(self, folder: Folder | None) -> None:
        """Write the finished model, or wait for the last checkpoint of a run that diverged."""
        held = gathered(_tensors(self.run.model)) if self.finished and self.run.out is not None else {}
        weights = {without_wrappers(name): tensor for name, tensor in (held or {}).items()}
        with placement.agreed("train"):
            if folder is not None:
                folder.wait()
                if self.finished:
                    folder.finish(weights, blocks(self.run.model).metadata(), self.summary(), self.run.history)

    def warn_of_warmup(self) -> None:
        """Warn where a budget in seconds ended before the warm-up that was asked for."""
        run, asked = self.run, self.schedule.asked_warmup
        if asked is not None and run.steps < asked and run.resumed != run.steps and not (run.diverged or run.stopped):
            warnings.warn(
                f"train: the warm-up takes {asked:,} steps, and the run ended after {run.steps:,}, so that the rate "
                f"{run.lr:.3g} was never reached. Give a shorter warm-up, or more seconds",
                GramianWarning,
                stacklevel=3,
            )

    def _take_final_weights(self) -> None:
        """Give the model the weights that the run was for: the best evaluation's, or the averaged ones."""
        if self.best:
            self._note_best()
            with torch.no_grad():
                for name, tensor in _tensors(self.run.model).items():
                    tensor.copy_(self.best[name])
        elif self.average is not None:
            self.average.put()

    def _note_best(self) -> None:
        best, history = self.options.best, self.run.history
        if best is not None and history:
            self.run.best_step = int(history[best_row(best, history)[0]]["step"])

    def summary(self) -> dict[str, Any]:
        """Return the run's numbers without its weights; enough for `restore` if the run is finished."""
        run = self.run
        names = ("steps", "seconds", "diverged", "init", "skipped", "stopped", "start", "findings")
        return {name: getattr(run, name) for name in names} | {"rates": self.schedule.rates, "history": run.history}

    def state(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on."""
        return self.summary() | gathered(
            {
                "since": {"total": self.total, "units": self.units},
                "evaluations": self.schedule.evaluations,
                "before": self.before,
                "stream": self.stream.state(),
                "random": random_states(self.device),
                "model": self.run.model.state_dict(),
                "buffers": _nonpersistent(self.run.model),
                "optimizer": self.optimizer.state_dict(),
                "scale": self.stepper.scale.state(),
                "average": {} if self.average is None else self.average.state(),
                "best": self.best,
            }
        )

    def restore(self, saved: dict[str, Any], place: Any) -> None:
        """Restore what `state` returned, or the end of a finished run in the folder `place`."""
        run, schedule = self.run, self.schedule
        try:
            if saved["rates"] != schedule.rates:
                raise InputError(
                    f"train: cannot resume, the run in {run.out} is of learning rates {saved['rates']}, not "
                    f"{schedule.rates}. Give the optimizer that it began with, or choose another folder"
                )
            run.steps, run.seconds, run.resumed = int(saved["steps"]), float(saved["seconds"]), int(saved["steps"])
            run.init, run.diverged = str(saved["init"]), bool(saved["diverged"])
            run.skipped, run.stopped = int(saved["skipped"]), str(saved["stopped"])
            run.start = float(saved.get("start", math.nan))
            run.findings = [{str(name): value for name, value in row.items()} for row in saved.get("findings", [])]
            run.history = [{str(name): value + 0 for name, value in row.items()} for row in saved["history"]]
            if saved.get("finished"):
                held = load_tensors(place / MODEL)[0]
                names = {without_wrappers(name): name for name in run.model.state_dict()}
                state = {names.get(name, name): tensor for name, tensor in held.items()}
                load_model(run.model, state, strict=False)  # extra state is not in it
                self.finished = True
                self._note_best()
                return
            load_model(run.model, saved["model"])
            for name, buffer in _nonpersistent(run.model).items():
                buffer.copy_(saved["buffers"][name])
            self.optimizer.load_state_dict(optimizer_parts(self.optimizer, saved["optimizer"]))
            schedule.evaluations = saved["evaluations"]
            self.before = str(saved.get("before", ""))
            self.total, self.units = float(saved["since"]["total"]), float(saved["since"]["units"])
            self.stepper.scale.restore(saved.get("scale", {}))
            if self.average is not None:
                self.average.restore(saved["average"])
            own = _tensors(run.model)
            self.best = {name: as_parts(value.to(self.device), own[name]) for name, value in saved["best"].items()}
            self.stream.restore(saved["stream"])
            restore_random_state(saved["random"], self.device, run.steps, same=self.options.slices is not None)
            schedule.set_epoch(self.stream.length)
        except GramianError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"train: the run in {run.out} cannot be resumed ({type(error).__name__}: {reason}). Was it written by "
                "this task and version? Choose another folder for a new run"
            ) from error


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def _nonpersistent(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are not in the state dict."""
    kept = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name not in kept}
