"""Runs the demo for several seeds, each in a fresh process: accuracy, parameters, processor time, peak memory.

python benchmarks/demo_seeds.py                         # seeds 0, 1, 2 at depth 100: about 5 minutes
python benchmarks/demo_seeds.py --depth 1000 --seeds 0
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("logistic", "untreated", "trained", "compressed", "affine")


def run(depth: int, classes: int, seed: int) -> dict:
    """Run `gramian demo` once and return its summary, with the process's processor time."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "gramian", "demo", "--quiet", "--depth", str(depth)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*command, "--classes", str(classes), "--seed", str(seed), "--out", out], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        summary = json.loads((Path(out) / "summary.json").read_text())
    # The peak over all child processes so far, which is this one's if it is the largest.
    return summary | {"processor_seconds": round(seconds, 1), "peak_gib": round(after.ru_maxrss / 2**20, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=100)
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    rows = []
    print("seed  " + "  ".join(f"{c:>10s}" for c in COLUMNS) + "  iso+adamw   kept  seconds   GiB")
    for seed in args.seeds:
        row = run(args.depth, args.classes, seed)
        rows.append(row)
        cells = "  ".join(f"{row['accuracy_' + c]:10.2%}" for c in COLUMNS)
        kept = row["parameters_compressed"] / row["parameters"]
        adamw = row["accuracy_grid"]["isometric + adamw"]
        print(
            f"{seed:4d}  {cells}  {adamw:9.2%}  {kept:5.1%}  {row['processor_seconds']:7.1f}  {row['peak_gib']:4.2f}",
            flush=True,
        )
    print("mean  " + "  ".join(f"{mean(r['accuracy_' + c] for r in rows):10.2%}" for c in COLUMNS))
    RESULTS.mkdir(exist_ok=True)
    name = f"demo_seeds_{args.depth}" + ("" if args.classes == 2 else f"_{args.classes}")
    (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
