"""The kinds of faults: one planter each, entered into one table."""

from gramian.bench.faults.kinds import of_data, of_modules, of_optimizers, of_weights, of_wiring  # noqa: F401
from gramian.bench.faults.kinds.table import CAUSES, KINDS, Kind, Planted, kind

__all__ = ["CAUSES", "KINDS", "Kind", "Planted", "kind"]
