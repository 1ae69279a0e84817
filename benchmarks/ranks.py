"""One run of `gm.train` on 1, 2 and 4 ranks, whole and divided (`shard`): how far apart the weights are at the end.

    python benchmarks/ranks.py

The same seed and the same global batches; ranks are processes under gloo. The number is the largest relative distance
‖W − W₁‖ / ‖W₁‖ of any parameter to that of one rank. The control is one rank whose batches have their rows in another
order, which changes the order of sums and nothing else: no number of ranks can be expected to be nearer than that. The
resumed runs begin on two ranks and go on, from half of their steps, on four. With `--slices 4` every batch is taken in
four slices, wherever they are, and the distances are to be zero, but for the control.
docs/measured/train.md quotes the table.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import gramian as gm
from gramian.checkpoint import load_tensors
from gramian.optim import OPTIMIZERS
from gramian.training import folder

X = torch.randn(512, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = (X @ torch.randn(32, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).argmax(1)
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Residual(nn.Module):
    """A head, and blocks in a list, which `shard` divides by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(32, 48), nn.Linear(48, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def task(dtype: torch.dtype, other_order: bool) -> gm.Task:
    x = X.to(dtype)

    def batches(epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for part in torch.randperm(len(x), generator=generator).split(64):
            rows = part.flip(0) if other_order else part
            yield x[rows], Y[rows]

    return gm.Task(lambda: Residual().to(dtype), gm.Objective.classification(), batches, lambda model: {})


class Half(Exception):
    """The run is to go on elsewhere."""


def stop_at(steps: int, run: gm.Run, share: float) -> None:
    if steps and run.steps > steps:
        raise Half


def on_rank(
    rank: int,
    size: int,
    store: str,
    out: str,
    steps: int,
    dtypes: list[str],
    names: list[str],
    lr: float | None,
    slices: int | None,
) -> None:
    """Every run of this number of ranks, into files in `out`."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    kinds = [("whole", False, False), ("control", False, True)] if size == 1 else []
    kinds += [("whole", False, False), ("divided", True, False)] if size > 1 else []
    kinds += [("resumed", False, False), ("resumed divided", True, False)] if size > 1 else []
    folder.LARGEST_SHARE = math.inf  # a checkpoint after each evaluation
    for name in names:
        for dtype in dtypes:
            for kind, shard, other_order in kinds:
                resumed = kind.startswith("resumed")
                place = Path(out, f"{name}-{dtype}-{kind}-{4 if resumed else size}")
                made = task(DTYPES[dtype], other_order)
                half = steps // 2 if resumed and size == 2 else 0
                with suppress(Half):
                    stop = partial(stop_at, half)
                    options = {"steps": steps, "slices": slices, "shard": shard}
                    options |= {"out": place, "resume": resumed, "on_step": stop}
                    run = gm.train(made, optimizer=name, lr=lr, **options)
                    if rank == 0 and size == 1:
                        print(
                            f"{name} {dtype} {kind}: rate {run.lr:.3g}, last loss {run.metrics['loss']:.2g}", flush=True
                        )
                if rank == 0:
                    print(place.name, file=sys.stderr, flush=True)
    if size > 1:
        dist.destroy_process_group()


def distance(out: Path, name: str, dtype: str, what: str) -> str:
    files = [out / f"{name}-{dtype}-{kind}" / "model.safetensors" for kind in ("whole-1", what)]
    one, other = (load_tensors(file)[0] for file in files)
    return f"{max(float((other[n] - w).norm() / w.norm()) for n, w in one.items()):.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--lr", type=float, help="of all optimizers; by default each one's usual rate")
    parser.add_argument("--slices", type=int, help="of every batch, shared out over the ranks")
    arguments = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    columns = ["control-1", "whole-2", "whole-4", "divided-2", "divided-4", "resumed-4", "resumed divided-4"]
    with tempfile.TemporaryDirectory() as place:
        for size in (1, 2, 4):
            command = [sys.executable, __file__, str(size), f"{place}/store{size}", place, str(arguments.steps)]
            command += [arguments.dtypes, arguments.optimizers, str(arguments.lr), str(arguments.slices)]
            running = [subprocess.Popen([*command, str(rank)]) for rank in range(size)]
            assert [process.wait() for process in running] == [0] * size
        print(f"| optimizer | | {' | '.join(columns)} |\n|-|-|{'-|' * len(columns)}")
        for name in arguments.optimizers.split(","):
            for dtype in arguments.dtypes.split(","):
                row = " | ".join(distance(Path(place), name, dtype, column) for column in columns)
                print(f"| {name} | {dtype} | {row} |")


if __name__ == "__main__":
    if len(sys.argv) == 10:
        size, store, out, steps, dtypes, names, lr, slices, rank = sys.argv[1:]
        rate = None if lr == "None" else float(lr)
        number = None if slices == "None" else int(slices)
        on_rank(int(rank), int(size), store, out, int(steps), dtypes.split(","), names.split(","), rate, number)
    else:
        main()
