"""Merges the rows of several `gramian bench NAME --json` files of one machine: `merge.py OUT IN…`; later rows win."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from gramian.bench.learning_tasks import LEARNING
from gramian.bench.optim import MEAN_GOAL, TIME_GOAL


def merge(paths: list[Path]) -> dict:
    """Return the merged file, with the geometric mean of the times to target where all tasks are present."""
    bodies = [json.loads(path.read_text()) for path in paths]
    if any(body["bench"] != bodies[0]["bench"] or body["machine"] != bodies[0]["machine"] for body in bodies):
        sys.exit("merge: the files are of different benchmarks or machines")
    rows = {row["task"]: row for body in bodies for row in body["rows"]}
    ratios = [g["measured"] for row in rows.values() for g in row["goals"] if g["what"] == TIME_GOAL.what]
    if len(ratios) == len(LEARNING):
        mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
        goal = {"what": MEAN_GOAL.what, "relation": MEAN_GOAL.relation, "value": MEAN_GOAL.value}
        goal |= {"measured": mean, "met": MEAN_GOAL.met(mean)}
        rows["time to target: all"] = {"task": "time to target: all", "error": "", "measurements": [], "goals": [goal]}
    return {**bodies[0], "rows": list(rows.values())}


if __name__ == "__main__":
    target, *sources = map(Path, sys.argv[1:])
    target.write_text(json.dumps(merge(sources), indent=1) + "\n")
