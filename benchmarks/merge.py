"""Merges the rows of several `gramian bench NAME --json` files of one machine: `merge.py OUT IN…`; later rows win."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def merge(paths: list[Path]) -> dict:
    """Return the merged file."""
    bodies = [json.loads(path.read_text()) for path in paths]
    if any(body["bench"] != bodies[0]["bench"] or body["machine"] != bodies[0]["machine"] for body in bodies):
        sys.exit("merge: the files are of different benchmarks or machines")
    rows = {row["task"]: row for body in bodies for row in body["rows"]}
    return {**bodies[0], "rows": list(rows.values())}


if __name__ == "__main__":
    target, *sources = map(Path, sys.argv[1:])
    target.write_text(json.dumps(merge(sources), indent=1) + "\n")
