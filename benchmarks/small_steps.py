"""What a step of our Muons costs on small networks, beside their peers: processor time of one thread, in turns.

    OMP_NUM_THREADS=1 python benchmarks/small_steps.py [ROUNDS]
    OMP_NUM_THREADS=1 python benchmarks/small_steps.py TASK …

Random gradients, the same for all, and another rate in each step, as under a schedule; the median over rounds of five
steps each. pytorch_optimizer takes part if it is installed. With names of development tasks of
`benchmarks/near_tasks.py`: the share that the optimizer's step has in a step of training.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import nn

import gramian as gm
from gramian.bench.learning_networks import Recurrent, Transformer, depthwise, mlp
from gramian.bench.race import costs
from near_tasks import TASKS
from small_tasks import Tanks, Terrain, beats

PER, WARM, RATE = 5, 3, 1e-3


def _chain(layers: Iterable[nn.Module], inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs, outputs))


def _widths(*sides: int) -> nn.Sequential:
    layers = [m for a, b in pairwise(sides[:-1]) for m in (nn.Linear(a, b), nn.ReLU())]
    return _chain(layers, *sides[-2:])


def _cnn() -> nn.Sequential:
    sides = ((3, 16), (16, 32), (32, 32))
    layers = [m for a, b in sides for m in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())]
    return _chain(layers, 128, 10)


def _signals() -> nn.Sequential:
    sides = ((1, 24), (24, 24), (24, 48))
    return _chain([m for a, b in sides for m in (nn.Conv1d(a, b, 5, padding=2), nn.ReLU())], 240, 10)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP 2×128": lambda: mlp(20, 5, 128, 3),
    "MLP 2×256": lambda: mlp(64, 10, 256, 3),
    "small CNN": _cnn,
    "1-D convolutions": _signals,
    "LSTM 64": lambda: Recurrent(64, 2, 30, linear=False),
    "MLP 14×32": lambda: _chain([m for _ in range(14) for m in (nn.Linear(32, 32), nn.Tanh())], 32, 4),
    "depthwise": depthwise,
    "transformer 64×2": lambda: Transformer(width=64, depth=2, heads=4, context=32),
    "MLP 40-100-100-10": partial(_widths, 40, 100, 100, 10),
    "MLP 20-64-32-48-24-10": partial(_widths, 20, 64, 32, 48, 24, 10),
    "terrain, MLP 2×48": Terrain,
    "beats, 1-D CNN": beats,
    "tanks, recurrence 32": Tanks,
    "LSTM 32": lambda: Recurrent(32, 1, 30, linear=False),
    "transformer 32×2": lambda: Transformer(width=32, depth=2, heads=4, context=32),
}


def _peers() -> dict[str, Callable[[nn.Module], Any]]:
    from gramian.bench.competitors import _adamw, _peer_muon, _torch_muon

    third = {"pytorch_optimizer Muon": lambda model: _peer_muon(model, RATE, RATE)}
    return {
        "AdamW, fused": lambda model: _adamw(model.parameters(), RATE),
        "torch Muon": lambda model: _torch_muon(model, RATE, RATE),
        **(third if find_spec("pytorch_optimizer") else {}),
        "gramian Muon": lambda model: gm.optim.Muon(model, lr=RATE),
        "gramian BalancedMuon": lambda model: gm.optim.BalancedMuon(model, lr=RATE),
    }


def microseconds(make: Callable[[], nn.Module], rounds: int) -> dict[str, float]:
    """The median step of each optimizer."""
    models = {name: make() for name in _peers()}
    optimizers = {name: of(models[name]) for name, of in _peers().items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    generator = torch.Generator().manual_seed(0)
    names = list(models)
    for turn in range(rounds + WARM):
        grads = [torch.randn(p.shape, generator=generator) for p in models[names[0]].parameters()]
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            for p, g in zip(models[name].parameters(), grads, strict=True):
                p.grad = g.clone()
            optimizers[name].step()
            begin = time.process_time_ns()
            for number in range(PER):
                for group in optimizers[name].param_groups:
                    group["lr"] = RATE * (1 - 0.01 * number)
                optimizers[name].step()
            if turn >= WARM:
                times[name].append((time.process_time_ns() - begin) / PER / 1000)
    return {name: median(of) for name, of in times.items()}


def shares(task: str) -> str:
    """Microseconds of a step of training without the optimizer, and of each optimizer's, with its share of the sum."""
    found = costs(TASKS[task], {name: (lambda model, _, of=of: of(model), RATE) for name, of in _peers().items()}, 0)
    around = next(iter(found.values())).around
    told = (f"{name} {1e6 * cost.own:.0f} µs, {cost.own / cost.total:.0%}" for name, cost in found.items())
    return f"{task}: batch, forward and backward {1e6 * around:.0f} µs; " + "; ".join(told)


if __name__ == "__main__":
    torch.set_num_threads(1)
    names = [name for name in sys.argv[1:] if name in TASKS]
    for name in names:
        print(shares(name), flush=True)
    for network, make in () if names else NETWORKS.items():
        found = microseconds(make, int(sys.argv[1]) if len(sys.argv) > 1 else 24)
        print(network, *(f"{name} {value:.0f} µs" for name, value in found.items()), sep=", ", flush=True)
