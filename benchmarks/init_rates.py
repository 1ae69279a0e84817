"""The library's own initialization against `isometric_`: networks with norms and skips, and deep plain ones.

Each network is trained for 80 steps under one schedule (`families_rates.py`), from the initialization of its library
and after `isometric_`: by torch's AdamW at three rates, and by the default optimizer at its own. Compared is the
held-out loss, AdamW's at its best rate; the mean of two seeds. Then 100 plain layers of a smooth activation are trained
on the digits for 300 steps at three rates of Muon and of AdamW; compared is the accuracy on held-out digits. Writes
`benchmarks/results/init_rates.json`.

    python benchmarks/init_rates.py                    # about 10 minutes on one core
    python benchmarks/init_rates.py --only gpt2 --out gpt2.json
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import gramian as gm
from families_rates import FAMILIES, TEXT, Family, adamw, characters, default, images, run
from gramian.bench.machine import features
from gramian.tasks import Digits

RATES, SEEDS = (1e-3, 3e-3, 1e-2), (0, 1)
DEPTH, WIDTH, STEPS, BATCH = 100, 64, 300, 64
SMOOTH = {"GELU": nn.GELU, "SiLU": nn.SiLU, "Mish": nn.Mish}
OPTIMIZERS: dict[str, tuple[Callable[[nn.Module, float], torch.optim.Optimizer], tuple[float, ...]]] = {
    "Muon": (lambda model, rate: gm.optim.Muon(model, lr=rate), (3e-3, 1e-2, 3e-2)),
    "AdamW": (lambda model, rate: torch.optim.AdamW(model.parameters(), lr=rate), (1e-4, 3e-4, 1e-3)),
}
RESULTS = Path(__file__).parent / "results" / "init_rates.json"


class Logits(nn.Module):
    """A chain of modules whose output has the form of transformers' models."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Any:
        return transformers.utils.ModelOutput(logits=self.net(x))


class Mixed(nn.Module):
    """A block of an MLP-Mixer: MLPs over the patches and over the channels, each behind a norm and beside a skip."""

    def __init__(self, patches: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.tokens = nn.Sequential(nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches))
        self.channels = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).mT).mT
        return x + self.channels(self.norm2(x))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Patches(nn.Module):
    """Images (N, 1, 32, 32) as 64 patches of 4×4."""

    def forward(self, x: Tensor) -> Tensor:
        return F.unfold(x, 4, stride=4).mT


def mixer() -> nn.Module:
    """Four blocks of 64 patches and 48 channels."""
    blocks = [Mixed(64, 48) for _ in range(4)]
    return Logits([Patches(), nn.Linear(16, 48), *blocks, nn.LayerNorm(48), Mean(), nn.Linear(48, 10)])


def gpt2() -> nn.Module:
    """Four layers of 64."""
    vocabulary = len(TEXT.unique())
    tokens: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**tokens, n_positions=64, n_embd=64, n_layer=4, n_head=4, use_cache=False)
    return transformers.GPT2LMHeadModel(config)


def resnet() -> nn.Module:
    """Two stages of two blocks, with batch norm."""
    sizes: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic"}
    config = transformers.ResNetConfig(num_channels=1, **sizes)
    config.num_labels = 10
    return transformers.ResNetForImageClassification(config)


def vit() -> nn.Module:
    """Four layers of 64, patches of 8×8."""
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_channels=1, **sizes)
    config.num_labels = 10
    return transformers.ViTForImageClassification(config)


def plain(depth: int, activation: type[nn.Module]) -> Callable[[], nn.Module]:
    """A chain of linear layers of 64 and activations."""

    def make() -> nn.Module:
        hidden = [m for _ in range(depth - 1) for m in (nn.Linear(WIDTH, WIDTH), activation())]
        return Logits([nn.Flatten(), nn.Linear(1024, WIDTH), activation(), *hidden, nn.Linear(WIDTH, 10)])

    return make


NETWORKS: dict[str, Callable[[], Family]] = {
    "ConvNeXt": FAMILIES["convnext"],
    "GPT-2": lambda: Family(gpt2, *characters()),
    "ResNet, batch norm": lambda: Family(resnet, *images()),
    "ViT": lambda: Family(vit, *images()),
    "MLP-Mixer": lambda: Family(mixer, *images()),
    "50 × tanh": lambda: Family(plain(50, nn.Tanh), *images()),
    "100 × ReLU": lambda: Family(plain(100, nn.ReLU), *images()),
}


def isometric(family: Family) -> Family:
    """The family with its models initialized anew."""

    def make() -> nn.Module:
        model = family.make()
        sample = next(family.batches(torch.Generator().manual_seed(7)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gm.errors.GramianWarning)
            return gm.init.isometric_(model, sample[0])

    return family._replace(make=make)


def compare(name: str) -> dict[str, Any]:
    """The losses by AdamW at each rate and at the best, and by the default optimizer, before and after."""
    family = NETWORKS[name]()
    found: dict[str, Any] = {}
    for key, of in (("library", family), ("isometric", isometric(family))):
        runs = {rate: [run(of, adamw(rate), seed)["loss"] for seed in SEEDS] for rate in RATES}
        by_default = [run(of, default, seed)["loss"] for seed in SEEDS]
        found[key] = {"adamw": runs, "adamw_best": min(runs.values(), key=mean), "default": by_default}
    cells = [_told(found[key][kind]) for kind in ("adamw_best", "default") for key in found]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return found


def _told(losses: list[float]) -> str:
    return ", ".join(f"{loss:.2f}" for loss in losses)


def smooth(name: str) -> dict[str, Any]:
    """Accuracy of 100 layers of a smooth activation, before and after, by optimizer and rate."""
    data = Digits.load(classes=10, seed=0)
    found: dict[str, Any] = {}
    for key in ("library", "isometric"):
        for kind, (make, rates) in OPTIMIZERS.items():
            found[f"{key}, {kind}"] = {rate: _accuracy(SMOOTH[name], key, make, rate, data) for rate in rates}
            print(f"{DEPTH} × {name}, {key}, {kind}: {found[f'{key}, {kind}']}", flush=True)
    return found


def _accuracy(activation: type[nn.Module], key: str, make: Callable, rate: float, data: Digits) -> float:
    x, y = data.x_train.flatten(1), data.y_train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hidden = [m for _ in range(DEPTH - 1) for m in (nn.Linear(WIDTH, WIDTH), activation())]
        model = nn.Sequential(nn.Linear(x.shape[1], WIDTH), activation(), *hidden, nn.Linear(WIDTH, 10))
    if key == "isometric":
        gm.init.isometric_(model, x[:256])
    optimizer = make(model, rate)
    generator = torch.Generator().manual_seed(1)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(STEPS):
        for group, peak in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = peak * min(1.0, (step + 1) / 10) * (1 - step / STEPS)
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return round(float((model(data.x_test.flatten(1)).argmax(1) == data.y_test).double().mean()), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*NETWORKS, *SMOOTH])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = [args.only] if args.only else [*NETWORKS, *SMOOTH]
    body = {
        "machine": features(),
        "networks": {name: compare(name) for name in names if name in NETWORKS},
        "smooth": {name: smooth(name) for name in names if name in SMOOTH},
    }
    args.out.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
