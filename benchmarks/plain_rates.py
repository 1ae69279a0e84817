"""Which rate of Muon plain networks take: the digits' tanh network at four depths, isometric, 250 steps, seed 0.

    OMP_NUM_THREADS=1 python benchmarks/plain_rates.py

The last rate of each depth is 0.1 √(L/2), which deep networks with skips and norms take.
"""

from __future__ import annotations

import torch

import gramian as gm
from gramian import tasks
from gramian.optim.scaling import usual_lr

if __name__ == "__main__":
    torch.set_num_threads(1)
    for depth in (10, 20, 50, 100):
        for lr in (0.05, 0.1, 0.2, usual_lr(0.1, depth)):
            run = gm.train(tasks.digits(depth=depth), init="isometric", optimizer="muon", lr=lr, steps=250)
            print(
                f"depth {depth}, lr {lr:.3g}: loss {run.metrics['loss']:.2g}, {run.metrics['accuracy']:.1%}", flush=True
            )
