"""More models and data that `plan.predicted` was not written on: other families, tasks and seeds than those before.

`benchmarks/predicted.py` scores it by them. They were fixed before they were run with it, and were scored once. What
`gm.compress` is given are batches that the model was trained on, all of them or the first ones.
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
from predicted_cases import Batches, Case, split, trained

__all__ = ["LATER"]

CONTEXT = 40
PACKAGES = (
    "torch/nn/modules",
    "numpy/lib",
    "torch/optim",
    "torch/_dynamo",
    "torch/distributions",
    "transformers/utils",
)


@lru_cache(maxsize=1)
def packages() -> list[tuple[Tensor, Tensor, Tensor]]:
    """The source of each of some packages as bytes: files for training, to be given, and for the score."""
    found = []
    for package in PACKAGES:
        files = sorted((Path(sysconfig.get_paths()["purelib"]) / package).glob("*.py"))
        texts = [b"".join(file.read_bytes() for file in part) for part in (files[::2], files[1::4], files[3::4])]
        bytes_of = [torch.frombuffer(bytearray(one), dtype=torch.uint8).long().clamp(max=127) for one in texts]
        found.append((bytes_of[0], bytes_of[1], bytes_of[2]))
    return found


def windows(text: Tensor, num: int, length: int, g: torch.Generator) -> Tensor:
    places = text.unfold(0, length, 8)
    return places[torch.randint(len(places), (num,), generator=g)]


class Scores(nn.Module):
    """What a model of transformers returns as `logits`, alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens).logits


def neox() -> Case:
    """A small GPT-NeoX that predicts bytes of numpy's and torch's source; half of its batches are given."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 72, "intermediate_size": 288, "num_hidden_layers": 2}
    more = {"num_attention_heads": 3, "max_position_embeddings": CONTEXT, "hidden_dropout": 0.0}
    torch.manual_seed(21)
    net = Scores(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=128, **sizes, **more)))
    known, held, fresh = (torch.cat(part) for part in zip(*packages(), strict=True))
    g, objective, sets = torch.Generator().manual_seed(21), gm.Objective.next_token(), []
    for text, num in ((known, 240 * 16), (held, 32 * 16), (fresh, 200 * 16)):
        rows = windows(text, num, CONTEXT + 1, g)
        sets.append(split(rows[:, :-1], rows[:, 1:], 16))
    return trained(net, objective, sets[0]), objective, sets[0][:120], sets[1], sets[2]


def bert() -> Case:
    """A small BERT that tells which of six words is among random letters, from labels of which some are wrong."""
    from transformers import BertConfig, BertForSequenceClassification

    def draw(num: int, seed: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        words = torch.randint(4, 24, (6, 3), generator=torch.Generator().manual_seed(5))
        tokens, labels = torch.randint(4, 24, (num, 20), generator=g), torch.randint(6, (num,), generator=g)
        places = torch.randint(18, (num, 1), generator=g) + torch.arange(3)
        wrong = torch.rand(num, generator=g) < 0.05
        tokens.scatter_(1, places, words[labels])
        return tokens, torch.where(wrong, torch.randint(6, (num,), generator=g), labels)

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_labels": 6}
    more: dict[str, Any] = {"num_attention_heads": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(22)
    net = Scores(BertForSequenceClassification(BertConfig(vocab_size=24, **sizes, **more)))
    g, sets = torch.Generator().manual_seed(22), [draw(num, 40 + num) for num in (4000, 1600, 8000)]
    return _epochs(net, gm.Objective.classification(), sets, 6, g, 2e-3)


def tones() -> Case:
    """Convolutions in one dimension that tell which of eight chords is in noise; each sample is seen once."""

    def draw(num: int, seed: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        pairs = torch.tensor([[3, 5], [3, 7], [5, 7], [4, 6], [4, 9], [6, 9], [3, 9], [5, 8]]).double()
        labels, time = torch.randint(8, (num,), generator=g), torch.arange(64) / 64
        phase, size = 6.28 * torch.rand(num, 2, 1, generator=g), 0.5 + torch.rand(num, 2, 1, generator=g)
        waves = size * (6.28 * pairs[labels].float()[:, :, None] * time + phase).sin()
        return (waves.sum(1, keepdim=True) + 0.9 * torch.randn(num, 1, 64, generator=g)), labels

    torch.manual_seed(23)
    net = nn.Sequential(
        nn.Conv1d(1, 24, 9, 2, 4), nn.BatchNorm1d(24), nn.SiLU(), nn.Conv1d(24, 48, 7, 2, 3), nn.BatchNorm1d(48),
        nn.SiLU(), nn.Conv1d(48, 64, 5, 2, 2), nn.SiLU(), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(128, 8),
    )  # fmt: skip
    g, sets = torch.Generator().manual_seed(23), [draw(num, 30 + num) for num in (12000, 1600, 8000)]
    return _epochs(net, gm.Objective.classification(), sets, 1, g)


class Residual(nn.Module):
    """A perceptron with skips."""

    def __init__(self, inputs: int, outputs: int, width: int, depth: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(inputs, width), nn.Linear(width, outputs)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + nn.functional.gelu(layer(x))
        return self.last(x)


def arms(epochs: int, num: int, seed: int) -> Case:
    """A perceptron with skips that learns where an arm of three joints ends, from noisy numbers."""

    def draw(num: int, seed: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(num, 12, generator=g)
        angles = x[:, :3].cumsum(1) + 0.2 * x[:, 3:6] * x[:, 6:9]
        ends = torch.cat([angles.cos().sum(1, keepdim=True), angles.sin().sum(1, keepdim=True)], 1)
        return x, ends + 0.3 * torch.randn(num, 2, generator=g)

    torch.manual_seed(seed)
    g, sets = torch.Generator().manual_seed(seed), [draw(n, seed + n) for n in (num, 2000, 12000)]
    return _epochs(Residual(12, 2, 64, 3), gm.Objective.regression(), sets, epochs, g)


def _epochs(
    net: nn.Module,
    objective: gm.Objective,
    sets: list[tuple[Tensor, Tensor]],
    epochs: int,
    g: torch.Generator,
    lr: float = 3e-3,
) -> Case:
    x, y = sets[0]
    order = torch.cat([torch.randperm(len(x), generator=g) for _ in range(epochs)])
    batches: Batches = split(x[order], y[order], 40)
    held, fresh = (split(*part, 40) for part in sets[1:])
    return trained(net, objective, batches, lr), objective, batches[: min(len(x) // 40, 120)], held, fresh


LATER: dict[str, Callable[[], Case]] = {
    "GPT-NeoX of packages": neox,
    "BERT of words": bert,
    "convolutions of tones": tones,
    "arms, seen once": lambda: arms(1, 16000, 24),
    "arms, seen six times": lambda: arms(6, 3000, 25),
}
