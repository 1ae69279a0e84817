"""`Muon` at its usual rate in longer runs, fading and not, beside AdamW: held-out cross-entropy.

    OMP_NUM_THREADS=1 python benchmarks/fading.py cnn|characters [TEXT]

A convolutional network with batch norms on scikit-learn's digits (1,500 steps of 32), and a transformer of four blocks,
64 wide, on the characters of a text file (600 and 2,500 steps of 16 × 64). Each with a linear decay to zero and at a
constant rate.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm

SEEDS, LENGTH = (0, 1), 64
Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]


def steady(model: nn.Module) -> torch.optim.Optimizer:
    """`Muon` at its usual rate, which does not fade."""
    optimizer = gm.optim.Muon(model)
    for group in optimizer.param_groups:
        group["fades"] = False
    return optimizer


MAKERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW 3e-3": lambda model: torch.optim.AdamW(model.parameters(), 3e-3),
    "AdamW 1e-3": lambda model: torch.optim.AdamW(model.parameters(), 1e-3),
    "Muon": gm.optim.Muon,
    "Muon, no fading": steady,
}


class Characters(nn.Module):
    """Four blocks behind an embedding of characters and positions."""

    def __init__(self, num: int, width: int = 64) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.embedding, self.places = nn.Embedding(num, width), nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.blocks = nn.TransformerEncoder(block, 4, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, num)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(self.embedding(x) + self.places, mask=self.mask, is_causal=True)
        return self.head(h).transpose(1, 2)


def cnn() -> nn.Sequential:
    """Four convolutions with batch norms, and a linear head."""
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))


def digits() -> tuple[Draw, tuple[Tensor, Tensor]]:
    """Batches of 32 of the first 1,200 digits, shuffled once, and the others."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, y = (
        (torch.as_tensor(data.images, dtype=torch.float32)[:, None] / 16 - 0.3)[order],
        torch.tensor(data.target)[order],
    )

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(1200, (32,), generator=generator)
        return x[rows], y[rows]

    return draw, (x[1200:], y[1200:])


def characters(path: str) -> tuple[int, Draw, tuple[Tensor, Tensor]]:
    """How many there are, batches of 16 windows of the first nine tenths, and 512 of the rest."""
    text = Path(path).read_text(encoding="utf-8")
    known = {c: i for i, c in enumerate(sorted(set(text)))}
    data = torch.tensor([known[c] for c in text])
    num = 9 * len(data) // 10

    def windows(part: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(part) - LENGTH - 1, (count,), generator=generator)
        rows = torch.stack([part[i : i + LENGTH + 1] for i in starts])
        return rows[:, :-1], rows[:, 1:]

    held_out = windows(data[num:], 512, torch.Generator().manual_seed(9))
    return len(known), lambda generator: windows(data[:num], 16, generator), held_out


def run(
    model: nn.Module,
    make: Callable,
    draw: Draw,
    held_out: tuple[Tensor, Tensor],
    steps: int,
    *,
    decays: bool,
    seed: int,
) -> float:
    """The held-out loss after so many steps."""
    optimizer, generator = make(model), torch.Generator().manual_seed(seed)
    factor = lambda k: min(1.0, (k + 1) / 50) * (1 - k / steps if decays else 1.0)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in range(steps):
        x, y = draw(generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        return float(F.cross_entropy(model(held_out[0]), held_out[1]))


def main(task: str, *paths: str) -> None:
    torch.set_num_threads(1)
    if task == "cnn":
        (draw, held_out), build, lengths = digits(), cnn, (1500,)
    else:
        num, draw, held_out = characters(*paths)
        build, lengths = (lambda: Characters(num)), (600, 2500)
    for steps in lengths:
        for decays in (True, False):
            for name, make in MAKERS.items():
                begun, found = time.process_time(), []
                for seed in SEEDS:
                    torch.manual_seed(seed)
                    found.append(run(build(), make, draw, held_out, steps, decays=decays, seed=seed))
                told = ", ".join(f"{loss:.4f}" for loss in found)
                shape, taken = "linear" if decays else "constant", (time.process_time() - begun) / len(SEEDS)
                print(f"{task}, {steps} steps, {shape}; {name}: {told} ({taken:.0f} s each)", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
