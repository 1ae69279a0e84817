"""What the textbooks claim of learning-rate decay, warm-up, plateaus, L1, L2 and augmentation, each with its control.

    python benchmarks/claims.py

Small networks on scikit-learn's digits, of which only a part is trained on, so that there is something to overfit. Each
line is the same run with and without one option at equal steps, for each seed of weights and batches; the split of the
data is fixed. The number is the mean over seeds, ± the standard error of the paired difference, and t is their ratio.
docs/measured/train.md quotes the table.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import gramian as gm
from gramian.tasks.digits import Digits

TRAINED_ON = 300  # of 1,257 digits
NOISE = 0.2  # share of labels that are drawn at random, for the claims about regularization


class Small:
    """A part of the digits, some with another label, and a network for them."""

    def __init__(self, noise: float, batch: int, convolutional: bool) -> None:
        self.data = Digits.load(classes=10)
        draw = torch.Generator().manual_seed(0)
        self.x = self.data.x_train[:TRAINED_ON]
        wrong = torch.rand(TRAINED_ON, generator=draw) < noise
        self.y = torch.where(wrong, torch.randint(10, (TRAINED_ON,), generator=draw), self.data.y_train[:TRAINED_ON])
        self.batch, self.convolutional = batch, convolutional

    def model(self) -> nn.Module:
        if self.convolutional:
            layers = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU()]
            return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.x), generator=generator).split(self.batch):
            yield self.x[rows], self.y[rows]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        train, held_out = model(self.x), model(self.data.x_test)
        trained = float((train.argmax(1) != self.y).float().mean())
        error = float((held_out.argmax(1) != self.data.y_test).float().mean())
        weights = [p for p in model.parameters() if p.ndim > 1]
        zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        fit = float(nn.functional.cross_entropy(train, self.y))
        loss = float(nn.functional.cross_entropy(held_out, self.data.y_test))
        return {
            "held-out error, %": 100 * error,
            "gap of the errors, %": 100 * (error - trained),
            "held-out loss": loss,
            "training loss, all rows": fit,
            "zeros, %": 100 * zeros,
        }

    def task(self) -> gm.Task:
        return gm.Task(self.model, gm.Objective.classification(), self.batches, self.evaluate, name="claims")


SGD = {"optimizer": "sgd", "lr": 0.3}
ADAMW = {"optimizer": "adamw", "lr": 3e-3}
CLEAN, NOISY, IMAGES = (0.0, 8, False), (NOISE, 32, False), (0.0, 32, True)

# A claim: the data and network, the options of the control, what is changed, and the numbers that it is about.
CLAIMS: dict[str, tuple[tuple[float, int, bool], dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "decay lowers the last loss: linear for constant, SGD": (
        (NOISE, 8, False),
        SGD | {"schedule": "constant"},
        {"schedule": "linear"},
        ("training loss, all rows", "held-out error, %"),
    ),
    "the same: cosine for constant, AdamW": (
        (NOISE, 8, False),
        ADAMW | {"schedule": "constant"},
        {"schedule": "cosine"},
        ("training loss, all rows", "held-out error, %"),
    ),
    "reduce on plateau, for constant, SGD": (
        (NOISE, 8, False),
        SGD | {"schedule": "constant"},
        {"schedule": "plateau"},
        ("training loss, all rows", "held-out error, %"),
    ),
    "warm-up allows a large rate: 50 steps for none, SGD at 1": (
        CLEAN,
        {"optimizer": "sgd", "lr": 1.0, "warmup": 0},
        {"warmup": 50},
        ("training loss, all rows", "held-out error, %"),
    ),
    "warm-up, at the usual rate: 50 steps for none, AdamW": (
        CLEAN,
        ADAMW | {"warmup": 0},
        {"warmup": 50},
        ("training loss, all rows", "held-out error, %"),
    ),
    **{
        f"L2 closes the gap: l2={strength} for none, wrong labels": (
            NOISY,
            ADAMW,
            {"regularize": {"l2": strength}},
            ("gap of the errors, %", "held-out error, %", "zeros, %"),
        )
        for strength in (0.01, 0.1, 1.0, 3.0)
    },
    **{
        f"L1 makes zeros, and closes the gap: l1={strength} for none, wrong labels": (
            NOISY,
            ADAMW,
            {"regularize": {"l1": strength}},
            ("zeros, %", "gap of the errors, %", "held-out error, %"),
        )
        for strength in (0.001, 0.003, 0.03)
    },
    "augmentation: shift=1 and noise=0.1 for none, convolutional": (
        IMAGES,
        ADAMW,
        {"augment": {"shift": 1, "noise": 0.1}},
        ("held-out error, %", "gap of the errors, %"),
    ),
    "augmentation that is wrong for the data: flip=0.5 for none, convolutional": (
        IMAGES,
        ADAMW,
        {"augment": {"flip": 0.5}},
        ("held-out error, %",),
    ),
    "mixup=0.3 for none, wrong labels": (NOISY, ADAMW, {"augment": {"mixup": 0.3}}, ("held-out error, %",)),
}


def measured(made: Small, options: dict[str, Any], seed: int, steps: int) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gm.errors.GramianWarning)  # a run that diverges is a result here
        run = gm.train(made.task(), steps=steps, seed=seed, **options)
    return run.metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--only", default="", help="claims that have this text")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    columns = "claim", "number", "without", "with", "difference", "t"
    print(f"| {' | '.join(columns)} |\n|{'-|' * len(columns)}", flush=True)
    for claim, (which, control, change, names) in CLAIMS.items():
        if arguments.only not in claim:
            continue
        made = Small(*which)
        pairs = [
            (measured(made, control, seed, arguments.steps), measured(made, control | change, seed, arguments.steps))
            for seed in range(arguments.seeds)
        ]
        for name in names:
            print(row(claim, name, [(a[name], b[name]) for a, b in pairs]), flush=True)
            claim = ""


def row(claim: str, name: str, pairs: list[tuple[float, float]]) -> str:
    mean: Callable[[Any], float] = lambda values: statistics.fmean(values)  # noqa: E731
    differences = [b - a for a, b in pairs]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    told = f"{mean(differences):+.3g} ± {error:.2g}"
    t = f"{mean(differences) / error:+.1f}" if error else "–"
    without, changed = (f"{mean(column):.3g}" for column in zip(*pairs, strict=True))
    return f"| {claim} | {name} | {without} | {changed} | {told} | {t} |"


if __name__ == "__main__":
    main()
