"""Diagnosers that the bench compares, each `(setup) -> list of findings`, best first, in a file of its own."""

from __future__ import annotations

from dataclasses import dataclass

DIAGNOSERS = {
    "gramian": "gramian.bench.faults.diagnosers.gramian:diagnose",
    "detect_anomaly": "gramian.bench.faults.diagnosers.anomaly:diagnose",
    "hook checklist": "gramian.bench.faults.diagnosers.checklist:diagnose",
    "loss curve": "gramian.bench.faults.diagnosers.curve:diagnose",
}
"""Name in the table: the function, as `--diagnose` takes it."""


@dataclass(frozen=True)
class Told:
    """A finding of a baseline."""

    code: str
    where: str = ""
    severity: str = "error"
