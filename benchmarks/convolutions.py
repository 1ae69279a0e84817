"""Two small networks of 1-D convolutions on made-up signals: the default against AdamW, and why it may lose.

300 equal steps with warm-up and a linear decay. With new signals in every batch the held-out loss tells how fast a
network learns; with 2,048 signals that come again and again, how soon it knows them by heart. Writes
`benchmarks/results/convolutions.json`: the losses on the 2,048 signals and on 4,096 held-out ones, by rate.

    python benchmarks/convolutions.py     # about 10 minutes on one core
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.bench.machine import features
from gramian.bench.race import share_of_rate

RESULTS = Path(__file__).parent / "results" / "convolutions.json"
STEPS, BATCH, SIGNALS = 300, 128, 2048
SEEDS = (0, 1)
ADAMW_RATES, RATES = (3e-3, 1e-2, 3e-2), (0.03, 0.1, 0.32)

Make = Callable[[nn.Module], torch.optim.Optimizer]


def _templates() -> Tensor:
    """One smooth signal of 32 samples for each of ten classes."""
    coarse = torch.randn(10, 1, 16, generator=torch.Generator().manual_seed(7))
    return F.interpolate(coarse, size=32, mode="linear")[:, 0]


TEMPLATES = _templates()


def signals(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A class's signal somewhere among 64 samples, of some amplitude, with noise and a slope: `(num, 1, 64)`."""
    y = torch.randint(10, (num,), generator=generator)
    place = torch.randint(33, (num,), generator=generator)
    amplitude = 0.6 + 0.8 * torch.rand(num, 1, generator=generator)
    x = torch.zeros(num, 64).scatter_(1, place[:, None] + torch.arange(32), TEMPLATES[y] * amplitude)
    x += 0.9 * torch.randn(num, 64, generator=generator)
    return (x + torch.linspace(-1, 1, 64) * torch.randn(num, 1, generator=generator))[:, None], y


def network(head: str, width: int = 32) -> nn.Sequential:
    """Three convolutions of five taps, and a linear head on the mean over time, or on all of it."""
    layers: list[nn.Module] = []
    for inputs, stride in ((1, 1), (width, 2), (width, 2)):
        layers += [nn.Conv1d(inputs, width, 5, stride=stride, padding=2), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool1d(1)] if head == "mean" else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (1 if head == "mean" else 16), 10))


def run(head: str, make: Make, seed: int, *, new: bool) -> dict[str, float]:
    """The losses after the steps, on the 2,048 signals and on held-out ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(head)
    optimizer = make(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    fixed = torch.Generator().manual_seed(1)
    known, held_out = signals(SIGNALS, fixed), signals(2 * SIGNALS, fixed)
    generator = torch.Generator().manual_seed(1000 + seed)
    for step in range(STEPS):
        if new:
            x, y = signals(BATCH, generator)
        else:
            rows = torch.randint(SIGNALS, (BATCH,), generator=generator)
            x, y = known[0][rows], known[1][rows]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share_of_rate(step, STEPS)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        found = {"known": known, "held out": held_out}
        return {name: round(float(F.cross_entropy(model(x), y)), 4) for name, (x, y) in found.items()}


def _adamw(rate: float, decay: float = 0.0) -> Make:
    return lambda model: torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay, fused=True)


def _muon(rate: float, decay: float = 0.0) -> Make:
    return lambda model: gm.optim.Muon(model, lr=rate, weight_decay=decay)


OPTIMIZERS = {
    **{f"AdamW {rate:g}": _adamw(rate) for rate in ADAMW_RATES},
    **{f"Muon {rate:g}": _muon(rate) for rate in RATES},
}
DECAYED = {
    **{f"AdamW 0.01, decay {decay:g}": _adamw(0.01, decay) for decay in (0.3, 1.0, 3.0)},
    **{f"Muon 0.1, decay {decay:g}": _muon(0.1, decay) for decay in (0.03, 0.1, 0.3)},
}
"""With decoupled weight decay, on signals that come again alone."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for head in ("mean", "flattened"):
        for kind, field in (("new", OPTIMIZERS), ("the same", OPTIMIZERS | DECAYED)):
            for name, make in field.items():
                for seed in SEEDS:
                    losses = run(head, make, seed, new=kind == "new")
                    rows.append({"head": head, "signals": kind, "optimizer": name, "seed": seed, **losses})
                    print(*rows[-1].values(), flush=True)
    args.out.write_text(json.dumps({"machine": features(), "steps": STEPS, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
