"""What `gm.watch` costs: processor time of a training loop with and without it, step by step in turns.

    python benchmarks/watch.py

One thread, CPU seconds. First the medians: of a step, of what the check of every step adds, and of what a look adds.
Then whole runs with the default arguments, every 50th step at most and 2 % of the time, the first look included; the
median of five. Steps with and without are those of one network.
Goal: at most 2 %.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.bench.machine import features

RESULTS = Path(__file__).parent / "results" / "watch.json"
CLASSES = 10
TURNS, CHECKS, STEPS, BLOCK, RUNS = 60, 400, 300, 30, 5


def perceptron() -> nn.Module:
    return nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(256, 256), nn.ReLU())], nn.Linear(256, CLASSES))


def convolutional() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, CLASSES))


class Transformer(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, norm_first=True, dropout=0.0)
        self.embedding, self.head = nn.Embedding(64, width), nn.Linear(width, CLASSES)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(x)).mean(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "perceptron, 4 layers of 256, batch 128": (perceptron, lambda: torch.randn(128, 256)),
    "convolutional, 3 layers, 32 px, batch 32": (convolutional, lambda: torch.randn(32, 3, 32, 32)),
    "transformer, d 64, 4 layers, 32 tokens, batch 16": (Transformer, lambda: torch.randint(64, (16, 32))),
    "transformer, d 128, 4 layers, 64 tokens, batch 32": (
        lambda: Transformer(128),
        lambda: torch.randint(64, (32, 64)),
    ),
}


class Loop:
    """A training loop on one batch, of which single steps are timed, watched or with the hooks taken away.

    Both are steps of the same tensors: two copies of a small network differ by several percent, by where they lie in
    memory.
    """

    def __init__(self, make: Callable[[], nn.Module], x: Tensor, y: Tensor, **watched: Any) -> None:
        torch.manual_seed(0)
        self.model, self.x, self.y = make(), x, y
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3)
        self.step()  # what a process does once
        places = [(self.model, name) for name in vars(self.model) if name.startswith("_forward_")]
        places += [(self.optimizer, name) for name in vars(self.optimizer) if name.startswith("_optimizer_step_")]
        self.tables = [(owner, name, OrderedDict()) for owner, name in places]
        self.watching = gm.watch(self.model, self.optimizer, **watched)

    def step(self) -> float:
        start = time.process_time()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()
        return time.process_time() - start

    def unwatched(self) -> float:
        """A step without the hooks of the model and of the optimizer, which are all that a watch has."""
        kept = [getattr(owner, name) for owner, name, _ in self.tables]
        for owner, name, empty in self.tables:
            setattr(owner, name, empty)
        taken = self.step()
        for (owner, name, _), hooks in zip(self.tables, kept, strict=True):
            setattr(owner, name, hooks)
        return taken


def added(make: Callable[[], nn.Module], x: Tensor, y: Tensor, num: int, **watched: Any) -> tuple[float, float, float]:
    """Medians over steps in turns: of a step, of what the watch adds to it, and what its first look adds."""
    loop = Loop(make, x, y, **watched)
    first = loop.step()
    times = []
    for i in range(num):  # which is first changes, since what runs before leaves other things in the caches
        one, other = (loop.step, loop.unwatched) if i % 2 else (loop.unwatched, loop.step)
        taken = one(), other()
        times.append(taken[:: 1 if i % 2 else -1])
    plain = median(t[1] for t in times)
    return plain, median(t[0] - t[1] for t in times), first - plain


def parts(make: Callable[[], nn.Module], x: Tensor, y: Tensor) -> dict[str, float]:
    """Milliseconds of a step, and what the check of every step and a look add, in steps."""
    plain, check, _ = added(make, x, y, CHECKS, every=10**9)
    step, look, first = added(make, x, y, TURNS, every=1, share=None)
    return {"step_ms": 1e3 * plain, "check": check / plain, "look": look / step, "first_look": first / step}


def run(make: Callable[[], nn.Module], x: Tensor, y: Tensor) -> dict[str, float]:
    """The share of the time that a watch with the default arguments took, of a whole run.

    Blocks of steps are unwatched in between: single ones would count as time of the loop, of which looks take a share.
    """
    loop = Loop(make, x, y)
    watched = plain = 0.0
    for _ in range(STEPS // BLOCK):
        watched += sum(loop.step() for _ in range(BLOCK))
        plain += sum(loop.unwatched() for _ in range(BLOCK))
    return {"share": watched / plain - 1, "looks": loop.watching.looks, "interval": loop.watching.interval}


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name, (make, inputs) in NETWORKS.items():
        x = inputs()
        y = torch.randint(CLASSES, (len(x),))
        row: dict[str, Any] = {"network": name, **parts(make, x, y)}
        runs = sorted((run(make, x, y) for _ in range(RUNS)), key=lambda one: one["share"])
        row |= {**runs[RUNS // 2], "shares": [one["share"] for one in runs]}
        rows.append(row)
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    RESULTS.write_text(json.dumps({"machine": features(), "steps": STEPS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
