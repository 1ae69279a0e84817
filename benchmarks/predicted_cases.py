"""Models and data that `plan.predicted` was not written on: `benchmarks/predicted.py` scores it by them.

They were fixed before the estimator was changed, and each was scored once. A case is a trained model, its objective,
batches of its training data, batches held out to be given to `gm.compress`, and far more that only the score sees.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gramian as gm
from gramian.bench.learning_networks import Patches, Recurrent, mlp

__all__ = ["FRESH", "Case", "trained"]

Batches = list[tuple[Tensor, Tensor]]
Case = tuple[nn.Module, gm.Objective, Batches, Batches, Batches]

CONTEXT = 48


def trained(model: nn.Module, objective: gm.Objective, batches: Batches, lr: float = 3e-3) -> nn.Module:
    """The model after one step for each batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches))
    for batch in batches:
        total, units = objective.loss(model, batch)
        optimizer.zero_grad()
        (total / units).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def split(x: Tensor, y: Tensor, size: int) -> Batches:
    return list(zip(x.split(size), y.split(size), strict=True))


@lru_cache(maxsize=1)
def sources() -> tuple[Tensor, Tensor]:
    """The source of Python's library as bytes: of every third module for what is held out, and of the others."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    held, known = (b"".join(file.read_bytes() for file in part) for part in (files[::3], [*files[1::3], *files[2::3]]))
    return tuple(torch.frombuffer(bytearray(one), dtype=torch.uint8).long().clamp(max=127) for one in (known, held))  # type: ignore[return-value]


def windows(text: Tensor, num: int, seed: int) -> Batches:
    places = text.unfold(0, CONTEXT + 1, CONTEXT)
    rows = places[torch.randint(len(places), (num * 16,), generator=torch.Generator().manual_seed(seed))]
    return split(rows[:, :-1], rows[:, 1:], 16)


class Llama(nn.Module):
    """A small Llama of transformers, its scores alone."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes: dict[str, Any] = {
            "hidden_size": 80,
            "intermediate_size": 200,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
        }
        self.net = LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=CONTEXT, **sizes))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens).logits


class GRU(Recurrent):
    """A GRU in place of the LSTM."""

    def __init__(self) -> None:
        super().__init__(80, 2, 128, linear=False)
        self.layers = nn.GRU(80, 80, 2, batch_first=True)


def code(make: Callable[[], nn.Module], steps: int) -> Case:
    known, held = sources()
    objective, train = gm.Objective.next_token(), windows(known, steps, 0)
    torch.manual_seed(7)
    model = trained(make(), objective, train)
    half = len(held) // 2
    return model, objective, windows(known, 32, 1), windows(held[:half], 32, 2), windows(held[half:], 250, 3)


def glyphs(num: int, seed: int, noise: float) -> tuple[Tensor, Tensor]:
    """Ten letters in the fonts of matplotlib, of several sizes, places and turns, and some wrong labels."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    g = torch.Generator().manual_seed(seed)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = sorted(file for file in folder.glob("DejaVu*.ttf") if "Display" not in file.name)
    fonts = [[ImageFont.truetype(str(file), size) for size in (14, 17, 20)] for file in names]
    labels, images = torch.randint(10, (num,), generator=g), torch.zeros(num, 28, 28)
    for image, label in zip(images, labels.tolist(), strict=True):
        font, size, x, y, turn = (int(torch.randint(n, (), generator=g)) for n in (len(fonts), 3, 7, 5, 31))
        canvas = Image.new("L", (28, 28))
        ImageDraw.Draw(canvas).text((4 + x, 1 + y), "ABCDEFGHKR"[label], fill=255, font=fonts[font][size])
        pixels = canvas.rotate(turn - 15).tobytes()
        image += torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(28, 28) / 255
    images += 0.3 * torch.randn(images.shape, generator=g)
    wrong = torch.rand(num, generator=g) < noise
    return images.flatten(1), torch.where(wrong, torch.randint(10, (num,), generator=g), labels)


def letters(make: Callable[[], nn.Module], epochs: int, seed: int) -> Case:
    objective, (x, y) = gm.Objective.classification(), glyphs(3000, seed, 0.05)
    order = torch.cat([torch.randperm(3000, generator=torch.Generator().manual_seed(e)) for e in range(epochs)])
    torch.manual_seed(8)
    model = trained(make(), objective, split(x[order], y[order], 50))
    held, fresh = glyphs(3000, seed + 1, 0.05), glyphs(12000, seed + 2, 0.05)
    return model, objective, split(x, y, 50), split(*held, 50), split(*fresh, 100)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 24, 5, 2, 2), nn.ReLU(), nn.Conv2d(24, 48, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(48, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 10),
    )  # fmt: skip


def table(num: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of 30 correlated columns of several kinds; a class drawn from scores of rules, and a number with noise."""
    g, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    mix = torch.randn(12, 30, generator=fixed) / 12**0.5
    x = torch.randn(num, 12, generator=g) @ mix + 0.3 * torch.randn(num, 30, generator=g)
    x[:, 20:25], x[:, 25:] = (x[:, 20:25] > 0.5).float(), x[:, 25:].exp().clamp(max=20)
    columns, limits = torch.randint(30, (40, 2), generator=fixed), torch.rand(40, 2, generator=fixed)
    rules = (x[:, columns] > limits).all(-1).float()
    scores = rules @ torch.randn(40, 4, generator=fixed) + 0.5 * x[:, :8] @ torch.randn(8, 4, generator=fixed)
    labels = torch.multinomial(scores.softmax(-1), 1, generator=g).squeeze(-1)
    return x, labels, scores[:, :1].sin() + 0.5 * torch.randn(num, 1, generator=g)


def rows(kind: str) -> Case:
    objective = gm.Objective.classification() if kind == "classes" else gm.Objective.regression()
    sets = [(x, y if kind == "classes" else z) for x, y, z in (table(n, n) for n in (4000, 6001, 40002))]
    x, y = sets[0]
    order = torch.cat([torch.randperm(4000, generator=torch.Generator().manual_seed(e)) for e in range(15)])
    torch.manual_seed(9)
    model = trained(mlp(30, 4 if kind == "classes" else 1, 96), objective, split(x[order], y[order], 50))
    return model, objective, split(x, y, 50), split(*sets[1], 50), split(*sets[2], 200)


FRESH: dict[str, Callable[[], Case]] = {
    "llama of code": lambda: code(Llama, 300),
    "GRU of code": lambda: code(GRU, 300),
    "convolutions of letters": lambda: letters(convolutional, 6, 10),
    "ViT of letters": lambda: letters(lambda: Patches(64, 3), 6, 20),
    "table, classes": lambda: rows("classes"),
    "table, numbers": lambda: rows("numbers"),
}
