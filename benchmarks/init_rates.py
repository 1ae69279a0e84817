"""`isometric_` on networks with norms and skips: held-out loss after 80 steps of AdamW, with and without it.

A small ConvNeXt, a GPT-2 (pre-norm) and a ResNet with batch norms, of transformers' own classes, in a copy with their own
initialization and one that `isometric_` has gone over. Rate 1e-3 unless `--rate` says another, under the schedule of
`families_rates.py`. Prints a row for each.

    python benchmarks/init_rates.py                          # about 3 minutes on one core
    python benchmarks/init_rates.py --only convnext
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from families_rates import TEXT, Family, adamw, characters, convnext, images, run
from torch import nn

import gramian as gm

SEEDS = (0, 1)


def gpt2() -> nn.Module:
    """Three layers of 64."""
    config = transformers.GPT2Config(
        vocab_size=len(TEXT.unique()), n_positions=64, n_embd=64, n_layer=3, n_head=4, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config)


def resnet() -> nn.Module:
    """Four basic blocks, in two stages."""
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic"
    )
    config.num_labels = 10
    return transformers.ResNetForImageClassification(config)


FAMILIES: dict[str, Callable[[], Family]] = {
    "convnext": lambda: Family(convnext, *images()),
    "gpt2": lambda: Family(gpt2, *characters()),
    "resnet": lambda: Family(resnet, *images()),
}


def isometric(family: Family) -> Family:
    """The same with `isometric_` behind its own initialization; what it leaves is not printed."""
    sample = next(family.batches(torch.Generator().manual_seed(99)))

    def make() -> nn.Module:
        model = family.make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gm.errors.GramianWarning)
            return gm.init.isometric_(model, sample, predict=lambda m, batch: m(batch[0]).logits)

    return family._replace(make=make)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=FAMILIES)
    parser.add_argument("--rate", type=float, default=1e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{Path(__file__).name}: AdamW at {args.rate:g}, seeds {SEEDS}")
    rows = []
    for name in [args.only] if args.only else FAMILIES:
        own = FAMILIES[name]()
        losses = [[run(f, adamw(args.rate), seed)["loss"] for seed in SEEDS] for f in (own, isometric(own))]
        rows.append(f"| {name} | " + " | ".join(", ".join(f"{x:.3f}" for x in of) for of in losses) + " |")
    print("| network | own initialization | `isometric_` |", "|-|-|-|", *rows, sep="\n")


if __name__ == "__main__":
    main()
