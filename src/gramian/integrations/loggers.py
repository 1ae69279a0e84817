"""Where metrics go: one protocol, which a W&B run and an `accelerate.Accelerator` meet as they are, and adapters."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from gramian.integrations.extras import load

__all__ = ["JsonlLogger", "Logger", "MlflowLogger", "TensorBoardLogger"]


@runtime_checkable
class Logger(Protocol):
    """Whatever has `log(metrics, step)`: an adapter of this module, a W&B run, an `accelerate.Accelerator`.

    >>> isinstance(JsonlLogger("metrics.jsonl"), Logger)
    True
    """

    def log(self, metrics: Mapping[str, float], step: int) -> Any:
        """Notes some numbers, by name, that belong to a step.

        Args:
            metrics: by name.
            step: of the optimizer, from 1; 0 before the first.
        """


class JsonlLogger:
    """Appends one line of JSON for each call to a file.

    A number that is not finite is written as text, `"nan"`, since JSON has none.

    Args:
        path: of the file; its folder is made.

    Raises: nothing of its own.
    Cost: one write.
    Source: JSON Lines.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/metrics.jsonl"
    >>> JsonlLogger(path).log({"loss": 0.5}, step=3)
    >>> open(path).read()
    '{"step": 3, "loss": 0.5}\\n'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Appends a line.

        Args:
            metrics: by name.
            step: of the optimizer.
        """
        finite = {key: value if abs(value) < float("inf") else str(value) for key, value in metrics.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")


class TensorBoardLogger:
    """Writes scalars for TensorBoard.

    Args:
        writer: a folder, or a `torch.utils.tensorboard.SummaryWriter`.

    Raises:
        UnsupportedError: for a folder, where tensorboard is not installed.

    Cost: one write.
    Source: `torch.utils.tensorboard`.

    >>> class Writer:
    ...     def add_scalar(self, key, value, step):
    ...         print(key, value, step)
    ...     def flush(self):
    ...         pass
    >>> TensorBoardLogger(Writer()).log({"loss": 0.5}, step=3)
    loss 0.5 3
    """

    def __init__(self, writer: Any) -> None:
        if isinstance(writer, (str, os.PathLike)):
            load("tensorboard", "tensorboard")
            writer = load("torch.utils.tensorboard", "tensorboard").SummaryWriter(os.fspath(writer))
        self.writer = writer

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Writes each number as a scalar.

        Args:
            metrics: by name.
            step: of the optimizer.
        """
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()


class MlflowLogger:
    """Logs metrics to MLflow.

    Args:
        run_id: of a run; `None` for the active one.

    Raises:
        UnsupportedError: at the first call, where mlflow is not installed.

    Cost: one request.
    Source: `mlflow.log_metrics`.

    >>> MlflowLogger(run_id="0f3e").run_id
    '0f3e'
    """

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs the numbers of this step.

        Args:
            metrics: by name.
            step: of the optimizer.
        """
        load("mlflow", "mlflow").log_metrics(dict(metrics), step=step, run_id=self.run_id)
