"""By how much a run of each optimizer amplifies a small error of its gradients: why ranks part in float32.

    python benchmarks/sensitivity.py

The runs are those of benchmarks/ranks.py, on one process. The error that float32 makes is how much the gradients of the
first step differ where the rows of its batch are summed in another order. Predicted: in float64, where rounding is
nothing beside it, the gradients of every step are multiplied entry by entry with 1 + η u, u standard normal, and η that
error; how far is the run then from the one without? Observed: how far apart two runs in float32 are, whose batches have
their rows in another order. Divided by η, the first is the condition number of the run, if a thousandth of η moves it
a thousandth as far. docs/scale.md quotes the table.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import gramian as gm
import ranks
from gramian.optim import OPTIMIZERS

STEPS = 100
SHOWN = (20, 50, 100)  # steps after which distances are shown

# Each at its usual rate for such a run; Muon at a smaller one too, and with polar factors to one percent; Shampoo with
# a hundred times its damping.
RUNS: tuple[tuple[str, float | None, dict[str, Any]], ...] = (
    ("muon", 0.1, {}),
    ("muon", None, {}),
    ("muon", None, {"rtol": 0.01}),
    ("balanced", None, {}),
    ("shampoo", None, {}),
    ("shampoo", None, {"damping": 1e-3}),
    ("soap", None, {}),
    ("adamw", None, {}),
    ("sgd", None, {}),
)


class Path(list[dict[str, Tensor]]):
    """The weights after each step of a run."""

    rate: float
    gradients: dict[str, Tensor]  # of the first step


def disturbed(make: Any, size: float) -> nn.Module:
    """The model, whose gradients are multiplied entry by entry with 1 + size · u."""
    model, generator = make(), torch.Generator().manual_seed(7)

    def change(gradient: Tensor) -> Tensor:
        return gradient * (1 + size * torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype))

    for p in model.parameters():
        p.register_hook(change)
    return model


def made(name: str, options: dict[str, Any], model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer, with other options than its usual ones."""
    make: Any = OPTIMIZERS[name].optimizer
    return make(model, lr=lr, **options)


def run(
    name: str,
    lr: float | None,
    options: dict[str, Any],
    dtype: torch.dtype,
    *,
    other_order: bool = False,
    size: float = 0.0,
) -> Path:
    """One run."""
    task, path = ranks.task(dtype, other_order), Path()
    model = partial(disturbed, task.model, size) if size else task.model

    def on_step(run: gm.Run, share: float) -> None:
        if run.steps == 1:
            path.gradients = {n: p.grad.double() for n, p in run.model.named_parameters() if p.grad is not None}
        if run.steps:
            path.append({n: p.detach().double().clone() for n, p in run.model.named_parameters()})

    task = gm.Task(model, task.objective, task.train_batches, task.evaluate)
    optimizer = partial(made, name, options) if options else name
    path.rate = gm.train(task, optimizer=optimizer, lr=lr, steps=STEPS, on_step=on_step).lr
    return path


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest relative distance of any tensor."""
    return max(float((other[name] - t).norm() / t.norm()) for name, t in one.items())


def distances(one: Path, other: Path) -> str:
    return ", ".join(f"{distance(one[step - 1], other[step - 1]):.0e}" for step in SHOWN)


def row(name: str, given: float | None, options: dict[str, Any]) -> str:
    """A row of the table."""
    lr = given or run(name, None, {}, torch.float32).rate
    single, other = (run(name, lr, options, torch.float32, other_order=other) for other in (False, True))
    error = distance(single.gradients, other.gradients)
    double = run(name, lr, options, torch.float64)
    moved = [run(name, lr, options, torch.float64, size=size) for size in (error, error / 1000)]
    told = "".join(f", {key} {value:g}" for key, value in options.items())
    cells = [f"{error:.0e}", *(distances(double, path) for path in moved), distances(single, other)]
    return f"| {name}, rate {lr:.2g}{told} | {' | '.join(cells)} |"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    print(f"Distances after {', '.join(map(str, SHOWN))} steps.\n")
    print(f"| | η, of float32 | predicted | by η / 1000 | observed |\n|{'-|' * 5}")
    for name, lr, options in RUNS:
        print(row(name, lr, options), flush=True)


if __name__ == "__main__":
    main()
