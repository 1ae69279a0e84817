"""gramian in the loops of Hugging Face's Trainer, Lightning and accelerate, and its figures in the loggers people have.

`trainer_optimizer`, `attach_to_trainer` and `watch_trainer` are for a Trainer, `lightning_callback` and
`lightning_watch` for Lightning; accelerate needs nothing but `accelerator.prepare`. In a loop of one's own,
`health_metrics` and `Inspector` give what the callbacks log. None of these libraries is imported before the function
that uses it is called.
"""

from gramian.integrations.huggingface import attach_to_trainer, trainer_optimizer, watch_trainer
from gramian.integrations.lightning import lightning_callback, lightning_watch
from gramian.integrations.loggers import JsonlLogger, Logger, MlflowLogger, TensorBoardLogger
from gramian.integrations.metrics import Inspector, health_metrics
from gramian.integrations.runs import RunBoard

__all__ = [
    "Inspector",
    "JsonlLogger",
    "Logger",
    "MlflowLogger",
    "RunBoard",
    "TensorBoardLogger",
    "attach_to_trainer",
    "health_metrics",
    "lightning_callback",
    "lightning_watch",
    "trainer_optimizer",
    "watch_trainer",
]
