"""What an optimizer and capture cost in compute, bytes and memory, on one rank and two, beside docs/scale.md's model.

    python benchmarks/scale.py

One thread a rank, gloo, FSDP2. Memory is that of the tensors in the optimizer's state; bytes are what a rank gives to
the exchanges of a step; compute is in CPU seconds, divided by that of one product of the matrix with a square one of
its smaller side.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import gramian as gm
from gramian.optim import OPTIMIZERS

COUNT = 4  # matrices of each shape
SHAPES = ((384, 384), (192, 768))
STEPS = 11  # of which the first is left out; a multiple of the ten after which bases and roots are computed, and one


class Net(nn.Module):
    """Matrices of one shape, applied to a vector each."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(shape[1], shape[0], bias=False) for _ in range(COUNT))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: list[torch.Tensor] = [layer(x) for layer in self.layers]
        return torch.stack(outputs)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in the optimizer's state on this rank."""
    seen: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            value = getattr(value, "_local_tensor", value)
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for part in value.values():
                add(part)
        elif isinstance(value, (list, tuple)):
            for part in value:
                add(part)

    add({id(p): state for p, state in optimizer.state.items()})
    return sum(seen.values())


def measured(name: str, shape: tuple[int, int]) -> tuple[float, float, float]:
    """State bytes, bytes given to exchanges in a step, and CPU seconds of a step, on this rank."""
    net = Net(shape)
    if dist.is_initialized():
        from torch.distributed.fsdp import fully_shard

        for layer in net.layers:
            fully_shard(layer)
        fully_shard(net)
    optimizer = OPTIMIZERS[name].make(net, 1e-3)
    sent = [0]
    exchange = dist.all_to_all_single

    def counting(output: torch.Tensor, given: torch.Tensor, *rest: Any, **options: Any) -> Any:
        sent[0] += given.numel() * given.element_size()
        return exchange(output, given, *rest, **options)

    dist.all_to_all_single = counting  # type: ignore[assignment]
    seconds = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        net(torch.randn(64, shape[1], generator=generator)).square().mean().backward()
        begin = time.process_time()
        optimizer.step()
        seconds.append(time.process_time() - begin)
    dist.all_to_all_single = exchange  # type: ignore[assignment]
    return state_bytes(optimizer), sent[0] / STEPS, statistics.fmean(seconds[1:])


def product(shape: tuple[int, int]) -> float:
    """CPU seconds of a product of a matrix with a square one of its smaller side."""
    w, small = torch.randn(*shape), torch.randn(min(shape), min(shape))
    times = []
    for _ in range(20):
        begin = time.process_time()
        small @ (w if shape[0] <= shape[1] else w.T)
        times.append(time.process_time() - begin)
    return statistics.median(times)


def on_rank(rank: int, size: int, store: str) -> None:
    """What one process does; it prints its figures as JSON."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    found = [[measured(name, shape) for shape in SHAPES] for name in OPTIMIZERS]
    print(json.dumps({"found": found, "products": [product(shape) for shape in SHAPES] if size == 1 else []}))
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def capture_bytes() -> tuple[int, int]:
    """Bytes of a capture's second moments, measured and by the model: 8 (m² + n²) for each matrix."""
    net = nn.Sequential(nn.Linear(96, 160, bias=False), nn.Tanh(), nn.Linear(160, 32, bias=False))
    batches = [(torch.randn(64, 96), torch.randint(32, (64,)))]
    stats = gm.capture(net, batches, gm.Objective.classification())
    grams = [gram for name in ("0.weight", "2.weight") for gram in (stats[name].A, stats[name].G)]
    return sum(gram.total.numel() * gram.total.element_size() for gram in grams), 8 * (96**2 + 160**2 + 160**2 + 32**2)


def main() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    ranks: dict[int, list[Any]] = {}
    for size in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, str(size), f"{folder}/store"]
            running = [subprocess.Popen([*command, str(r)], stdout=subprocess.PIPE, text=True) for r in range(size)]
            ranks[size] = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    print("| optimizer | shape | state, bytes an entry | on 2 ranks | sent a step, bytes an entry | products a step |")
    print("|-|-|-|-|-|-|")
    for i, name in enumerate(OPTIMIZERS):
        for j, shape in enumerate(SHAPES):
            entries = COUNT * shape[0] * shape[1]
            state, _, seconds = ranks[1][0]["found"][i][j]
            both = [rank["found"][i][j] for rank in ranks[2]]
            sharded = " and ".join(f"{part[0] / entries:.2f}" for part in both)
            sent = sum(part[1] for part in both) / 2
            work = seconds / COUNT / ranks[1][0]["products"][j]
            print(
                f"| {name} | {shape[0]} × {shape[1]} | {state / entries:.2f} | {sharded} | {sent / entries:.2f} | "
                f"{work:.1f} |"
            )
    print("\ncapture, bytes measured and by 8 (m² + n²): {:,} and {:,}".format(*capture_bytes()))


if __name__ == "__main__":
    if len(sys.argv) == 4:
        on_rank(int(sys.argv[3]), int(sys.argv[1]), sys.argv[2])
    else:
        main()
