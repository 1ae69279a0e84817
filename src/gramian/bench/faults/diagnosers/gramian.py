"""gm.inspect, as its documentation calls it."""

from __future__ import annotations

import inspect as signatures
from collections.abc import Sequence
from typing import Any

from gramian.bench.faults.setup import Setup
from gramian.inspection import inspect


def diagnose(setup: Setup) -> Sequence[Any]:
    """The findings of `gm.inspect` on the setup, in its own order."""
    takes = signatures.signature(inspect).parameters
    options: dict[str, Any] = {"optimizer": setup.optimizer} if "optimizer" in takes else {}
    return inspect(setup.model, setup.batches, setup.objective, **options).findings
