"""Lightning: inspections and the optimizer's health in its loggers. `configure_optimizers` needs no help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gramian.integrations.extras import load
from gramian.integrations.loggers import Logger
from gramian.integrations.metrics import Inspector, health_metrics

__all__ = ["lightning_callback"]


def lightning_callback(inspector: Inspector | None = None, loggers: Sequence[Logger] = ()) -> Any:
    """A callback for Lightning's Trainer: the optimizers' health in its loggers, and inspections.

    Every `log_every_n_steps` steps the Trainer's loggers get `optimizer/skipped` and `optimizer/fallbacks`, with the
    optimizer's number in front where there are several. The module is inspected at the start, every `inspector.every`
    steps, and at the end.

    The optimizer itself is one line, `def configure_optimizers(self): return gm.optim.Muon(self, lr=0.02)`.

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
