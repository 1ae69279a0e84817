"""gramian sees a network as its matrices: it diagnoses, repairs, trains and compresses PyTorch models.

Names are imported at their first use, so that `import gramian` costs nothing and `gramian.linalg` imports only torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from gramian import errors, init, integrations, linalg, operators, optim, prox, random, report, tasks
    from gramian.block import Block, Blocks, Layout, blocks
    from gramian.compression import (
        NarrowPlan,
        Plan,
        compress,
        load_compressed,
        load_plan,
        narrow,
        refit,
        save_compressed,
        save_plan,
    )
    from gramian.gram import DiagonalGram, Gram
    from gramian.inspection import watch
    from gramian.objective import Objective
    from gramian.optim.learning_rate import LearningRate
    from gramian.optim.suggestion import suggest_lr
    from gramian.recording import capture, capturing
    from gramian.remedies import inspect
    from gramian.report import Report
    from gramian.statistics import Statistics
    from gramian.training import Healed, Run, Task, heal, train

__all__ = [
    "Block",
    "Blocks",
    "DiagonalGram",
    "Gram",
    "Healed",
    "Layout",
    "LearningRate",
    "NarrowPlan",
    "Objective",
    "Plan",
    "Report",
    "Run",
    "Statistics",
    "Task",
    "blocks",
    "capture",
    "capturing",
    "compress",
    "errors",
    "heal",
    "init",
    "inspect",
    "integrations",
    "linalg",
    "load_compressed",
    "load_plan",
    "narrow",
    "operators",
    "optim",
    "prox",
    "random",
    "refit",
    "report",
    "save_compressed",
    "save_plan",
    "suggest_lr",
    "tasks",
    "train",
    "watch",
]

_HOME = {
    "Block": "block",
    "Blocks": "block",
    "DiagonalGram": "gram",
    "Gram": "gram",
    "Healed": "training",
    "Layout": "block",
    "LearningRate": "optim.learning_rate",
    "NarrowPlan": "compression",
    "Objective": "objective",
    "Plan": "compression",
    "Report": "report",
    "Run": "training",
    "Statistics": "statistics",
    "Task": "training",
    "blocks": "block",
    "capture": "recording",
    "capturing": "recording",
    "compress": "compression",
    "heal": "training",
    "inspect": "remedies",
    "load_compressed": "compression",
    "load_plan": "compression",
    "narrow": "compression",
    "refit": "compression",
    "save_compressed": "compression",
    "save_plan": "compression",
    "suggest_lr": "optim.suggestion",
    "train": "training",
    "watch": "inspection",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"gramian.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in __all__ or (not name.startswith("_") and importlib.util.find_spec(f"gramian.{name}")):
        return importlib.import_module(f"gramian.{name}")
    raise AttributeError(f"module 'gramian' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
