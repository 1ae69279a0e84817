"""What `gm.inspect` costs beside a training step: processor time as a number of steps, and memory.

    python benchmarks/inspect_cost.py

For each network a process of its own takes training steps, and others also inspect: without an optimizer, with one, and
with a head of zeros, which starts the experiment with zeros. Time is that of the processor, one thread, the median of
several steps and the smallest of three inspections; memory is the largest resident size. Goal: at most 10 steps, and at
most 20 % more memory.
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm

RESULTS = Path(__file__).parent / "results" / "inspect_cost.json"
CLASSES, STEPS, REPEATS = 10, 7, 3


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        skips = inputs == outputs and stride == 1
        self.skip = nn.Identity() if skips else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.branch(x))


def residual() -> nn.Module:
    """A quarter of ResNet-50's width: 1.5 million parameters."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 16, 7, 2, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 16
    for width, count, stride in ((16, 3, 1), (32, 4, 2), (64, 6, 2), (128, 3, 2)):
        for i in range(count):
            layers.append(Bottleneck(inputs, width, stride if i == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


def perceptron() -> nn.Module:
    hidden = [layer for _ in range(8) for layer in (nn.Linear(256, 256), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(256, CLASSES))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 128)
        self.positions = nn.Parameter(0.1 * torch.randn(64, 128))
        layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, norm_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(x) + self.positions).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(32, 128, 2, batch_first=True), nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "bottleneck residual, 64 px, batch 32": (residual, lambda: torch.randn(32, 3, 64, 64)),
    "transformer, d 128, 4 layers, 64 tokens, batch 32": (Transformer, lambda: torch.randint(64, (32, 64))),
    "LSTM, 2 layers of 128, 32 steps, batch 32": (Recurrent, lambda: torch.randn(32, 32, 32)),
    "perceptron, 8 layers of 256, batch 128": (perceptron, lambda: torch.randn(128, 256)),
}


def measure(name: str, what: str) -> dict[str, float]:
    """Train a few steps, and inspect where `what` says so; in this process, whose memory is the answer's."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make, inputs = NETWORKS[name]
    model = make()
    batches = []
    for _ in range(8):
        x = inputs()
        batches.append((x, torch.randint(CLASSES, (len(x),))))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def step(batch: tuple[Tensor, Tensor]) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    found = {"step": median(seconds(lambda b=b: step(b)) for b in batches[:STEPS])}
    if what == "zeros":  # a head of zeros, and so gradients of zero before it, of which is found out why
        next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)).weight.data.zero_()
    if what != "steps":
        given: dict[str, Any] = {"optimizer": optimizer} if what == "optimizer" else {}
        times = [
            seconds(lambda: gm.inspect(model, batches, gm.Objective.classification(), **given)) for _ in range(REPEATS)
        ]
        found["inspect"] = min(times)
    return found | {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    rows = []
    for name in NETWORKS:
        found = {}
        for what in ("steps", "inspect", "optimizer", "zeros"):
            command = [sys.executable, "-W", "ignore", __file__, name, what]
            found[what] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        step = min(one["step"] for one in found.values())
        row = {"network": name, "step_ms": 1e3 * step}
        for what in ("inspect", "optimizer", "zeros"):
            row[f"{what}_steps"] = found[what]["inspect"] / step
            row[f"{what}_memory"] = found[what]["mib"] / found["steps"]["mib"]
        rows.append(row)
        print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else str(v) for k, v in row.items()), flush=True)
        content = {"processor": processor(), "torch": torch.__version__, "rows": rows}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")  # after each, since it takes minutes


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        main()
