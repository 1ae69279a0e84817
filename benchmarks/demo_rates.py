"""Tunes the demo's learning rates: each of its four runs on the same grid, for the same time.

The accuracy is measured on a fifth of the training digits, held out for this purpose, so that the demo's own held-out
digits are never used; on splits 100 and 101, which the demo's figures do not use. If the best rate of a run is at the
edge of the grid, that run's grid is widened. Writes `benchmarks/results/demo_rates_<depth>.json`.

    python benchmarks/demo_rates.py                    # depth 100: about 10 minutes
    python benchmarks/demo_rates.py --depth 1000 --seconds 60
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

import gramian as gm
from gramian import tasks
from gramian.demo import CELLS
from gramian.tasks import Digits

GRID = {"adamw": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3], "muon": [0.01, 0.03, 0.1, 0.3, 1.0]}
SEEDS = (100, 101)
STEP = 10**0.5
RESULTS = Path(__file__).parent / "results"


def validation(seed: int, depth: int) -> gm.Task:
    """Return the digits task with a fifth of its training digits held out in place of the test digits."""
    data = Digits.load(seed=seed)
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(seed))
    held, kept = order[: len(order) // 5], order[len(order) // 5 :]
    part = Digits(data.x_train[kept], data.y_train[kept], data.x_train[held], data.y_train[held])
    return replace(tasks.digits(depth=depth, seed=seed), train_batches=part.batches, evaluate=part.evaluate)


def score(cell: tuple[str, str], lr: float, seconds: float, depth: int) -> dict:
    """Return the mean held-out accuracy of one run of the demo at one rate; a diverged run counts as it ended."""
    init, optimizer = cell
    runs = [
        gm.train(validation(s, depth), optimizer=optimizer, init=init, lr=lr, seconds=seconds, seed=s) for s in SEEDS
    ]
    row = {
        "init": init,
        "optimizer": optimizer,
        "lr": lr,
        "accuracy": mean(run.metrics["accuracy"] for run in runs),
        "loss": mean(run.metrics["loss"] for run in runs),
        "steps": [run.steps for run in runs],
    }
    print(f"{init:10s} {optimizer:6s} lr {lr:8.2g}  accuracy {row['accuracy']:.3f}  steps {row['steps']}", flush=True)
    return row


def tune(cell: tuple[str, str], seconds: float, depth: int) -> list[dict]:
    """Return the scores on the grid, widened at most twice until the best rate is inside it."""
    # AdamW moves every layer by its rate, so its grid shifts with the depth; Muon divides its rate by the layers.
    shift = 100 / depth if cell[1] == "adamw" else 1.0
    rows = {lr: score(cell, lr, seconds, depth) for lr in (shift * rate for rate in GRID[cell[1]])}
    for _ in range(2):
        best = max(rows, key=lambda lr: _merit(rows[lr]))
        if best not in (min(rows), max(rows)):
            break
        lr = best * STEP if best == max(rows) else best / STEP
        rows[lr] = score(cell, lr, seconds, depth)
    return [rows[lr] for lr in sorted(rows)]


def _merit(row: dict) -> tuple[float, float]:
    """Return the sorting key: accuracy, then the lower training loss."""
    return row["accuracy"], -row["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--cells", nargs="+", default=["+".join(cell) for cell in CELLS], help="such as isometric+muon")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as the demo trains
    cells = [cell for cell in CELLS if "+".join(cell) in args.cells]
    rows = [row for cell in cells for row in tune(cell, args.seconds, args.depth)]
    best = [max((r for r in rows if (r["init"], r["optimizer"]) == cell), key=_merit) for cell in cells]
    for row in best:
        print(f"best: {row['init']:10s} {row['optimizer']:6s} lr {row['lr']:.2g}  accuracy {row['accuracy']:.3f}")
    RESULTS.mkdir(exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    result = {
        "depth": args.depth,
        "seconds": args.seconds,
        "seeds": SEEDS,
        "machine": machine,
        "best": best,
        "rows": rows,
    }
    (RESULTS / f"demo_rates_{args.depth}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
