"""Runs the demo for several seeds, each in a fresh process: accuracy, parameters, wall-clock time, peak memory.

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
import time
from pathlib import Path
from statistics import mean

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("logistic", "untreated", "trained", "compressed", "affine")


def run(depth: int, classes: int, seed: int) -> dict:
    """Run `gramian demo` once and return its summary, with the process's wall-clock time."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "gramian", "demo", "--quiet", "--depth", str(depth)]
        begin = time.perf_counter()
        subprocess.run([*command, "--classes", str(classes), "--seed", str(seed), "--out", out], check=True)
        seconds = time.perf_counter() - begin
        summary = json.loads((Path(out) / "summary.json").read_text())
    # The peak over all child processes so far, which is this one's if it is the largest.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return summary | {"process_seconds": round(seconds, 1), "peak_gib": round(peak, 2)}


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
            f"{seed:4d}  {cells}  {adamw:9.2%}  {kept:5.1%}  {row['process_seconds']:7.1f}  {row['peak_gib']:4.2f}",
            flush=True,
        )
    print("mean  " + "  ".join(f"{mean(r['accuracy_' + c] for r in rows):10.2%}" for c in COLUMNS))
    RESULTS.mkdir(exist_ok=True)
    name = f"demo_seeds_{args.depth}" + ("" if args.classes == 2 else f"_{args.classes}")
    (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
