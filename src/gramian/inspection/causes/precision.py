"""Causes in the dtype of the weights: float16 holds neither Adam's ε nor its squared gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import median

import torch

from gramian.inspection.causes.context import SHOWN, Context
from gramian.report import Finding

__all__ = ["RULES"]

# Largest number that float16 rounds to zero, and the largest share of a weight that is lost when it is added.
ZERO, LOST = 2.0**-25, 2.0**-11
# β₂ of Adam, where no optimizer says it.
BETA2 = 0.999


def float16_weights(context: Context) -> Iterator[Finding]:
    """Find float16 weights that an optimizer is to train, in float16 as it computes."""
    names = [n for n, p in context.parameters.items() if p.dtype == torch.float16 and p.requires_grad]
    moved = [n for n in names if n in context.groups] if context.optimizer is not None else names
    if not moved:
        return
    groups = [context.groups[n] for n in moved if n in context.groups]
    adam = [g for g in groups if "betas" in g and float(g.get("eps", 1.0)) <= ZERO]
    sizes = [g for n in moved if (g := context.observed.gradients.get(n)) is not None and math.isfinite(g)]
    least = math.sqrt(ZERO / (1 - (adam[0]["betas"][1] if adam else BETA2)))
    told = f"{len(moved)} of {len(context.parameters)} parameters are float16 (exact)"
    if sizes:
        told += f"; (1 − β₂) g² is zero in float16 where g is below {least:.1g}, and the median gradient is "
        told += f"{median(sizes):.1e}"
    trains = context.optimizer is not None or context.model.training
    yield Finding(
        "parameter-float16",
        "error" if adam else "warning" if trains else "info",
        f"The weights are float16, in which Adam's ε of {adam[0]['eps']:g} is zero"
        if adam
        else f"{len(moved)} parameters that are trained are float16",
        where="all layers" if len(moved) == len(context.parameters) else ", ".join(moved[:SHOWN]),
        evidence=told,
        cause="Adam divides by √v + ε, and both are zero: its steps are infinite or NaN. Of other optimizers' steps, "
        f"what is below {LOST:.1g} of a weight is lost.",
        advice="Keep the weights in float32, and compute in float16 under torch.autocast with a GradScaler; or use "
        "bfloat16.",
        source="Micikevicius et al. 1710.03740, §3.1",
    )


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (float16_weights,)
