"""Runs of `gm.train` that are killed at random moments and resumed, compared bit for bit with runs that were not.

    python benchmarks/kills.py --kills 100

Each run is a process, with augmentation, a schedule, an average, dropout and batch statistics, and writes checkpoints
as often as it can. SIGKILL, SIGTERM or SIGINT comes after a random time, drawn from zero to somewhat more than a whole
run takes. The run is started again until it is finished; then its weights and metrics must be those of the run that
nobody stopped. docs/train.md quotes the table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gramian as gm
from gramian.checkpoint import load_tensors
from gramian.optim import OPTIMIZERS
from gramian.training import folder

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STEPS = 40

X = torch.randn(160, 64, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.2), nn.Linear(32, 2))


def batches(epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    return ((X[part], Y[part]) for part in torch.randperm(len(X), generator=generator).split(32))


def evaluate(network: nn.Module) -> dict[str, float]:
    return {"size": float(network(X).square().mean())}


TASK = gm.Task(model, gm.Objective.classification(), batches, evaluate)

OPTIONS: dict[str, Any] = {
    "steps": STEPS,
    "schedule": "cosine",
    "ema": 0.9,
    "augment": {"shift": 1, "noise": 0.1, "mixup": 0.2},
    "resume": True,
}


def started(path: Path, optimizer: str) -> int:
    """The number of a process that trains there, forked with everything loaded."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the process ends with it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        gm.train(TASK, optimizer=optimizer, out=path, **OPTIONS)
        code = 0
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        os._exit(code)


def left_by(path: Path) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return load_tensors(path / "model.safetensors")[0], [
        {k: v for k, v in row.items() if k != "seconds"} for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder.EVERY_SECONDS, folder.LARGEST_SHARE = 0.0, float("inf")
    draw = random.Random(arguments.seed)
    names = arguments.optimizers.split(",")
    each = -(-arguments.kills // len(names))
    columns = "optimizer", "runs", "kills", "KILL / TERM / INT", "inside a write", "lost", "not bitwise"
    print(f"| {' | '.join(columns)} |\n|{'-|' * len(columns)}")
    total = Counter[str]()
    for optimizer in names:
        with tempfile.TemporaryDirectory() as place:
            counts, runs = killed(Path(place), optimizer, each, draw)
        signals = " / ".join(str(counts[number.name]) for number in SIGNALS)
        row = f"| {optimizer} | {runs} | {counts['kills']} | {signals} | {counts['half']} | {counts['lost']} "
        print(f"{row}| {counts['other']} |", flush=True)
        total += counts
    print(f"\n{total['kills']} kills: {total['lost']} runs lost, {total['other']} not bitwise; exit codes", end=" ")
    print({name: count for name, count in sorted(total.items()) if name.startswith("code ")})


def killed(place: Path, optimizer: str, kills: int, draw: random.Random) -> tuple[Counter[str], int]:
    """Kill and resume runs until so many kills hit; count what happened."""
    begin = time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(started(place / "whole", optimizer), 0)[1])
    assert code == 0, code
    whole, seconds = left_by(place / "whole"), time.monotonic() - begin
    counts, runs = Counter[str](), 0
    while counts["kills"] < kills:
        path = place / f"{runs}"
        runs += 1
        for _ in range(100):
            process = started(path, optimizer)
            number = draw.choice(SIGNALS)
            hit = counts["kills"] < kills
            if hit:
                time.sleep(draw.random() * 1.1 * seconds)
                os.kill(process, number)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            if code == 0:
                break
            if not hit or code not in (-number, 128 + number):
                counts["lost"] += 1
                break
            counts["kills"] += 1
            counts[number.name] += 1
            counts[f"code {code}"] += 1
            counts["half"] += path.exists() and any(name.endswith(".tmp") for name in os.listdir(path))
        else:
            counts["lost"] += 1
        if not (path / "model.safetensors").exists():
            continue
        weights, rows = left_by(path)
        same = rows == whole[1] and all(torch.equal(weights[name], tensor) for name, tensor in whole[0].items())
        counts["other"] += not same
    return counts, runs


if __name__ == "__main__":
    main()
