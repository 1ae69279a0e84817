"""Files with one damage each, and whether they are found before anything is used.

    python benchmarks/flips.py [--damages 500] [--kinds plan,costs]

A damage is a flipped bit, another byte, a byte too many or too few, or a cut; half of them lie in the first part of
the file, where its header is. A reading ends in one of these ways: *refused* with one line; *said*, where a warning
tells it and what is used instead is right; the *same* as of the whole file; *other* values, silently; or a *crash*, any
exception but `GramianError`. The last two must not happen to a file of gramian's own. Text that people write, and some
formats of others, have no checksums, so that there other values cannot be told, and only crashes count. docs/train.md
quotes the table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import typer
from torch import Tensor, nn

import gramian as gm
from gramian.checkpoint import load_into, load_tree, open_checkpoint, save_tensors
from gramian.cli import app
from gramian.cli.config import read_config
from gramian.compression import LowRank, load_compressed, load_plan, save_compressed, save_plan
from gramian.errors import GramianError
from gramian.inspection.comparing.adapter import extract_lora
from gramian.inspection.weights.matrices import read_layouts
from gramian.linalg.engine import cost
from gramian.statistics import Statistics
from gramian.training import folder

X = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
STEPS = 6
WORST = ("other", "crash")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 2))


TASK = gm.Task(
    net,
    gm.Objective.classification(),
    lambda epoch, generator: ((X[part], Y[part]) for part in torch.randperm(48, generator=generator).split(16)),
    lambda model: {"size": float(model(X).detach().square().mean())},
)


class Half(Exception):
    """The run is left as it is."""


def trained(place: Path, **options: Any) -> gm.Run:
    return gm.train(TASK, optimizer="adamw", steps=STEPS, out=place, **options)


def unfinished(place: Path) -> Path:
    """A run that was left after some checkpoints."""

    def stop(run: gm.Run, share: float) -> None:
        if run.steps == STEPS - 2:
            raise Half

    folder.LARGEST_SHARE = math.inf
    try:
        trained(place / "run", on_step=stop)
    except Half:
        return place / "run" / folder.CHECKPOINT
    raise AssertionError("the run went on")


def alone(place: Path) -> Path:
    path = unfinished(place)
    (path.parent / folder.PREVIOUS).unlink()
    return path


def finished(place: Path) -> Path:
    trained(place / "run")
    return place / "run" / folder.MODEL


def resumed(path: Path) -> Any:
    """The weights and the metrics, without times, of the run that goes on from a copy of the folder."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copytree(path.parent, Path(place, "run")))
        run = trained(copy, resume=True)
        rows = [json.loads(line) for line in (copy / folder.METRICS).read_text().splitlines()]
        weights = load_into(net(), copy / folder.MODEL).state_dict()
        assert all(torch.equal(weights[name], t) for name, t in run.model.state_dict().items())
    return weights, [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def statistics(place: Path) -> Path:
    gm.capture(net(), [(X, Y)], gm.Objective.classification()).save(place / "statistics.safetensors")
    return place / "statistics.safetensors"


def compressed(place: Path) -> Path:
    model = net()
    model[0] = LowRank(model[0], 2)
    save_compressed(model, place / "small.safetensors")
    return place / "small.safetensors"


def planned(place: Path) -> Path:
    plan = gm.compress(net(), [(X, Y)], gm.Objective.classification(), keep=0.6)
    save_plan(plan, place / "plan.safetensors")
    return place / "plan.safetensors"


def adapter(place: Path) -> Path:
    for name, change in (("a", 0.0), ("b", 1.0)):
        w = torch.eye(9) + change * torch.outer(torch.arange(9.0), torch.ones(9))
        save_tensors(place / f"{name}.safetensors", {"layer.weight": w})
    extract_lora(place / "a.safetensors", place / "b.safetensors", 1, place / "adapter")
    return place / "adapter" / "adapter_model.safetensors"


def costs(place: Path) -> Path:
    os.environ["XDG_CACHE_HOME"] = str(place)
    return cost.keep("this", {"matmul": tuple(1e-6 * (n + 1) for n in range(len(cost.SIZES)))})


def parts(place: Path) -> Path:
    """A folder of two files and their index, as others write it."""
    safetensors.torch.save_file({"a": torch.randn(5, 4)}, place / "model-1.safetensors")
    safetensors.torch.save_file({"b": torch.randn(4, 4)}, place / "model-2.safetensors")
    index = place / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    return index


def written(name: str, write: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        write(place / name)
        return place / name

    return make


def measured(path: Path) -> Any:
    """The costs of the file; where it is refused, they are measured again."""
    found = cost._read()
    if not found:
        raise GramianError("refused")
    return found


def configured(path: Path) -> Any:
    """What the command line makes of a file of options."""
    commands: Any = typer.main.get_command(app)
    context = typer.Context(commands.commands["train"])
    read_config(context, path)
    return context.default_map


def every(path: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in open_checkpoint(path)}


def shown(path: Path) -> str:
    return gm.Report.from_json(path.read_bytes()).to_json()


TOML = (
    'task = "digits"\nsteps = 60\noptimizer = "muon"\nlr = 0.05\naugment = {shift = 1, mixup = 0.2}\nout = "runs/a"\n'
)
STATE = {"body.weight": torch.arange(40.0).reshape(5, 8), "body.bias": torch.ones(5)}

# How a file is made, and what is read of it: of gramian's own, and of others.
OWN: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "checkpoint, resumed": (unfinished, resumed),
    "the only checkpoint, resumed": (alone, resumed),
    "the previous checkpoint, resumed": (lambda place: unfinished(place).with_name(folder.PREVIOUS), resumed),
    "metrics.jsonl, resumed": (lambda place: unfinished(place).with_name(folder.METRICS), resumed),
    "model.safetensors, resumed": (finished, resumed),
    "model.safetensors, into a model": (finished, lambda path: load_into(net(), path).state_dict()),
    "checkpoint, its content": (unfinished, load_tree),
    "statistics": (statistics, lambda path: [(site.A.matrix, site.G.matrix) for site in loaded(path)]),
    "compressed model": (compressed, lambda path: load_compressed(net(), path).state_dict()),
    "plan": (planned, lambda path: load_plan(net(), path).apply().state_dict()),
    "adapter": (adapter, lambda path: every(path.parent)),
    "measured costs": (costs, measured),
}
OTHERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "safetensors": (written("x.safetensors", lambda path: safetensors.torch.save_file(STATE, path)), every),
    "torch, .pt": (written("x.pt", lambda path: torch.save(STATE, path)), every),
    "numpy, .npz": (written("x.npz", lambda path: np.savez(path, w=np.ones((4, 3)), v=np.arange(7.0))), every),
    "index of parts": (parts, lambda path: every(path.parent)),
    "layouts, JSON": (written("l.json", lambda path: path.write_text('{"a.*": "skip", "b": "m n"}')), read_layouts),
    "run, TOML": (written("run.toml", lambda path: path.write_text(TOML)), configured),
    "report, JSON": (
        written("r.json", lambda path: path.write_text(gm.inspect(net(), [(X, Y)] * 2, TASK.objective).to_json())),
        shown,
    ),
}


def loaded(path: Path) -> list[Any]:
    return [site for sites in Statistics.load(path).values() for site in sites]


def damages(whole: bytes, num: int, rng: random.Random) -> Iterator[bytes]:
    header = min(len(whole), 8 + int.from_bytes(whole[:8], "little"))
    for number in range(num):
        at = rng.randrange(header if number % 2 else len(whole))
        changed = bytearray(whole)
        kind = rng.choice(("bit", "bit", "bit", "byte", "cut", "more", "lost"))
        if kind == "bit":
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == "byte":
            changed[at] = (changed[at] + rng.randrange(1, 256)) % 256
        elif kind == "cut":
            del changed[at:]
        elif kind == "more":
            changed.insert(at, rng.randrange(256))
        else:
            del changed[at]
        if changed != whole:
            yield bytes(changed)


def same(one: Any, other: Any) -> bool:
    """Whether two readings are alike to the bit."""
    if isinstance(one, dict):
        return isinstance(other, dict) and [*one] == [*other] and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def reading(read: Callable[[Path], Any], path: Path, right: Any) -> tuple[str, str]:
    """How the reading of a damaged file ends, and its line."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = read(path)
        except GramianError as error:
            line = str(error)
            return "refused" if line.isprintable() else "crash", line
        except Exception as error:
            return "crash", f"{type(error).__name__}: {error}"
    if not same(found, right):
        return "other", ""
    return ("said" if any("damaged" in str(warning.message) for warning in told) else "same"), ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--damages", type=int, default=500, help="of each kind of file")
    parser.add_argument("--kinds", default="", help="parts of names, by commas")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ends = "refused", "said", "same", *WORST
    print(f"| file | bytes | damages | {' | '.join(ends)} | seconds |\n|{'-|' * (len(ends) + 4)}")
    wrong = 0
    for kind, (make, read) in (OWN | OTHERS).items():
        if not any(part in kind for part in arguments.kinds.split(",")):
            continue
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            path = make(Path(place))
            whole, right, count = path.read_bytes(), read(path), Counter[str]()
            for damaged in damages(whole, arguments.damages, random.Random(f"{arguments.seed} {kind}")):
                path.write_bytes(damaged)
                end, line = reading(read, path, right)
                count[end] += 1
                if end == "crash" or (end == "other" and kind in OWN):
                    wrong += 1
                    print(f"{kind}: {end}: {line[:200]}", flush=True)
        numbers = " | ".join(str(count[end]) for end in ends)
        owner = "" if kind in OWN else " (others')"
        print(
            f"| {kind}{owner} | {len(whole):,} | {count.total()} | {numbers} | {time.perf_counter() - begin:.0f} |",
            flush=True,
        )
    print(f"\n{wrong} wrong")


if __name__ == "__main__":
    main()
