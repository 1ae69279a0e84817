"""Benchmarks that anybody can run: gramian on this machine, against the peers that are installed."""

from gramian.bench.calibration import keep_calibration
from gramian.bench.machine import features
from gramian.bench.table import BENCHES, Goal, Measurement, Row, as_json, run, show
from gramian.bench.timing import interleaved

__all__ = [
    "BENCHES",
    "Goal",
    "Measurement",
    "Row",
    "as_json",
    "features",
    "interleaved",
    "keep_calibration",
    "run",
    "show",
]
