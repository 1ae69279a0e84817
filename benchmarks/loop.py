"""What the loop of `gm.train` costs beside a loop written by hand, and for how long a checkpoint stops it.

    python benchmarks/loop.py

CPU seconds of one thread, the loops in turn, the median of the differences and their quartiles; so other processes on
the machine matter little. A second loop by hand leaves out, as `gm.train` does, what torch puts around `zero_grad` and
`step` for its profiler: beside it its own parts are seen. Evaluations are not in it. A checkpoint is written by a
thread of its own; the loop stops while the state is copied. docs/measured/train.md quotes the table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

import gramian as gm
from gramian.training import folder
from gramian.training.bare_steps import forget_gradients, step_of

# Width, layers and batch of a network; a step of the last takes about a fifth of a second.
NETWORKS = {
    "64 × 4, batch 128": (64, 4, 128),
    "256 × 4, batch 256": (256, 4, 256),
    "512 × 6, batch 256": (512, 6, 256),
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


class ByHand:
    """A plain loop with AdamW, a warm-up, a linear schedule and the mean of the loss.

    Where it is `direct`, without torch's entries for its profiler.
    """

    def __init__(
        self, width: int, depth: int, batches: list[tuple[Tensor, Tensor]], steps: int, *, direct: bool = False
    ) -> None:
        self.model, self.batches, self.steps, self.step = made(width, depth), batches, steps, 0
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.total = torch.zeros(())
        self.forget = partial(forget_gradients, self.optimizer) if direct else self.optimizer.zero_grad
        self.take = step_of(self.optimizer) if direct else self.optimizer.step

    def go(self, num: int) -> float:
        """Take some steps; returns the CPU seconds of each."""
        begin = time.process_time()
        for _ in range(num):
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-3 * min(1, (self.step + 1) / 10) * (1 - self.step / self.steps)
            x, y = self.batches[self.step % len(self.batches)]
            self.forget()
            loss = nn.functional.cross_entropy(self.model(x), y)
            loss.backward()
            self.take()
            self.total += loss.detach()
            self.step += 1
        return (time.process_time() - begin) / num


def in_turn(width: int, depth: int, batches: list[tuple[Tensor, Tensor]], num: int) -> list[tuple[float, float, float]]:
    """CPU seconds of a step by hand, by hand and direct, and in `gm.train`, by turns of `num` steps, between the
    evaluations of one run.
    """
    steps = gm.training.NUM_EVALUATIONS * num
    loops = [ByHand(width, depth, batches, steps, direct=direct) for direct in (False, True)]
    for each in loops:
        each.go(5)
    found: list[tuple[float, float, float]] = []
    begin = 0.0

    def endless(epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        return (batches[step % len(batches)] for step in range(steps))

    def on_step(run: gm.Run, share: float) -> None:
        nonlocal begin
        if run.steps % num == 0 and run.steps:  # before an evaluation
            seconds = (time.process_time() - begin) / (num - 1)
            found.append((loops[0].go(num - 1), loops[1].go(num - 1), seconds))
        elif run.steps % num == 1:
            begin = time.process_time()

    task = gm.Task(lambda: made(width, depth), gm.Objective.classification(), endless, lambda model: {})
    gm.train(task, optimizer="adamw", steps=steps, on_step=on_step)
    return found


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
    parser.add_argument("--seconds", type=float, default=0.4, help="CPU seconds of a turn; there are 20 for each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    columns = "network", "a step by hand, ms", "the loop adds, µs", "beside a direct one", "a checkpoint stops it, ms"
    print(f"| {' | '.join(columns)} |\n|{'-|' * len(columns)}")
    for name, (width, depth, batch) in NETWORKS.items():
        batches = data(width, batch)
        once = ByHand(width, depth, batches, 10).go(5)
        turns = in_turn(width, depth, batches, max(4, min(2000, round(arguments.seconds / once))))
        plain = statistics.median(hand for hand, _, _ in turns)
        told = [
            added([train - hand for hand, _, train in turns], plain),
            added([train - direct for _, direct, train in turns], plain),
        ]
        print(f"| {name} | {1e3 * plain:.3g} | {' | '.join(told)} | {1e3 * stall(width, depth):.2g} |", flush=True)


def added(seconds: list[float], plain: float) -> str:
    """The median and the quartiles in µs, and the share of a step."""
    low, middle, high = (1e6 * sorted(seconds)[len(seconds) * k // 4] for k in (1, 2, 3))
    return f"{middle:.0f} ({low:.0f} to {high:.0f}): {1e-4 * middle / plain:+.1f} %"


if __name__ == "__main__":
    main()
