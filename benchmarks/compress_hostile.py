"""Calibrations that tell little, nothing, or something false: what `gm.compress` makes of each of 1,000 drawn cases.

    python benchmarks/compress_hostile.py

A case is a small model, batches, a loss and a target, each drawn from a list by the case's seed. It may end in two
ways: refused, by an error of gramian's with a message; or with a model whose numbers and outputs are finite, and whose
expected cost is a number. Where the data cannot tell which layers matter, a note has to say so. Everything else is a
failure, and is printed with its seed. docs/measured/compress.md quotes the counts.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gramian as gm
from gramian.errors import GramianError, GramianWarning

Batches = list[tuple[Tensor, Tensor]]


class Unreached(nn.Module):
    """A layer that is never called, and one whose output is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.ignored = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """The head of the layer that counts."""
        hidden = self.used(x).tanh()
        self.ignored(hidden)
        return self.head(hidden)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))


def changed(change: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = mlp()
        with torch.no_grad():
            change(model)
        return model

    return make


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": mlp,
    "one layer": lambda: nn.Linear(12, 5),
    "no bias": lambda: nn.Sequential(nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 5, bias=False)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)
    ),
    "normalized": lambda: nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 5)),
    "unreached": Unreached,
    "frozen": changed(lambda model: model.requires_grad_(False)),
    "partly frozen": changed(lambda model: model[0].requires_grad_(False)),
    "dead units": changed(lambda model: model[0].bias.fill_(-1e4)),
    "zero layer": changed(lambda model: model[2].weight.zero_()),
    "huge weights": changed(lambda model: model[2].weight.mul_(1e12)),
    "tiny weights": changed(lambda model: model[2].weight.mul_(1e-20)),
    "one large weight": changed(lambda model: model[2].weight[3, 4].fill_(1e4)),
    "NaN weight": changed(lambda model: model[2].weight[0, 0].fill_(torch.nan)),
    "bfloat16": lambda: mlp().bfloat16(),
    "float16": lambda: mlp().half(),
    "float64": lambda: mlp().double(),
    "training": lambda: nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 5)).train(),
}


def rows(num: int, generator: torch.Generator) -> Tensor:
    return torch.randn(num, 12, generator=generator)


DATA: dict[str, Callable[[torch.Generator], list[Tensor]]] = {
    "many": lambda g: [rows(32, g) for _ in range(8)],
    "one batch": lambda g: [rows(32, g)],
    "one sample": lambda g: [rows(1, g)],
    "two samples": lambda g: [rows(2, g)],
    "single samples": lambda g: [rows(1, g) for _ in range(24)],
    "copies": lambda g: [rows(1, g).repeat(32, 1)] * 4,
    "two kinds of copies": lambda g: [rows(2, g).repeat(16, 1)] * 4,
    "constant": lambda g: [torch.ones(32, 12)] * 4,
    "zero": lambda g: [torch.zeros(32, 12)] * 4,
    "one direction": lambda g: [rows(32, g)[:, :1] * torch.ones(12) for _ in range(4)],
    "dead inputs": lambda g: [rows(32, g) * (torch.arange(12) < 3) for _ in range(4)],
    "huge": lambda g: [rows(32, g) * 1e18 for _ in range(4)],
    "tiny": lambda g: [rows(32, g) * 1e-18 for _ in range(4)],
    "mixed scales": lambda g: [rows(32, g) * torch.logspace(-12, 12, 12) for _ in range(4)],
    "large mean": lambda g: [rows(32, g) * 1e-4 + 1e4 for _ in range(4)],
    "NaN rows": lambda g: [torch.where(torch.arange(32)[:, None] == 3, torch.nan, rows(32, g)) for _ in range(4)],
    "infinite rows": lambda g: [torch.where(torch.arange(32)[:, None] == 3, torch.inf, rows(32, g)) for _ in range(4)],
    "NaN in the last batch": lambda g: [*(rows(32, g) for _ in range(8)), torch.full((32, 12), torch.nan)],
    "no rows": lambda g: [rows(0, g)],
    "no rows at first": lambda g: [rows(0, g), *(rows(32, g) for _ in range(4))],
    "no rows in between": lambda g: [rows(32, g), rows(0, g), rows(32, g)],
    "no batches": lambda g: [],
}
TELLS_NOTHING = {"one sample", "two samples", "copies", "two kinds of copies", "constant", "zero"}


def mean(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[nn.Module, Any], Tensor]:
    return lambda model, batch: loss(model(batch[0]), batch[1])


def squares(output: Tensor, wanted: Tensor) -> Tensor:
    return (output - wanted).square().sum(1)


LOSSES: dict[str, Callable[[], Any]] = {
    "regression": gm.Objective.regression,
    "self-distillation": gm.Objective.self_distillation,
    "classification": lambda: gm.Objective(
        *(getattr(gm.Objective.classification(), part) for part in ("predict", "criterion")), fisher="empirical"
    ),
    "mean": lambda: mean(lambda output, wanted: squares(output, wanted).mean()),
    "vector": lambda: mean(squares),
    "without gradient": lambda: mean(lambda output, wanted: squares(output.detach(), wanted).mean()),
    "constant": lambda: mean(lambda output, wanted: (0.0 * output).sum()),
    "to its own output": lambda: mean(lambda output, wanted: squares(output, output.detach()).mean()),
    "NaN": lambda: mean(lambda output, wanted: output.sum() * torch.nan),
    "tiny": lambda: mean(lambda output, wanted: 1e-30 * squares(output, wanted).mean()),
    "huge": lambda: mean(lambda output, wanted: 1e25 * squares(output, wanted).mean()),
    "number": lambda: mean(lambda output, wanted: 1.0),  # type: ignore[arg-type, return-value]
}

TARGETS: tuple[dict[str, Any], ...] = (
    {"keep": 0.9}, {"keep": 0.6}, {"bits": 8}, {"bits": 4}, {"bits": 2, "group": 8}, {"size": 0.5}, {"size": 0.3},
    {"keep": 0.8, "bits": 8}, {"sparsity": 0.5}, {"sparsity": "2:4"},
)  # fmt: skip


def drawn(seed: int) -> dict[str, Any]:
    """The names of a case's parts, and its target."""
    choose = random.Random(seed)
    odd = choose.random() < 0.7  # the others have one odd part at most, so that its outcome is not another's
    model, data, loss = (choose.choice(list(table)) for table in (MODELS, DATA, LOSSES))
    if not odd:
        kept = choose.randrange(3)
        model, data, loss = (
            name if i == kept else usual
            for i, (name, usual) in enumerate(zip((model, data, loss), ("plain", "many", "regression"), strict=True))
        )
    return {"model": model, "data": data, "loss": loss, "target": choose.choice(TARGETS)}


def outcome(seed: int) -> str:
    """`refused`, `told` or `planned`, and for a failure `failed: ` with what was wrong."""
    case, generator = drawn(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = MODELS[case["model"]]()
    dtype = next(model.parameters()).dtype
    xs = [x.to(dtype) for x in DATA[case["data"]](generator)]
    classes = case["loss"] == "classification"
    batches = [(x, torch.randint(0, 5, (len(x),), generator=generator) if classes else x[:, :5]) for x in xs]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", GramianWarning)
            plan = gm.compress(model, batches=batches, objective=LOSSES[case["loss"]]())
            try:
                part = plan.at(**case["target"], **({} if "sparsity" in case["target"] else {"of": "factorable"}))
            except gm.errors.InputError as error:
                if "smallest possible" not in str(error):
                    raise
                part = plan.at(keep=1.0)
            small = part.apply()
    except GramianError as error:
        return "refused" if str(error) else "failed: an error without a message"
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"
    bad = [name for name, p in small.named_parameters() if bool((~p.isfinite()).any())]
    was = [name for name, p in model.named_parameters() if bool((~p.isfinite()).any())]
    if bad and not was:
        return f"failed: {bad[0]} is not finite"
    x = rows(4, generator).to(dtype)
    with torch.no_grad():
        dense, found = model.eval()(x), small.eval()(x)
    if bool(dense.isfinite().all()) and not bool(found.isfinite().all()):
        return "failed: its output is not finite"
    predicted = part.predicted
    if not 0 <= part.predicted_loss < float("inf") or predicted.rise != predicted.rise:
        return f"failed: its expected cost is {part.predicted_loss}, {predicted}"
    if case["data"] in TELLS_NOTHING and not part.notes:
        return "failed: nothing says that the data tell nothing"
    return "told" if part.notes else "planned"


def main(num: int) -> int:
    counts: Counter[str] = Counter()
    failed = 0
    for seed in range(num):
        found = outcome(seed)
        counts[found.partition(":")[0]] += 1
        if found.startswith("failed"):
            failed += 1
            print(seed, drawn(seed), found, flush=True)
    print(", ".join(f"{number} {name}" for name, number in counts.most_common()))
    return failed


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(min(1, main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)))
