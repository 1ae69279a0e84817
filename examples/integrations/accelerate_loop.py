"""A loop of one's own under accelerate, with gradient accumulation: build the optimizer from the model, then prepare.

`pip install "gramian[hf]"`, then `python examples/integrations/accelerate_loop.py`, or on several processes
`accelerate launch --num_processes 2 --cpu examples/integrations/accelerate_loop.py`.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gramian as gm
from gramian import integrations

torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
x = torch.randn(512, 8)
loader = DataLoader(TensorDataset(x, (x[:, :2].prod(1, keepdim=True)).sign()), batch_size=32, shuffle=True)

optimizer = gm.optim.Muon(net, lr=0.1)  # before prepare: under FSDP2, it follows the parameters
net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
losses = []
for epoch in range(20):
    for inputs, targets in loader:
        with accelerator.accumulate(net):
            loss = nn.functional.mse_loss(net(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    losses.append(float(loss.detach()))
    metrics = {"loss": losses[-1], **integrations.health_metrics(optimizer)}
    accelerator.log(metrics, step=epoch)  # an Accelerator is a `Logger` as it is

accelerator.print(gm.inspect(accelerator.unwrap_model(net)).verdict)
accelerator.print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}; {metrics}")
assert losses[-1] < losses[0] / 2
