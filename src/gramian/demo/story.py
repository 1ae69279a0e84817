"""The settings and the results of the demo."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from gramian.compression import Plan
from gramian.report import Report
from gramian.training import Run

__all__ = ["CELLS", "KEEP", "NAMES", "RATES", "Story"]

KEEP = 0.30

# The four runs: (initialization, optimizer), the untreated network first and the repaired one last.
CELLS = (("default", "adamw"), ("default", "muon"), ("isometric", "adamw"), ("isometric", "muon"))
NAMES = {"default": "PyTorch's initialization", "isometric": "isometric", "adamw": "AdamW", "muon": "Muon"}

# Learning rates of each run at depth 100 and at depth 1000: the best on splits 100 and 101 of the data, as found by
# `python benchmarks/demo_rates.py` (benchmarks/results). Isometric Muon's best two, 0.03 and 0.1, are equal within the
# sampling noise of 500 digits, 0.3 fails, and 0.05 is between. At depth 1000 only isometric AdamW was tuned.
RATES: dict[tuple[str, str], tuple[float, float]] = {
    ("default", "adamw"): (1e-4, 1e-5),
    ("default", "muon"): (1.0, 1.0),
    ("isometric", "adamw"): (1e-5, 3e-6),
    ("isometric", "muon"): (0.05, 0.1),
}

# Steps of each run, up to depth 600: in the time of one step of Muon AdamW takes two to three.
STEPS = {"adamw": 1050, "muon": 350}


@dataclass
class Story:
    """The demo's measurements, for the report and the summary."""

    depth: int
    classes: int
    seed: int
    seconds_each: float | None
    accuracy_logistic: float = math.nan
    accuracy_affine: float = math.nan
    accuracy_compressed: float = math.nan
    before: Report | None = None
    after: Report | None = None
    runs: dict[tuple[str, str], Run] = field(default_factory=dict)
    plan: Plan | None = None
    bytes_trained: int = 0
    bytes_compressed: int = 0
    seconds: float = 0.0

    def budget(self, optimizer: str) -> dict[str, Any]:
        """Return the budget of a run, as `train` takes it."""
        if self.seconds_each is not None:
            return {"seconds": self.seconds_each}
        return {"steps": math.ceil(STEPS[optimizer] * min(1.0, 600 / self.depth))}

    def told_budget(self) -> str:
        """Return the budgets of all runs in words."""
        if self.seconds_each is not None:
            return f"{self.seconds_each:g} s of training for each run"
        return " and ".join(f"{self.budget(name)['steps']:,} steps of {NAMES[name]}" for name in STEPS)

    def accuracy(self, cell: tuple[str, str]) -> float:
        """Return the held-out accuracy at the end of one of the four runs."""
        return self.runs[cell].metrics["accuracy"]

    def summary(self) -> dict[str, Any]:
        """Return the numbers of `summary.json`."""
        assert self.plan is not None
        return {
            "accuracy_logistic": self.accuracy_logistic,
            "accuracy_untreated": self.accuracy(CELLS[0]),
            "accuracy_trained": self.accuracy(CELLS[-1]),
            "accuracy_compressed": self.accuracy_compressed,
            "accuracy_affine": self.accuracy_affine,
            "accuracy_grid": {f"{init} + {opt}": self.accuracy((init, opt)) for init, opt in CELLS},
            "parameters": self.plan.parameters_dense,
            "parameters_compressed": self.plan.parameters,
            "bytes": self.bytes_trained,
            "bytes_compressed": self.bytes_compressed,
            "steps": {f"{init} + {opt}": self.runs[init, opt].steps for init, opt in CELLS},
            "seconds_each": self.seconds_each,
            "seconds": round(self.seconds, 2),
            "depth": self.depth,
            "classes": self.classes,
            "seed": self.seed,
        }
