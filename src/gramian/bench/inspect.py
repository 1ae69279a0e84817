"""`gramian bench inspect`: cost against WeightWatcher, large checkpoints, convolutions, and rates of errors.

WeightWatcher and gramian run in separate processes, which print their CPU seconds. WeightWatcher is taken from this
Python, or from the one named by the variable GRAMIAN_WEIGHTWATCHER_PYTHON, since it needs many packages.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gramian.bench import healthy
from gramian.bench.table import Goal, Measurement, Row, Tell
from gramian.checkpoint import save_tensors
from gramian.inspection.weights.convolution import conv_norm

__all__ = ["rows"]

# The matrices of a sentence transformer with 22.7 million parameters.
TRANSFORMER = [(384, 384)] * 25 + [(1536, 384)] * 6 + [(384, 1536)] * 6 + [(30522, 384), (512, 384)]

# Shapes and numbers of a 7B model's matrices, and of the subset that is measured.
LARGE = {(4096, 4096): 128, (11008, 4096): 64, (4096, 11008): 32}
SUBSET = {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 2}

_GRAMIAN = """
import json, resource, sys, time
from gramian.inspection import inspect
inspect(sys.argv[3])  # imports and warm-up, on a small file
ticks = []
start = time.process_time()
report = inspect(
    sys.argv[1], quick=sys.argv[2] == "quick", progress=lambda what, done, total: ticks.append(time.perf_counter())
)
figures = {"cpu": time.process_time() - start, "ticks": ticks}
figures["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
figures["shapes"] = [layer.shape for layer in report.layers]
figures["sigma"] = {layer.name: layer.singular_values for layer in report.layers}
print(json.dumps(figures))
"""

_WEIGHTWATCHER = """
import io, json, resource, sys, time, contextlib, logging
import torch
from safetensors.torch import load_file
logging.disable(logging.CRITICAL)
with contextlib.redirect_stdout(io.StringIO()):
    import weightwatcher
    model = torch.nn.Module()
    for i, (name, w) in enumerate(load_file(sys.argv[1]).items()):
        layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
        layer.weight.data = w
        model.add_module(f"l{i}", layer)
    watcher = weightwatcher.WeightWatcher(model=model)
    small = torch.nn.Sequential(torch.nn.Linear(64, 64))
    weightwatcher.WeightWatcher(model=small).analyze()
    wall, start = time.perf_counter(), time.process_time()
    details = watcher.analyze()
figures = {"cpu": time.process_time() - start, "wall": time.perf_counter() - wall, "matrices": len(details)}
figures["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(figures))
"""


def rows(repeats: int, only: str, tell: Tell) -> Iterator[Row]:
    """Yield the rows of the tasks whose name contains `only`."""
    for name, measure in TASKS.items():
        if only in name:
            tell(name)
            yield measure(name, repeats)


def _transformer(name: str, repeats: int) -> Row:
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path, small = Path(folder) / "model.safetensors", Path(folder) / "small.safetensors"
        # Like trained weights: noise, and a decaying spectrum in 16 directions.
        weights = {}
        for i, (m, n) in enumerate(TRANSFORMER):
            signal = torch.randn(m, 16, generator=generator) * torch.arange(1, 17) ** -1.0
            w = torch.randn(m, n, generator=generator) * 0.04 + signal @ torch.randn(16, n, generator=generator) * 0.02
            weights[f"layer.{i}.weight"] = w
        save_tensors(path, weights)
        save_tensors(small, {"w": torch.randn(64, 64, generator=generator)})
        peer = _weightwatcher_python()
        ours, theirs = [], []
        for _ in range(min(repeats, 3)):
            ours.append(_run([sys.executable, "-c", _GRAMIAN, str(path), "full", str(small)]))
            if peer:
                theirs.append(_run([peer, "-c", _WEIGHTWATCHER, str(path)]))
    errors = []
    for key, values in ours[-1]["sigma"].items():
        exact = torch.linalg.svdvals(weights[key].double())
        errors.append(float((torch.tensor(values, dtype=torch.float64) / exact - 1).abs().max()))
    cpu = statistics.median(run["cpu"] for run in ours)
    found = [Measurement("gramian inspect", cpu, max(errors), f"peak {_gib(ours)}")]
    goals = [(Goal("largest relative error of σ", "<=", 1e-6), max(errors))]
    if theirs:
        other = statistics.median(run["cpu"] for run in theirs)
        remark = f"{theirs[-1]['matrices']} of {len(TRANSFORMER)} matrices, peak {_gib(theirs)}"
        found.append(Measurement("WeightWatcher analyze()", other, None, remark))
        goals.append((Goal("WeightWatcher's CPU time ÷ ours", ">=", 8.0), other / cpu))
    return Row(name, "relative error of σ; times are CPU seconds", tuple(found), tuple(goals))


def write_large(folder: Path) -> None:
    """Write the subset in bfloat16, one shard per matrix: noise with decaying columns, and 16 planted directions."""
    generator = torch.Generator().manual_seed(0)
    places = {}
    for (m, n), count in SUBSET.items():
        for k in range(count):
            w = torch.randn(m, n, generator=generator).mul_(torch.arange(1, n + 1) ** -0.1)
            spikes = torch.randn(m, 16, generator=generator) * torch.linspace(0.1, 1.0, 16)
            w.addmm_(spikes, torch.randn(16, n, generator=generator), alpha=0.1)
            name, file = f"layers.{k}.w{m}x{n}.weight", f"shard-{m}x{n}-{k}.safetensors"
            save_tensors(folder / file, {name: w.bfloat16()})
            places[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def _large(name: str, repeats: int) -> Row:
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        small = folder / "small.safetensors"
        save_tensors(small, {"w": torch.eye(8)})
        write_large(folder)
        quick = [_run([sys.executable, "-c", _GRAMIAN, text, "quick", str(small)]) for _ in range(min(repeats, 3))]
        full = _run([sys.executable, "-c", _GRAMIAN, text, "full", str(small)])
    seconds = statistics.median(_whole(run) for run in quick)
    full_seconds = _whole(full)
    peak = max(run["peak"] for run in quick) / 2**30
    found = (
        Measurement("--quick", seconds, None, f"{seconds / 60:.1f} min, peak {_gib(quick)}"),
        Measurement("full", full_seconds, None, f"{full_seconds / 60:.1f} min, peak {_gib([full])}"),
    )
    goals = (
        (Goal("--quick, minutes", "<=", 5.0), seconds / 60),
        (Goal("--quick, peak memory in GiB", "<=", 2.0), peak),
        (Goal("full, minutes", "<=", 70.0), full_seconds / 60),
    )
    return Row(name, "seconds of 224 matrices, from 8 by shape", found, goals)


def _whole(run: dict[str, Any]) -> float:
    """Return the seconds for all 224 matrices, extrapolated by shape from the subset."""
    spent: dict[tuple[int, int], list[float]] = {}
    for shape, before, after in zip(run["shapes"], run["ticks"][:-1], run["ticks"][1:], strict=True):
        spent.setdefault(tuple(shape), []).append(after - before)
    return sum(LARGE[shape] * statistics.mean(seconds) for shape, seconds in spent.items())


def _convolution(name: str, repeats: int) -> Row:
    worst, reshaped = 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    for o, i, k, side in ((5, 3, 3, 8), (8, 8, 3, 10), (4, 6, 5, 9), (16, 8, 3, 7), (6, 4, 7, 11), (12, 12, 1, 6)):
        kernel = torch.randn(o, i, k, k, generator=generator)
        images = torch.eye(i * side * side).view(-1, i, side, side)
        dense = torch.nn.functional.conv2d(images, kernel, padding="same").flatten(1)
        exact = float(torch.linalg.matrix_norm(dense.double(), 2))
        worst = max(worst, abs(conv_norm(kernel, (side, side))[0] / exact - 1))
        reshaped = max(reshaped, abs(float(torch.linalg.matrix_norm(kernel.flatten(1), 2)) / exact - 1))
    found = (
        Measurement("Lanczos on the convolution", None, worst),
        Measurement("σ₁ of the reshaped kernel", None, reshaped),
    )
    return Row(name, "relative error against the dense operator", found, ((Goal("error", "<=", 0.01), worst),))


def _alarms(name: str, repeats: int) -> Row:
    scores = healthy.score_alarms(range(2_000_000, 2_001_000))
    spikes = healthy.score_spikes(range(2_000_000, 2_000_500))
    found = (
        Measurement("alarms on healthy matrices", None, scores["alarms"].rate, f"of {scores['alarms'].cases}"),
        Measurement("noise reported as structure", None, scores["structure"].rate, f"of {scores['structure'].cases}"),
        Measurement("spikes missed", None, 1 - spikes.rate, f"of {spikes.cases}"),
    )
    goals = (
        (Goal("false alarms", "<=", 0.01), scores["alarms"].rate),
        (Goal("noise reported as structure", "<=", 0.01), scores["structure"].rate),
        (Goal("spikes above the threshold found", ">=", 0.99), spikes.rate),
    )
    return Row(name, "share of cases", found, goals)


def _quick(name: str, repeats: int) -> Row:
    scores = healthy.score_quick(range(2_000_000, 2_000_500))
    found = tuple(Measurement(key, None, 1 - score.rate, f"outside, of {score.cases}") for key, score in scores.items())
    goals = tuple((Goal(f"{key} within its stated error", ">=", 0.99), score.rate) for key, score in scores.items())
    return Row(name, "share of cases outside the stated error", found, goals)


TASKS = {
    "22M transformer, 39 matrices": _transformer,
    "7B-shaped, bf16": _large,
    "convolution norm": _convolution,
    "false alarms": _alarms,
    "quick": _quick,
}


def _weightwatcher_python() -> str:
    named = os.environ.get("GRAMIAN_WEIGHTWATCHER_PYTHON", "")
    return named or (sys.executable if importlib.util.find_spec("weightwatcher") else "")


def _run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _gib(runs: list[dict[str, Any]]) -> str:
    return f"{max(run['peak'] for run in runs) / 2**30:.2f} GiB"
