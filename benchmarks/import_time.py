"""What importing costs beside torch: `python benchmarks/import_time.py`.

Processor seconds of new processes, one thread, the statements taken in turns so that a busy machine slows all alike;
the median of each, and the median of its ratio to torch's in the same turn.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

TURNS = 5
STATEMENTS = (
    "import torch",
    "import torch, gramian",
    "import torch, gramian.linalg",
    "import torch, gramian.optim",
    "import torch, gramian as gm; gm.inspect, gm.train, gm.compress, gm.capture",
)
COMMANDS = (["--version"], ["--help"], ["inspect", "--help"])


def seconds(*arguments: str) -> float:
    """Processor seconds of a new Python, its own start included."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
    before = os.times()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    turns = [[seconds("-c", statement) for statement in STATEMENTS] for _ in range(TURNS)]
    for place, statement in enumerate(STATEMENTS):
        found = statistics.median(turn[place] for turn in turns)
        ratio = statistics.median(turn[place] / turn[0] for turn in turns)
        print(f"{found:6.2f} s  {ratio:5.3f}  {statement}")
    for command in COMMANDS:
        found = statistics.median(seconds("-m", "gramian", *command) for _ in range(TURNS))
        print(f"{found:6.2f} s         gramian {' '.join(command)}")


if __name__ == "__main__":
    main()
