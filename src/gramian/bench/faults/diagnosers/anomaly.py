"""torch.autograd.detect_anomaly around a few training steps: it speaks where a backward function makes a NaN."""

from __future__ import annotations

import warnings

import torch

from gramian.bench.faults.diagnosers import Told
from gramian.bench.faults.setup import Setup

STEPS = 5


def diagnose(setup: Setup) -> list[Told]:
    """What the error says: the name of a backward function, and that it returned NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.autograd.detect_anomaly():
                setup.train(STEPS)
        except RuntimeError as error:
            if "returned nan values" in str(error):
                return [Told("loss-non-finite", "", "error")]
        except (IndexError, ValueError):  # labels out of range: torch says so without anomaly detection
            return [Told("labels-out-of-range", "", "error")]
    return []
