"""Measures the costs of `gramian.linalg.engine.cost` at every size, for longer than a first call may."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from gramian.linalg.engine.cost import DEFAULTS, SIZES, cache_file, forget, keep, machine
from gramian.linalg.engine.measuring import measure

SECONDS = 0.25
"""Time spent on each operation of each size; at least two runs are made whatever they take."""


def keep_calibration(tell: Callable[[str], None] = lambda what: None) -> Path:
    """Measures every operation, on the GPU too if there is one, in half a minute; writes the file that `linalg` reads.

    `tell` is called with the name of each operation before it is measured. Returns the path of the file.
    """
    path = cache_file()
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        found = {}
        for name in DEFAULTS[device].factors:
            if name != "bfloat16":  # for directions, which the defaults decide
                tell(f"{device} {name}")
                found |= measure([name], sizes=SIZES, seconds=SECONDS, device=device)
        path = keep(machine(device), found)
    forget()
    return path
