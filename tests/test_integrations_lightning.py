"""Lightning: `configure_optimizers` in one line, resuming to the bit, health and inspections in its loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cases import seeded
from gramian import integrations
from gramian.errors import FindingError, UnsupportedError
from gramian.integrations import Inspector
from gramian.optim import Muon

pl = pytest.importorskip("lightning.pytorch")

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*GPU available"),
]


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
            self.head = nn.Linear(16, 3)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.body(x)), y)

    def configure_optimizers(self) -> Any:
        optimizer = Muon(self, lr=0.02)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def batches() -> DataLoader:
    x = torch.randn(48, 6, generator=seeded(0))
    return DataLoader(TensorDataset(x, torch.randint(3, (48,), generator=seeded(1))), batch_size=8)


class Memory(pl.loggers.logger.DummyLogger):
    """Keeps what it is told, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.setdefault(step or 0, {}).update(metrics)


def fit(folder: Path, epochs: int, resume: Path | None = None, **options: Any) -> tuple[Classifier, Any]:
    module = Classifier()
    run = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=folder, accumulate_grad_batches=2, gradient_clip_val=0.5,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    run.fit(module, batches(), ckpt_path=resume)
    return module, run


def test_a_run_keeps_roles_logs_health_and_resumes_to_the_bit(tmp_path: Path) -> None:
    logger, inspector = Memory(), Inspector(every=4)
    callback = integrations.lightning_callback(inspector)
    whole, run = fit(tmp_path, 2, logger=logger, callbacks=[callback], log_every_n_steps=2, enable_checkpointing=False)
    assert run.global_step == 6
    assert list(inspector.reports) == [0, 4, 6]
    assert set(logger.rows) == {0, 2, 4, 6}
    assert logger.rows[4]["optimizer/skipped"] == 0.0
    assert "inspect/errors" in logger.rows[4]
    (optimizer,) = run.optimizers
    assert {row["name"]: row["direction"] for row in optimizer.explain() if "weight" in row["name"]} == {
        "body.0.weight": "matrix", "body.2.weight": "matrix", "head.weight": "adamw",
    }  # fmt: skip

    plain, first = fit(tmp_path, 1, logger=False, enable_checkpointing=False)
    first.save_checkpoint(tmp_path / "one.ckpt")
    again, _ = fit(tmp_path, 2, tmp_path / "one.ckpt", logger=False, enable_checkpointing=False)
    for p, q, r in zip(whole.parameters(), again.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, r)


def test_half_precision_and_a_scheduler_of_lightning(tmp_path: Path) -> None:
    module, run = fit(tmp_path, 1, logger=False, enable_checkpointing=False, precision="bf16-mixed")
    assert all(p.isfinite().all() for p in module.parameters())
    rates = [group["lr"] for group in run.optimizers[0].param_groups]
    assert rates[0] == pytest.approx(0.02)


class Broken(Classifier):
    """Takes the root of a negative number in the third step."""

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        x, y = batch
        self.log("mean", x.mean())
        out = self.body(x)
        return nn.functional.cross_entropy(self.head(out if number < 2 else self.root(out)), y)

    def __init__(self) -> None:
        super().__init__()
        self.root = Root()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Root(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sqrt()


class Several(Broken):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.body.parameters(), 0.1), torch.optim.SGD(self.head.parameters(), 0.1)]

    def training_step(self, batch: Any, number: int) -> None:
        pass

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_a_watched_run_logs_its_numbers_and_is_the_same_to_the_bit(tmp_path: Path) -> None:
    plain, _ = fit(tmp_path, 2, logger=False, enable_checkpointing=False)
    logger, callback = Memory(), integrations.lightning_watch(every=3, share=None)
    module, run = fit(tmp_path, 2, logger=logger, callbacks=[callback], enable_checkpointing=False)
    assert run.global_step == callback.watching.step == 6
    assert callback.watching.looks == 3
    assert "modules" not in callback.watching.not_looked_at
    assert callback.watching.findings == []
    assert [step for step, row in logger.rows.items() if row.get("watch/change", 0) > 0 < row["watch/gradient"]] == [
        1, 3, 6,
    ]  # fmt: skip
    assert "training_step" not in module.__dict__
    assert not torch.overrides._len_torch_function_stack()
    for p, q in zip(plain.parameters(), module.parameters(), strict=True):
        assert torch.equal(p, q)


def trained(module: Any, callback: Any, folder: Path) -> None:
    pl.Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=folder, logger=False, callbacks=[callback],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, batches())  # fmt: skip


def test_the_operation_that_makes_a_nan_is_named_at_its_step(tmp_path: Path) -> None:
    callback = integrations.lightning_watch(raise_on="error")
    module = Broken()
    with pytest.raises(FindingError, match="sqrt") as caught:
        trained(module, callback, tmp_path)
    assert (caught.value.step, caught.value.finding.where) == (3, "root")
    assert all(p.isfinite().all() for p in module.parameters())
    assert "training_step" not in module.__dict__
    assert "log" not in module.__dict__


def test_several_optimizers_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="Several has 2 optimizers"):
        trained(Several(), integrations.lightning_watch(), tmp_path)
