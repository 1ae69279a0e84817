"""A small language model in Hugging Face's Trainer: Muon by role, its health in the logs, inspections on the way.

`pip install "gramian[hf]"`, then `python examples/integrations/trainer.py`; it takes some seconds on a CPU.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from gramian import integrations

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
)
first = torch.randint(32, (128, 1))
counting = (first + torch.arange(16)) % 32  # each token is the one before, plus one
data = [{"input_ids": row, "labels": row} for row in counting]

with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        folder, max_steps=60, per_device_train_batch_size=16, lr_scheduler_type="cosine", warmup_steps=5,
        logging_steps=20, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    optimizer = integrations.trainer_optimizer("muon", lr=0.2)
    trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=optimizer)
    inspector = integrations.Inspector(every=30)
    integrations.attach_to_trainer(trainer, inspector)
    trainer.train()

for step, report in inspector.reports.items():
    print(f"step {step}: {report.verdict}")
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}")
assert losses[-1] < losses[0] / 2
