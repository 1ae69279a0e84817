"""What `gm.watch` costs: processor time of a training loop with and without it, step by step in turns.

    python benchmarks/watch.py

One thread, CPU seconds. First the medians: of a step, of what the check of every step adds, and of what a look adds.
Then whole runs with the default arguments, every 50th step at most and 2 % of the time, the first look included.
Goal: at most 2 %.
"""

from __future__ import annotations

import json
import time
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
TURNS, STEPS, RUNS = 60, 300, 1


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
    """A training loop on one batch, of which single steps are timed."""

    def __init__(self, make: Callable[[], nn.Module], x: Tensor, y: Tensor, **watched: Any) -> None:
        torch.manual_seed(0)
        self.model, self.x, self.y = make(), x, y
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3)
        self.watching = gm.watch(self.model, self.optimizer, **watched) if watched else None

    def step(self) -> float:
        start = time.process_time()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()
        return time.process_time() - start


def parts(make: Callable[[], nn.Module], x: Tensor, y: Tensor) -> dict[str, float]:
    """Medians: milliseconds of a step, and what the check of every step and a look add, in steps."""
    loops = [Loop(make, x, y), Loop(make, x, y, every=10**9), Loop(make, x, y, every=1, share=None)]
    first = [loop.step() for loop in loops]
    times = []
    for i in range(TURNS):  # which is first changes, since what runs before leaves other things in the caches
        order = [(i + k) % len(loops) for k in range(len(loops))][:: 1 if i % 2 else -1]
        taken = {k: loops[k].step() for k in order}
        times.append([taken[k] for k in range(len(loops))])
    plain = median(t[0] for t in times)
    check = median(t[1] - t[0] for t in times) / plain
    look = median(t[2] - t[1] for t in times) / plain
    return {"step_ms": 1e3 * plain, "check": check, "look": look, "first_look": (first[2] - first[0]) / plain}


def in_turns(plain: Loop, watched: Loop, first: int) -> tuple[float, float]:
    """What a step of each takes; which is first changes, since the second finds other things in the caches."""
    if first:
        taken = watched.step()
        return plain.step(), taken
    return plain.step(), watched.step()


def run(make: Callable[[], nn.Module], x: Tensor, y: Tensor) -> dict[str, float]:
    """The share of the time that a watch with the default arguments took, of a whole run."""
    plain, watched = Loop(make, x, y), Loop(make, x, y, every=50)
    plain.step()  # what a process does once
    times = [in_turns(plain, watched, first=i % 2) for i in range(STEPS)]
    assert watched.watching is not None
    share = sum(t[1] for t in times) / sum(t[0] for t in times) - 1
    return {"share": share, "looks": watched.watching.looks, "interval": watched.watching.interval}


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
