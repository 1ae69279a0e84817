"""Train for thirty steps and look at the losses, as one looks at a plot."""

from __future__ import annotations

import math

import torch

from gramian.bench.faults.diagnosers import Told
from gramian.bench.faults.setup import Setup

STEPS = 30


def diagnose(setup: Setup) -> list[Told]:
    """Not finite or rising: too high a rate; flat: too low a rate; far above ln C at the start: too large a head."""
    try:
        losses = setup.train(STEPS)
    except (RuntimeError, IndexError, ValueError) as error:
        return [Told("labels-out-of-range" if "arget" in str(error) else "graph-cut")]
    if not math.isfinite(losses[0]):
        return [Told("loss-non-finite")]
    classes = int(torch.cat([y.flatten() for _, y in setup.batches]).max()) + 1
    start, end = losses[0], sum(losses[-5:]) / 5
    if not math.isfinite(end) or end > 1.5 * max(start, math.log(classes)):
        return [Told("rate-too-high")]
    found = []
    if start > 3 * math.log(classes):
        found.append(Told("head-scale", "head", "warning"))
    if end > 0.97 * start:
        found.append(Told("rate-too-low", severity="warning"))
    return found
