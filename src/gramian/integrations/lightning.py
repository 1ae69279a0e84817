"""Lightning: inspections, a watch, and the optimizer's health in its loggers. `configure_optimizers` needs no help."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from gramian.errors import UnsupportedError
from gramian.inspection import Watch, watch
from gramian.integrations.extras import load
from gramian.integrations.loggers import Logger
from gramian.integrations.metrics import Inspector, health_metrics
from gramian.report import Finding

__all__ = ["lightning_callback", "lightning_watch"]


def lightning_callback(inspector: Inspector | None = None, loggers: Sequence[Logger] = ()) -> Any:
    """A callback for Lightning's Trainer: the optimizers' health in its loggers, and inspections.

    Every `log_every_n_steps` steps the Trainer's loggers get `optimizer/skipped` and `optimizer/fallbacks`, with the
    optimizer's number in front where there are several. The module is inspected at the start, every `inspector.every`
    steps, and at the end.

    The optimizer itself is one line, `def configure_optimizers(self): return gm.optim.Muon(self)`.

    Args:
        inspector: `Inspector(batches, objective, every=500)`; without one, nothing is inspected.
        loggers: who gets the numbers besides the Trainer's loggers, such as `JsonlLogger`.

    Returns:
        A `lightning.pytorch.Callback`.

    Raises:
        UnsupportedError: lightning is not installed.

    Cost: one synchronization with the device where it logs; `gm.inspect` where it inspects.
    Source: this library's own.

    >>> import lightning.pytorch
    >>> isinstance(lightning_callback(Inspector(every=500)), lightning.pytorch.Callback)
    True
    """
    base: Any = load("lightning.pytorch", "lightning").Callback

    class GramianCallback(base):
        """Logs the optimizers' health and inspects the module."""

        step = 0  # the last one seen: with accumulation, several batches end at the same step

        def _log(self, trainer: Any, metrics: dict[str, float]) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, trainer.global_step)
            for logger in loggers:
                logger.log(metrics, trainer.global_step)

        def _inspect(self, trainer: Any, module: Any) -> None:
            if inspector is not None and trainer.global_step not in inspector.reports:
                self._log(trainer, inspector(module, trainer.global_step))

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.step = trainer.global_step
            self._inspect(trainer, pl_module)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == self.step:
                return
            self.step = trainer.global_step
            if self.step % max(trainer.log_every_n_steps, 1) == 0:
                several = len(trainer.optimizers) > 1
                for i, optimizer in enumerate(trainer.optimizers):
                    metrics = health_metrics(optimizer)
                    self._log(trainer, {f"{i}/{key}" if several else key: value for key, value in metrics.items()})
            if inspector is not None and inspector.is_due(self.step):
                self._inspect(trainer, pl_module)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self._inspect(trainer, pl_module)

    return GramianCallback()


def lightning_watch(
    loggers: Sequence[Logger] = (),
    *,
    every: int = 50,
    share: float | None = 0.02,
    on_finding: Callable[[Finding, int], Any] | None = None,
    raise_on: str | Collection[str] | None = None,
) -> Any:
    """A callback for Lightning's Trainer that watches the run, as `gm.watch` does in a loop of one's own.

    It sees `training_step`, and follows the steps of the module's optimizer, from the start of the training to its end.
    The Trainer's loggers get `watch/gradient`, `watch/change` and the number of new errors and warnings.

    Args:
        loggers: who gets the numbers besides the Trainer's loggers, such as `JsonlLogger`.
        every, share, on_finding, raise_on: as in `gm.watch`.

    Returns:
        A `lightning.pytorch.Callback`; its `watching` is the `Watch` of the last run, with the findings.

    Raises:
        UnsupportedError: lightning is not installed; when the training starts: the module has several optimizers.

    Cost: as `gm.watch`.
    Source: this library's own.

    >>> import lightning.pytorch
    >>> isinstance(lightning_watch(raise_on="error"), lightning.pytorch.Callback)
    True
    """
    base: Any = load("lightning.pytorch", "lightning").Callback

    class GramianWatch(base):
        """Watches the steps of the Trainer."""

        watching: Watch | None = None
        own: Callable | None = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self._end(pl_module)
            if len(trainer.optimizers) != 1:
                raise UnsupportedError(
                    f"lightning_watch: {type(pl_module).__name__} has {len(trainer.optimizers)} optimizers, and a "
                    "watch follows the steps of one. Call gm.watch(part, optimizer) for each in on_train_start"
                )
            self.watching = watch(
                trainer.strategy.model,
                trainer.optimizers[0],
                every=every,
                share=share,
                on_finding=on_finding,
                raise_on=raise_on,
                log=_All(trainer.loggers, loggers),
            )
            self.watching.step = trainer.global_step
            self.own = pl_module.__dict__.get("training_step")  # of a compiled module
            step = pl_module.training_step
            again = _again(pl_module, step) if pl_module.automatic_optimization else None
            pl_module.training_step = self.watching.around(step, again)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self._end(pl_module)

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self._end(pl_module)

        def _end(self, module: Any) -> None:
            if self.watching is not None:
                self.watching.close()
                module.__dict__.pop("training_step", None)
                module.__dict__.update({} if self.own is None else {"training_step": self.own})

    return GramianWatch()


class _All:
    """The Trainer's loggers and others as one."""

    def __init__(self, trainers: Sequence[Any], loggers: Sequence[Logger]) -> None:
        self.trainers, self.loggers = trainers, loggers

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for logger in self.trainers:
            logger.log_metrics(dict(metrics), step)
        for logger in self.loggers:
            logger.log(metrics, step)


def _again(module: Any, step: Callable) -> Callable:
    """The training step, which logs nothing."""

    def again(*args: Any, **kwargs: Any) -> Any:
        names = ("log", "log_dict")
        try:
            for name in names:
                setattr(module, name, lambda *_, **__: None)
            return step(*args, **kwargs)
        finally:
            for name in names:
                module.__dict__.pop(name, None)

    return again
