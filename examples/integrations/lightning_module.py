"""A classifier in Lightning: Muon in one line of `configure_optimizers`, health and inspections by a callback.

`pip install "gramian[lightning]"`, then `python examples/integrations/lightning_module.py`; it takes some seconds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gramian as gm
from gramian import integrations


class Spiral(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return gm.optim.Muon(self, lr=0.1)


torch.manual_seed(0)
labels = torch.arange(512) % 2
angle = torch.rand(512) * 6
data = (
    torch.stack([torch.cos(angle + torch.pi * labels), torch.sin(angle + torch.pi * labels)], -1) * angle[:, None] / 6
)
loader = DataLoader(TensorDataset(data, labels), batch_size=64, shuffle=True)

with tempfile.TemporaryDirectory() as folder:
    log = Path(folder) / "log.jsonl"
    inspector = integrations.Inspector(every=100)
    callback = integrations.lightning_callback(inspector, [integrations.JsonlLogger(log)])
    trainer = pl.Trainer(
        max_epochs=30, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Spiral()
    trainer.fit(module, loader)
    print(log.read_text().splitlines()[-1])

for step, report in inspector.reports.items():
    print(f"step {step}: {report.verdict}")
print(f"loss {module.losses[0]:.2f} → {module.losses[-1]:.2f}")
assert module.losses[-1] < module.losses[0] / 2
