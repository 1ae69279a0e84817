"""What the loop of `gm.train` costs beside a loop written by hand, and for how long a checkpoint stops it.

    python benchmarks/loop.py

CPU seconds of one thread, the two loops in turn, the median of the ratios; so other processes on the machine matter
little. A checkpoint is written by a thread of its own; the loop stops while the state is copied. docs/train.md quotes
the table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import gramian as gm
from gramian.training import folder

# Width, layers and batch of a network; a step of the last takes about a fifth of a second.
NETWORKS = {
    "64 × 4, batch 128": (64, 4, 128),
    "256 × 4, batch 256": (256, 4, 256),
    "1024 × 8, batch 512": (1024, 8, 512),
}


def made(width: int, depth: int) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def data(width: int, batch: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(batch, width, generator=generator), torch.randint(10, (batch,), generator=generator))
        for _ in range(8)
    ]


def by_hand(width: int, depth: int, batches: list[tuple[Tensor, Tensor]], steps: int) -> float:
    """CPU seconds of a plain loop with AdamW, a warm-up, a linear schedule and the mean of the loss."""
    model = made(width, depth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    total = torch.zeros(())
    begin = time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 10) * (1 - step / steps)
        x, y = batches[step % len(batches)]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return time.process_time() - begin


def by_train(width: int, depth: int, batches: list[tuple[Tensor, Tensor]], steps: int) -> float:
    """CPU seconds of the same in `gm.train`, from its first step to its last."""

    def endless(epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        return (batches[step % len(batches)] for step in range(steps))

    times: list[float] = []

    def on_step(run: gm.Run, share: float) -> None:
        if run.steps in (0, steps):
            times.append(time.process_time())

    task = gm.Task(lambda: made(width, depth), gm.Objective.classification(), endless, lambda model: {})
    gm.train(task, optimizer="adamw", steps=steps, on_step=on_step)
    return times[-1] - times[0]


def stall(width: int, depth: int) -> float:
    """CPU seconds for which a checkpoint of the network and AdamW's state stops the loop's thread."""
    model = made(width, depth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    model(torch.randn(4, width)).sum().backward()
    optimizer.step()
    with tempfile.TemporaryDirectory() as place:
        kept = folder.Folder(folder.Path(place, "run"), {"task": "t"})
        seconds = []
        for _ in range(3):
            begin = time.thread_time()
            kept.keep({"history": [], "model": model.state_dict(), "optimizer": optimizer.state_dict()})
            seconds.append(time.thread_time() - begin)
            kept.wait()
        kept.close()
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU seconds of a loop in a round")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | a step, ms | the loop's overhead | a checkpoint stops it, ms |\n|-|-|-|-|")
    for name, (width, depth, batch) in NETWORKS.items():
        batches = data(width, batch)
        once = by_hand(width, depth, batches, 5) / 5
        steps = max(10, min(2000, round(arguments.seconds / once)))
        ratios, plain = [], []
        for _ in range(arguments.rounds):
            plain.append(by_hand(width, depth, batches, steps) / steps)
            ratios.append(by_train(width, depth, batches, steps) / steps / plain[-1])
        step, overhead = statistics.median(plain), statistics.median(ratios) - 1
        print(f"| {name} | {1e3 * step:.3g} | {overhead:+.1%} | {1e3 * stall(width, depth):.2g} |", flush=True)


if __name__ == "__main__":
    main()
