"""A small ConvNeXt, a Mamba and a mixture of experts: the default optimizer at its default rate against tuned AdamW.

80 steps each, of transformers' own classes with their own initialization, under one schedule: ten steps of warm-up,
then linear decay, as `gm.train` has it. AdamW is torch's, fused, at the best of five rates on a tuning seed; both are
compared by the held-out loss at the end on three other seeds. Writes `benchmarks/results/families_rates.json`.

    python benchmarks/families_rates.py                          # about 4 minutes on one core
    python benchmarks/families_rates.py --only mamba --out mamba.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import sklearn.datasets
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import gramian as gm
from gramian.bench.learning_data import ShiftedDigits
from gramian.bench.machine import features

STEPS, WARMUP = 80, 10
TUNING_SEED, SEEDS = 100, (0, 1, 2)
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
CONTEXT = 32
RESULTS = Path(__file__).parent / "results" / "families_rates.json"

Batch = tuple[Tensor, Tensor]


class Family(NamedTuple):
    """A model, its training batches, and its held-out batch; the loss is the mean cross-entropy of the logits."""

    make: Callable[[], nn.Module]
    batches: Callable[[torch.Generator], Iterator[Batch]]
    held_out: Batch


def convnext() -> nn.Module:
    """Four blocks with depthwise 7×7 kernels, a strided stem and a strided step between the stages."""
    config = transformers.ConvNextConfig(
        num_channels=1, patch_size=4, num_stages=2, hidden_sizes=[48, 96], depths=[2, 2]
    )
    config.num_labels = 10
    return transformers.ConvNextForImageClassification(config)


def mamba() -> nn.Module:
    """Two layers of 64."""
    config = transformers.MambaConfig(
        vocab_size=len(TEXT.unique()), hidden_size=64, state_size=8, num_hidden_layers=2, use_cache=False
    )
    return transformers.MambaForCausalLM(config)


def mixture() -> nn.Module:
    """Three layers of 64, each with 16 experts, of which a token takes two."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(TEXT.unique()),
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=2,
        use_cache=False,
    )
    config.head_dim = 16
    return transformers.Qwen3MoeForCausalLM(config)


def _text() -> Tensor:
    """Characters of the descriptions of scikit-learn's own data sets, as numbers."""
    names = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
    text = "".join(getattr(sklearn.datasets, f"load_{name}")().DESCR for name in names)
    return torch.tensor(list(text.encode())).unique(return_inverse=True)[1]


TEXT = _text()


def characters(batch_size: int = 16) -> tuple[Callable[[torch.Generator], Iterator[Batch]], Batch]:
    """Windows of the text's first nine tenths, drawn at random; and the windows of the last tenth."""
    split = len(TEXT) * 9 // 10
    windows = TEXT[:split].unfold(0, CONTEXT + 1, 1)
    test = TEXT[split:].unfold(0, CONTEXT + 1, CONTEXT)

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        while True:
            rows = windows[torch.randint(len(windows), (batch_size,), generator=generator)]
            yield rows[:, :-1], rows[:, 1:]

    return batches, (test[:, :-1], test[:, 1:])


def images(batch_size: int = 32) -> tuple[Callable[[torch.Generator], Iterator[Batch]], Batch]:
    """Digits of 32×32 pixels, shifted by up to four."""
    data = ShiftedDigits.load(size=32, most=4, batch_size=batch_size)

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        while True:
            for x, y in data.batches(0, generator):
                yield x.view(-1, 1, 32, 32), y

    x, y = data.held_out(1)
    return batches, (x.view(-1, 1, 32, 32), y)


FAMILIES: dict[str, Callable[[], Family]] = {
    "convnext": lambda: Family(convnext, *images()),
    "mamba": lambda: Family(mamba, *characters()),
    "mixture of experts": lambda: Family(mixture, *characters()),
}


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch[0]).logits
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def run(family: Family, make: Callable[[nn.Module], torch.optim.Optimizer], seed: int) -> dict[str, Any]:
    """Train for 80 steps; return the held-out loss and the seconds of the steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family.make()
        optimizer = make(model)
        rates = [group["lr"] for group in optimizer.param_groups]
        batches = family.batches(torch.Generator().manual_seed(seed))
        seconds = 0.0
        for step in range(STEPS):
            batch = next(batches)
            start = time.process_time()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min(1.0, (step + 1) / WARMUP) * (1 - step / STEPS)
            optimizer.zero_grad()
            _loss(model, batch).backward()
            optimizer.step()
            seconds += time.process_time() - start
        model.eval()
        with torch.no_grad():
            loss = float(_loss(model, family.held_out))
    print(f"seed {seed}: {loss:.4f}", flush=True)
    return {"seed": seed, "loss": loss, "seconds": round(seconds, 2)}


def default(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that "auto" stands for, at the rate it takes where none is given."""
    return gm.optim.Muon(model)


def adamw(rate: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Torch's fused AdamW at a rate."""
    return lambda model: torch.optim.AdamW(model.parameters(), lr=rate, fused=True)


def compare(name: str) -> dict[str, Any]:
    """AdamW's tuning and the losses of both, for one family."""
    family = FAMILIES[name]()
    tuning = {rate: run(family, adamw(rate), TUNING_SEED)["loss"] for rate in RATES}
    best = min(tuning, key=lambda rate: tuning[rate])
    rows = {"adamw": [run(family, adamw(best), seed) for seed in SEEDS]}
    rows["default"] = [run(family, default, seed) for seed in SEEDS]
    losses = {key: mean(row["loss"] for row in of) for key, of in rows.items()}
    print(f"{name}: default {losses['default']:.4f}, AdamW at {best:g} {losses['adamw']:.4f}", flush=True)
    return {"adamw_tuning": tuning, "adamw_rate": best, "mean_loss": losses, "runs": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=FAMILIES, help="This one; the others stay in the file as they are.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = [args.only] if args.only else list(FAMILIES)
    families = json.loads(args.out.read_text())["families"] if args.out.exists() else {}
    families |= {name: compare(name) for name in names}
    families = {name: families[name] for name in FAMILIES if name in families}
    body = {"machine": features(), "steps": STEPS, "families": families}
    args.out.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
