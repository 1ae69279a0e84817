"""What `gm.watch` costs: processor time of a training loop with and without it, taken in turns.

    python benchmarks/watch.py

100 steps each, one thread, every 50th step looked at, the first too; medians over rounds. Goal: at most 2 %.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.bench.machine import features

RESULTS = Path(__file__).parent / "results" / "watch.json"
STEPS, ROUNDS, CLASSES = 100, 7, 10


def perceptron() -> nn.Module:
    return nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(256, 256), nn.ReLU())], nn.Linear(256, CLASSES))


def convolutional() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, CLASSES))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, norm_first=True, dropout=0.0)
        self.embedding, self.head = nn.Embedding(64, 64), nn.Linear(64, CLASSES)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(x)).mean(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "perceptron, 4 layers of 256, batch 128": (perceptron, lambda: torch.randn(128, 256)),
    "convolutional, 3 layers, 32 px, batch 32": (convolutional, lambda: torch.randn(32, 3, 32, 32)),
    "transformer, d 64, 4 layers, 32 tokens, batch 16": (Transformer, lambda: torch.randint(64, (16, 32))),
}


def loop(make: Callable[[], nn.Module], x: Tensor, y: Tensor, watched: bool) -> float:
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    watching = gm.watch(model, optimizer, every=50) if watched else None
    start = time.process_time()
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    taken = time.process_time() - start
    if watching is not None:
        watching.close()
    return taken


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name, (make, inputs) in NETWORKS.items():
        x = inputs()
        y = torch.randint(CLASSES, (len(x),))
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(ROUNDS):
            for watched in (False, True):
                times[watched].append(loop(make, x, y, watched))
        share = median(w / b for w, b in zip(times[True], times[False], strict=True)) - 1
        rows.append({"network": name, "step_ms": 1e3 * median(times[False]) / STEPS, "share": share})
        print(f"{name}: {rows[-1]['step_ms']:.2f} ms a step, watched {share:+.1%}", flush=True)
    RESULTS.write_text(json.dumps({"machine": features(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
