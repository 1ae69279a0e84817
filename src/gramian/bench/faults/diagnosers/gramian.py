"""gm.inspect, as its documentation calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gramian.bench.faults.setup import Setup
from gramian.inspection import inspect

# Codes that inspect gives to weights alone too, and the bench's words for them.
WORDS = {"non-finite-weights": "parameter-non-finite", "zero-weights": "parameter-zero"}


def diagnose(setup: Setup) -> Sequence[Any]:
    """The findings of `gm.inspect` on the setup, in its own order."""
    found = inspect(setup.model, setup.batches, setup.objective, optimizer=setup.optimizer).findings
    return [replace(finding, code=WORDS.get(finding.code, finding.code)) for finding in found]
