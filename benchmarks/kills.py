"""Runs of `gm.train` that are killed at random moments and resumed, compared bit for bit with runs that were not.

    python benchmarks/kills.py --kills 100 [--ranks 2 [--shard]] [--inside]

Each run is a process, or one for each rank: where one of them ends, all are ended and begin again, as under torchrun.
It has augmentation, a schedule, an average, dropout and (on one rank) batch statistics, and writes checkpoints as often
as it can. SIGKILL, SIGTERM or SIGINT comes after a random time, drawn from zero to somewhat more than a whole run
takes; with ranks, to one of them or to all. With `--inside`, files are written slowly, and SIGKILL, or seldom another
signal, comes while one is: in its content, before it is synced, or before it takes the old one's place. The run is
started again until it is finished; then its weights and metrics must be those of the run that nobody stopped.
docs/measured/train.md quotes the table. A column counts what left a half-written file: only SIGKILL, since a run that
is interrupted otherwise ends its write.
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
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import gramian as gm
from gramian.checkpoint import load_tensors, writing
from gramian.optim import OPTIMIZERS
from gramian.training import folder

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STEPS = 40
SLOW, WRITES = (
    0.01,
    30,
)  # with --inside: seconds before each tensor, sync and renaming, and of these what a signal waits
PATIENCE = 5.0  # seconds in which the other ranks end by themselves, after which they count as hung and are killed

X = torch.randn(160, 64, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def model() -> nn.Module:
    norm = nn.LayerNorm(32) if dist.is_initialized() else nn.BatchNorm1d(32)
    return nn.Sequential(nn.Linear(64, 32), norm, nn.Tanh(), nn.Dropout(0.2), nn.Linear(32, 2))


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


def slowly(function: Any) -> Any:
    """A function that waits before it does its work."""

    def waiting(*arguments: Any) -> Any:
        time.sleep(SLOW)
        return function(*arguments)

    return waiting


def started(path: Path, optimizer: str, rank: int, ranks: int, shard: bool, store: str, slow: bool) -> int:
    """The number of a process that trains there, forked with everything loaded."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the process ends with it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if slow:
            for name in ("fsync", "replace"):
                setattr(writing.os, name, slowly(getattr(os, name)))
            writing.raw_bytes = slowly(writing.raw_bytes)
        if ranks > 1:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        gm.train(TASK, optimizer=optimizer, out=path, shard=shard, **OPTIONS)
        code = 0
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        os._exit(code)


class Job:
    """The processes of a run: where one ends otherwise than well, the others are ended, as torchrun does."""

    def __init__(self, path: Path, optimizer: str, ranks: int, shard: bool, slow: bool = False) -> None:
        self.folder = tempfile.TemporaryDirectory()
        store = os.path.join(self.folder.name, "store")
        self.running = [started(path, optimizer, rank, ranks, shard, store, slow) for rank in range(ranks)]

    def kill(self, number: int, which: list[int]) -> None:
        for rank in which:
            os.kill(self.running[rank], number)

    def is_writing(self, path: Path, times: int, seconds: float) -> None:
        """Wait until a file is being written for so many times, and has been for so long; or until the first ends."""
        seen: set[str] = set()
        while len(seen) < times:
            if os.waitid(os.P_PID, self.running[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return
            with suppress(FileNotFoundError):
                seen |= {name for name in os.listdir(path) if name.endswith(".tmp")}
            time.sleep(0.001)
        time.sleep(seconds)

    def wait(self) -> list[int]:
        """The exit codes, in the order in which the processes ended."""
        codes: list[int] = []
        left = list(self.running)
        patience = None
        while left:
            for process in list(left):
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    left.remove(process)
                    codes.append(os.waitstatus_to_exitcode(status))
                    patience = patience or (time.monotonic() + PATIENCE if codes[-1] else None)
            if patience is not None and time.monotonic() > patience:
                for process in left:
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.002)
        self.folder.cleanup()
        return codes


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
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--inside", action="store_true", help="aim at the writing of a file")
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
            counts, runs = killed(Path(place), optimizer, each, draw, arguments)
        signals = " / ".join(str(counts[number.name]) for number in SIGNALS)
        row = f"| {optimizer} | {runs} | {counts['kills']} | {signals} | {counts['half']} | {counts['lost']} "
        print(f"{row}| {counts['other']} |", flush=True)
        total += counts
    print(f"\n{total['kills']} kills: {total['lost']} runs lost, {total['other']} not bitwise; exit codes", end=" ")
    print({name: count for name, count in sorted(total.items()) if name.startswith("code ")})


def killed(
    place: Path, optimizer: str, kills: int, draw: random.Random, arguments: argparse.Namespace
) -> tuple[Counter[str], int]:
    """Kill and resume runs until so many kills hit; count what happened."""
    ranks, shard = arguments.ranks, arguments.shard
    begin = time.monotonic()
    codes = Job(place / "whole", optimizer, ranks, shard).wait()
    assert not any(codes), codes
    whole, seconds = left_by(place / "whole"), time.monotonic() - begin
    counts, runs = Counter[str](), 0
    while counts["kills"] < kills:
        path = place / f"{runs}"
        runs += 1
        for _ in range(100):
            hit = counts["kills"] < kills
            job = Job(path, optimizer, ranks, shard, arguments.inside and hit)
            number = draw.choice(
                (*SIGNALS, signal.SIGKILL, signal.SIGKILL, signal.SIGKILL) if arguments.inside else SIGNALS
            )
            if hit:
                if arguments.inside:
                    job.is_writing(path, draw.randint(1, 5), draw.random() * WRITES * SLOW)
                else:
                    time.sleep(draw.random() * 1.1 * seconds)
                job.kill(number, draw.choice([[rank] for rank in range(ranks)] + [list(range(ranks))]))
            codes = job.wait()
            if not any(codes):
                break
            # Of the ranks, one was hit, and the others ended with its signal, or because it was gone.
            if not hit or not any(code in (-number, 128 + number) for code in codes):
                counts["lost"] += 1
                break
            counts["kills"] += 1
            counts[number.name] += 1
            counts[f"code {codes[0]}"] += 1
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
