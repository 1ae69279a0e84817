"""How far the clock of `gramian compress` can be trusted on this machine as it is, busy or not.

    python benchmarks/clock.py

A model beside itself is raced 40 times at two batches: one in twenty may be told to differ. Then a model beside one of
half the multiplications, by the ratio of plain medians, as it was measured before, and by the clock.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor, nn

from gramian.compression.choosing.clock import race

RACES = 40


def call(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


def main() -> None:
    dense = nn.Sequential(nn.Linear(384, 384), nn.ReLU(), nn.Linear(384, 384)).eval()
    layers = [nn.Linear(384, 96), nn.Linear(96, 384), nn.ReLU(), nn.Linear(384, 96), nn.Linear(96, 384)]
    small = nn.Sequential(*layers).eval()
    for num in (1, 32):
        x = torch.randn(num, 384)
        races = [race({"a": dense, "b": dense}, call, x, 0.25) for _ in range(RACES)]
        ratios = [one.ratio("b", "a") for one in races]
        waited = statistics.median(one.waited for one in races)
        print(f"batch {num}: passes waited {waited:.0%} of the time", flush=True)
        print(f"  itself: {sum(r.seen for r in ratios)} of {RACES} told to differ", flush=True)
        races = [race({"a": dense, "b": small}, call, x, 0.25) for _ in range(RACES // 4)]
        plain = sorted(statistics.median(r.wall["a"]) / statistics.median(r.wall["b"]) for r in races)
        told = sorted(r.ratio("b", "a").median for r in races)
        print(f"  half the work, plain medians {plain[0]:.2f} to {plain[-1]:.2f}, told {told[0]:.2f} to {told[-1]:.2f}")


if __name__ == "__main__":
    main()
