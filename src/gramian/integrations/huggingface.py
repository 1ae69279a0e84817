"""Hugging Face's Trainer: an optimizer that knows its matrices' roles; inspections, a watch, and health in the logs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from gramian.errors import InputError
from gramian.inspection import Watch, watch
from gramian.integrations.extras import load
from gramian.integrations.loggers import Logger
from gramian.integrations.metrics import Inspector, health_metrics
from gramian.optim.registry import AUTO, MATRIX_OPTIMIZERS
from gramian.optim.shell import MatrixOptimizer
from gramian.report import Finding

__all__ = ["attach_to_trainer", "trainer_optimizer", "watch_trainer"]

# Numbers of a watch that are counted from one entry of the Trainer's log to the next.
COUNTS = frozenset({"watch/errors", "watch/warnings"})


def trainer_optimizer(kind: str | type[MatrixOptimizer] = "auto", **options: Any) -> tuple[Any, dict[str, Any]]:
    """What a Trainer's `optimizer_cls_and_kwargs` takes, so that it builds the optimizer from the model.

    The Trainer's own groups of parameters have no names. This one gets the model instead, also after `model_init` and
    under FSDP2. Of `TrainingArguments`, the schedule, accumulation, clipping and precision apply as always;
    `learning_rate`, `weight_decay`, `optim` and Adam's options do not: give `lr=`, `weight_decay=` and others here. A
    rate that was tuned for AdamW goes with `scale="match_rms_adamw"`.

    Args:
        kind: a name of `gm.optim.OPTIMIZERS`, `"auto"`, or the class.
        options: of the optimizer; without `lr`, it takes its usual rate.

    Returns:
        A pair: a function that returns the class, which the Trainer calls first, and the options.

    Raises:
        InputError: for a name that is not known.

    Cost: none.
    Source: `Trainer.create_optimizer` of transformers 5.

    >>> make, options = trainer_optimizer("muon", weight_decay=0.1)
    >>> make(), options  # in full: Trainer(model, args, …, optimizer_cls_and_kwargs=trainer_optimizer("muon"))
    (<class 'gramian.optim.muon.Muon'>, {'weight_decay': 0.1})
    """
    if isinstance(kind, str):
        name = AUTO if kind == "auto" else kind
        if name not in MATRIX_OPTIMIZERS:
            known = ", ".join(["auto", *MATRIX_OPTIMIZERS])
            raise InputError(f"trainer_optimizer: unknown optimizer {kind!r}; wanted {known}, or a class of gm.optim")
        kind = MATRIX_OPTIMIZERS[name].optimizer  # type: ignore[assignment]
    return (lambda: kind), options


def attach_to_trainer(trainer: Any, inspector: Inspector | None = None, loggers: Sequence[Logger] = ()) -> Any:
    """Adds a callback to a Trainer: the optimizer's health in its logs, and inspections.

    Whenever the Trainer logs the loss, the entry has `optimizer/skipped` and `optimizer/fallbacks` too, in
    `log_history` and for everything that the Trainer reports to. The model is inspected at the start, every
    `inspector.every` steps, and at the end; the next entry has the number of findings.

    Args:
        trainer: before `train()`.
        inspector: `Inspector(batches, objective, every=500)`; without one, nothing is inspected.
        loggers: who gets the numbers besides the Trainer, such as `JsonlLogger`.

    Returns:
        The callback, a `transformers.TrainerCallback`; it is first in the Trainer's list, so that those that report
        find the numbers.

    Raises:
        UnsupportedError: transformers is not installed.

    Cost: one synchronization with the device when the Trainer logs; `gm.inspect` where it inspects.
    Source: this library's own.

    >>> import torch, transformers
    >>> args = transformers.TrainingArguments("out", report_to=[], use_cpu=True)
    >>> trainer = transformers.Trainer(torch.nn.Linear(2, 2), args)
    >>> callback = attach_to_trainer(trainer, Inspector(every=500))
    >>> trainer.callback_handler.callbacks[0] is callback
    True
    """
    base: Any = load("transformers", "hf").TrainerCallback

    class GramianCallback(base):
        """Logs the optimizer's health and inspects the model."""

        def __init__(self) -> None:
            self.found: dict[str, float] = {}  # by the last inspection, and not logged yet

        def _inspect(self, state: Any, model: Any) -> None:
            if inspector is not None and state.global_step not in inspector.reports:
                self.found = inspector(model, state.global_step)
                self._log(self.found, state.global_step)

        def _log(self, metrics: dict[str, float], step: int) -> None:
            for logger in loggers:
                logger.log(metrics, step)

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self._inspect(state, model)

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if inspector is not None and inspector.is_due(state.global_step):
                self._inspect(state, model)

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self._inspect(state, model)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **_: Any
        ) -> None:
            if logs is None or "loss" not in logs:
                return
            health = health_metrics(trainer.optimizer if optimizer is None else optimizer)
            self._log(health, state.global_step)
            # The entry of `log_history` is a copy that was made before callbacks were called.
            for entry in (logs, state.log_history[-1]):
                entry.update(health | self.found)
            self.found = {}

    callback = GramianCallback()
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback


def watch_trainer(
    trainer: Any,
    loggers: Sequence[Logger] = (),
    *,
    every: int = 50,
    share: float | None = 0.02,
    on_finding: Callable[[Finding, int], Any] | None = None,
    raise_on: str | Collection[str] | None = None,
) -> Any:
    """Adds a callback to a Trainer that watches the run, as `gm.watch` does in a loop of one's own.

    Whenever the Trainer logs the loss, the entry has `watch/gradient` and `watch/change` of the last step that was
    looked at, and the number of errors and warnings that were found since the last entry, in `log_history` and for
    everything that the Trainer reports to.

    Args:
        trainer: before `train()`.
        loggers: who gets the numbers besides the Trainer, at the step itself, such as `JsonlLogger`.
        every, share, on_finding, raise_on: as in `gm.watch`.

    Returns:
        The callback, a `transformers.TrainerCallback`; its `watching` is the `Watch` of the last run, with the
        findings.

    Raises:
        UnsupportedError: transformers is not installed.

    Cost: as `gm.watch`.
    Source: this library's own.

    >>> import torch, transformers
    >>> args = transformers.TrainingArguments("out", report_to=[], use_cpu=True)
    >>> trainer = transformers.Trainer(torch.nn.Linear(2, 2), args)
    >>> callback = watch_trainer(trainer, raise_on="error")
    >>> trainer.callback_handler.callbacks[0] is callback
    True
    """
    base: Any = load("transformers", "hf").TrainerCallback

    class GramianWatch(base):
        """Watches the steps of the Trainer."""

        def __init__(self) -> None:
            self.watching: Watch | None = None
            self.found: dict[str, float] = {}  # since the last entry

        def log(self, metrics: dict[str, float], step: int) -> None:
            for logger in loggers:
                logger.log(metrics, step)
            self.found |= metrics | {key: self.found.get(key, 0.0) + metrics[key] for key in COUNTS}

        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            self._end()
            self.watching = watch(
                trainer.model_wrapped,
                trainer.optimizer if optimizer is None else optimizer,
                every=every,
                share=share,
                on_finding=on_finding,
                raise_on=raise_on,
                log=self,
            )
            self.watching.step = state.global_step

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._end()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs is None or "loss" not in logs:
                return
            for entry in (logs, state.log_history[-1]):  # which is a copy
                entry.update(self.found)
            self.found |= dict.fromkeys(COUNTS & self.found.keys(), 0.0)

        def _end(self) -> None:
            if self.watching is not None:
                self.watching.close()

    callback = GramianWatch()
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback
