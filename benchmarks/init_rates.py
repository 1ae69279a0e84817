"""`isometric_` on networks with norms and skips: held-out loss after 80 steps of AdamW, with and without it.

A small ConvNeXt, a GPT-2 (pre-norm) and a ResNet with batch norms, of transformers' own classes: with their own
initialization, and with `isometric_` after it. The schedule is that of `families_rates.py`. Prints a row for each.

    python benchmarks/init_rates.py                          # about 1 minute on one core
    python benchmarks/init_rates.py --only convnext --optimizer default --batch-size 64
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn

import gramian as gm
from families_rates import TEXT, Family, adamw, characters, convnext, default, images, run

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


FAMILIES: dict[str, Callable[[int], Family]] = {
    "convnext": lambda size: Family(convnext, *images(size)),
    "gpt2": lambda size: Family(gpt2, *characters(size)),
    "resnet": lambda size: Family(resnet, *images(size)),
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
    parser.add_argument("--optimizer", choices=("adamw", "default"), default="adamw")
    parser.add_argument("--rate", type=float, default=1e-3, help="of AdamW")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    optimizer = default if args.optimizer == "default" else adamw(args.rate)
    print(f"{Path(__file__).name}: {vars(args)}, seeds {SEEDS}")
    rows = []
    for name in [args.only] if args.only else FAMILIES:
        own = FAMILIES[name](args.batch_size)
        losses = [[run(f, optimizer, seed)["loss"] for seed in SEEDS] for f in (own, isometric(own))]
        rows.append(f"| {name} | " + " | ".join(", ".join(f"{x:.3f}" for x in of) for of in losses) + " |")
    print("| network | own initialization | `isometric_` |", "|-|-|-|", *rows, sep="\n")


if __name__ == "__main__":
    main()
