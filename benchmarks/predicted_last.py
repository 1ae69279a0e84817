"""Eight more models that `plan.predicted` was not written on: other families, tasks and ways of training than before.

`benchmarks/predicted.py` scores it by them. They were fixed before they were run with it, and were scored once. All
data are generated, so that the rise on new data is known. `gm.compress` is given batches that the model was trained on,
all of them or the first ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gramian as gm
from predicted_cases import Batches, Case, split, trained

__all__ = ["LAST", "LAST_TRAINED_ON"]

LENGTH = 32
LAST_TRAINED_ON = {
    "mixer of shapes": 2500, "LSTM of waves": 9600, "OPT of grammar": 1200, "clicks": 20000, "TCN of grammar": 6400,
    "denoising": 2400, "residual textures": 4000, "normalized perceptron": 800,
}  # fmt: skip


def case(
    net: nn.Module,
    objective: gm.Objective,
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]],
    sizes: tuple[int, int, int],
    *,
    epochs: int,
    given: int,
    seed: int,
    lr: float = 3e-3,
    size: int = 40,
) -> Case:
    """A case of samples that are drawn: so many to train on, to be held out, and for the score."""
    g = torch.Generator().manual_seed(seed)
    (x, y), held, fresh = (draw(num, g) for num in sizes)
    order = torch.cat([torch.randperm(len(x), generator=g) for _ in range(epochs)])
    known: Batches = split(x, y, size)
    model = trained(net, objective, split(x[order], y[order], size), lr)
    return model, objective, known[:given], split(*held, size), split(*fresh, size)


def wrong(labels: Tensor, share: float, classes: int, g: torch.Generator) -> Tensor:
    """Labels of which so many are drawn at random."""
    others = torch.randint(classes, labels.shape, generator=g)
    return torch.where(torch.rand(labels.shape, generator=g) < share, others, labels)


def shapes(num: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Disks, rings, squares, frames, crosses and bars of any size and place in noise; 5 % of the labels are wrong."""
    labels = torch.randint(6, (num,), generator=g)
    row, column = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    center, radius = 6 + 8 * torch.rand(num, 2, 1, 1, generator=g), 3 + 3 * torch.rand(num, 1, 1, generator=g)
    dy, dx = (row - center[:, 0]).abs(), (column - center[:, 1]).abs()
    round_, square = (dy**2 + dx**2).sqrt(), torch.maximum(dy, dx)
    thin = torch.minimum(dy, dx) < 1.2
    kinds = [
        round_ < radius, (round_ - radius).abs() < 1.2, square < radius, (square - radius).abs() < 1.2,
        thin & (square < radius), (dy < 1.2) & (dx < radius),
    ]  # fmt: skip
    images = torch.stack(kinds)[labels, torch.arange(num)].float() + 0.5 * torch.randn(num, 20, 20, generator=g)
    return images.flatten(1), wrong(labels, 0.05, 6, g)


class Mixer(nn.Module):
    """An MLP-Mixer (2105.01601) over 25 patches."""

    def __init__(self, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Linear(16, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2 * depth)])
        self.tokens = nn.ModuleList(
            [nn.Sequential(nn.Linear(25, 50), nn.GELU(), nn.Linear(50, 25)) for _ in range(depth)]
        )
        self.channels = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(depth)]
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.view(-1, 5, 4, 5, 4).transpose(2, 3).reshape(len(x), 25, 16)
        x = self.patches(parts)
        for i, (tokens, channels) in enumerate(zip(self.tokens, self.channels, strict=True)):
            x = x + tokens(self.norms[2 * i](x).mT).mT
            x = x + channels(self.norms[2 * i + 1](x))
        return self.head(x.mean(1))


def waves(num: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two coupled oscillators seen with noise, and where the first one is three steps later."""
    state, seen = torch.randn(num, 4, generator=g), []
    stiffness = 0.5 + torch.rand(num, 1, generator=g)
    for _ in range(LENGTH + 3):
        place, speed = state[:, :2], state[:, 2:]
        force = -stiffness * place.sin() + 0.4 * (place.flip(1) - place)
        speed = speed + 0.3 * force
        state = torch.cat([place + 0.3 * speed, speed], 1)
        seen.append(state[:, :2])
    path = torch.stack(seen, 1)
    path = path + 0.15 * torch.randn(path.shape, generator=g)
    return path[:, :LENGTH], path[:, -1, :1]


class Forecast(nn.Module):
    """An LSTM and what its last state says."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, width, batch_first=True), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def grammar(num: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Phrases of 36 words: each of five kinds has rules of its own for the next word, and words that bring another."""
    fixed = torch.Generator().manual_seed(77)
    rules = (2.5 * torch.randn(5, 36, 36, generator=fixed)).softmax(-1)
    kind, word, found = torch.randint(5, (num,), generator=g), torch.randint(36, (num,), generator=g), []
    for _ in range(LENGTH + 1):
        found.append(word)
        word = torch.multinomial(rules[kind, word], 1, generator=g).squeeze(1)
        kind = torch.where(word < 5, word, kind)
    tokens = torch.stack(found, 1)
    return tokens[:, :-1], tokens[:, 1:]


class OPT(nn.Module):
    """A small OPT of transformers, its scores alone."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import OPTConfig, OPTForCausalLM

        sizes: dict[str, Any] = {"hidden_size": 64, "ffn_dim": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
        more: dict[str, Any] = {"dropout": 0.0, "word_embed_proj_dim": 64, "max_position_embeddings": LENGTH}
        self.net = OPTForCausalLM(OPTConfig(vocab_size=36, **sizes, **more))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens).logits


class Causal(nn.Module):
    """Causal convolutions in one dimension with growing gaps, with skips (1803.01271)."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.layers = nn.ModuleList([nn.Conv1d(width, width, 3, dilation=gap) for gap in (1, 2, 4, 8)])
        self.head = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens).mT
        for layer in self.layers:
            x = x + layer(nn.functional.pad(x.relu(), (2 * layer.dilation[0], 0)))
        return self.head(x.mT)


def clicks(num: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which of three things one of 200 people does with one of 300 goods, from their tastes."""
    fixed = torch.Generator().manual_seed(78)
    people, goods = (torch.randn(count, 6, generator=fixed) for count in (200, 300))
    turn = torch.randn(3, 6, 6, generator=fixed) / 3
    who, what = (torch.rand(num, generator=g).square().mul(count).long() for count in (200, 300))
    scores = torch.einsum("bi,kij,bj->bk", people[who], turn, goods[what])
    return torch.stack([who, 200 + what], 1), torch.multinomial(scores.softmax(1), 1, generator=g).squeeze(1)


def denoised(num: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images of smooth waves in noise, and without."""
    row, column = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    turn, size = 0.6 * torch.randn(num, 3, 2, 1, 1, generator=g), torch.rand(num, 3, 1, 1, generator=g)
    phase = 6.28 * torch.rand(num, 3, 1, 1, generator=g)
    clean = (size * (turn[:, :, 0] * row + turn[:, :, 1] * column + phase).sin()).sum(1, keepdim=True)
    return clean + 0.6 * torch.randn(clean.shape, generator=g), clean


def textures(num: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which of five filters, of random entries, made a texture of noise; some labels are wrong."""
    filters = torch.randn(5, 1, 5, 5, generator=torch.Generator().manual_seed(79))
    labels = torch.randint(5, (num,), generator=g)
    noise = torch.randn(num, 1, 20, 20, generator=g)
    every = nn.functional.conv2d(noise, filters)[torch.arange(num), labels]
    return (every / 5 + 0.5 * torch.randn(every.shape, generator=g))[:, None], wrong(labels, 0.08, 5, g)


class Residual(nn.Module):
    """A small residual network with group norms."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(1, width, 3, 1, 1), nn.Linear(width, classes)
        self.blocks = nn.ModuleList([
            nn.Sequential(
                nn.GroupNorm(4, width), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1, bias=False),
                nn.GroupNorm(4, width), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1, bias=False),
            )
            for _ in range(2)
        ])  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.avg_pool2d(self.first(x), 2)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.relu().mean((2, 3)))


def numbers(num: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Three numbers of 24 correlated columns, with noise that grows with the first of them."""
    fixed = torch.Generator().manual_seed(80)
    x = torch.randn(num, 24, generator=g) @ (torch.randn(24, 24, generator=fixed) / 24**0.5)
    hidden = (x @ torch.randn(24, 16, generator=fixed) / 3).tanh()
    y = hidden @ torch.randn(16, 3, generator=fixed) / 2
    return x, y + (0.3 + 0.3 * x[:, :1].abs()) * torch.randn(y.shape, generator=g)


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def _causal_words() -> nn.Module:
    return Causal(36, 64)


def _tables() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(500, 24), nn.Flatten(), nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(),
        nn.Linear(48, 3),
    )  # fmt: skip


def _denoiser() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, 1, 1), nn.SiLU(), nn.Conv2d(24, 48, 4, 2, 1), nn.SiLU(), nn.Conv2d(48, 48, 3, 1, 1),
        nn.SiLU(), nn.ConvTranspose2d(48, 24, 4, 2, 1), nn.SiLU(), nn.Conv2d(24, 1, 3, 1, 1),
    )  # fmt: skip


def _perceptron() -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(24, 96)]
    for _ in range(3):
        layers += [nn.LayerNorm(96), nn.Tanh(), nn.Linear(96, 96)]
    return nn.Sequential(*layers, nn.LayerNorm(96), nn.Tanh(), nn.Linear(96, 3))


CLASSES, NUMBERS, WORDS = gm.Objective.classification, gm.Objective.regression, gm.Objective.next_token

LAST: dict[str, Callable[[], Case]] = {
    "mixer of shapes": lambda: case(
        seeded(lambda: Mixer(48, 2, 6), 31), CLASSES(), shapes, (2500, 1600, 12000), epochs=8, given=63, seed=31
    ),
    "LSTM of waves": lambda: case(
        seeded(lambda: Forecast(64), 32), NUMBERS(), waves, (9600, 1600, 16000), epochs=1, given=120, seed=32
    ),
    "OPT of grammar": lambda: case(
        seeded(OPT, 33), WORDS(), grammar, (1200, 800, 6000), epochs=8, given=60, seed=33, size=20
    ),
    "clicks": lambda: case(
        seeded(_tables, 34), CLASSES(), clicks, (20000, 2000, 40000), epochs=3, given=160, seed=34
    ),
    "TCN of grammar": lambda: case(
        seeded(_causal_words, 35), WORDS(), grammar, (6400, 800, 6000), epochs=1, given=100, seed=35, size=20
    ),
    "denoising": lambda: case(
        seeded(_denoiser, 36), NUMBERS(), denoised, (2400, 800, 8000), epochs=4, given=60, seed=36
    ),
    "residual textures": lambda: case(
        seeded(lambda: Residual(32, 5), 37), CLASSES(), textures, (4000, 1600, 12000), epochs=3, given=100, seed=37
    ),
    "normalized perceptron": lambda: case(
        seeded(_perceptron, 38), NUMBERS(), numbers, (800, 1600, 16000), epochs=40, given=20, seed=38
    ),
}  # fmt: skip
