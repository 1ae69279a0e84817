"""Loggers: one protocol, met by adapters, by a W&B run and by an Accelerator; what is not installed is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gramian import integrations
from gramian.errors import GramianError, InputError, UnsupportedError
from gramian.integrations import Inspector, JsonlLogger, Logger, MlflowLogger, TensorBoardLogger, health_metrics
from gramian.optim import Muon, Proximal
from gramian.prox import L1


def write(logger: Logger) -> None:
    assert isinstance(logger, Logger)
    logger.log({"optimizer/skipped": 0.0, "loss": 2.0}, 1)
    logger.log({"loss": 1.0}, 2)


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.jsonl"
    write(JsonlLogger(path))
    JsonlLogger(path).log({"loss": float("nan"), "norm": float("-inf")}, 3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[1] == {"step": 2, "loss": 1.0}
    assert rows[2] == {"step": 3, "loss": "nan", "norm": "-inf"}


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(TensorBoardLogger(tmp_path))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is a logger as it is."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=str(tmp_path), project="test")
    write(run)
    assert run.step == 2
    assert run.summary["loss"] == 2.0  # W&B commits a step when the next one begins
    assert run.summary["optimizer/skipped"] == 0.0
    run.finish()


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny has no database
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    mlflow.set_experiment("gramian")
    with mlflow.start_run() as run:
        write(MlflowLogger())
        write(MlflowLogger(run.info.run_id))
    history = mlflow.tracking.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert {(m.step, m.value) for m in history} == {(1, 2.0), (2, 1.0)}


def test_an_accelerator_is_a_logger(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    accelerator = accelerate.Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path))
    accelerator.init_trackers("run")
    write(accelerator)
    accelerator.end_training()
    assert list(tmp_path.rglob("events*"))


CALLS: dict[str, tuple[Any, str]] = {
    "transformers": (lambda: integrations.attach_to_trainer(None), r'pip install "gramian\[hf\]"'),
    "lightning": (lambda: integrations.lightning_callback(), r'pip install "gramian\[lightning\]"'),
    "tensorboard": (lambda: TensorBoardLogger("runs"), r'pip install "gramian\[tensorboard\]"'),
    "mlflow": (lambda: MlflowLogger().log({}, 0), r'pip install "gramian\[mlflow\]"'),
}


@pytest.mark.parametrize("library", CALLS)
def test_a_missing_library_is_one_line(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)

    class Missing:
        def find_spec(self, name: str, *_: Any) -> None:
            if name.partition(".")[0] == library:
                raise ModuleNotFoundError(f"No module named {name!r}", name=library)

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    call, message = CALLS[library]
    with pytest.raises(UnsupportedError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, GramianError)


def test_health_is_found_inside_wrappers() -> None:
    net = nn.Linear(3, 3)
    optimizer = Proximal(Muon(net), {"weight": L1(0.1)})
    net.weight.grad = torch.full((3, 3), torch.nan)
    optimizer.step()

    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    assert health_metrics(Wrapper(Wrapper(optimizer))) == {"optimizer/skipped": 1.0, "optimizer/fallbacks": 0.0}
    assert health_metrics(torch.optim.SGD(net.parameters(), lr=0.1)) == {}


def test_an_inspector_refuses_what_is_no_number_of_steps() -> None:
    for every in (0, -1, 0.5):
        with pytest.raises(InputError, match="every must be a whole number of steps"):
            Inspector(every=every)  # type: ignore[arg-type]
