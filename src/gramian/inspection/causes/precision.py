"""Causes in the dtype of the weights: float16 holds neither Adam's ε nor its squared gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import torch

from gramian.errors import some
from gramian.inspection.causes.context import SHOWN, Context
from gramian.report import Finding

__all__ = ["RULES", "gradient_overflow"]

# Largest number that float16 rounds to zero, and the largest share of a weight that is lost when it is added.
ZERO, LOST = 2.0**-25, 2.0**-11
# Autograd's name of a change of dtype.
CAST = "to_copy"
# Share of the gradients from which on all layers are named.
MOST = 0.3
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


def gradient_overflow(
    bad: Sequence[str], total: int, evidence: str, derivative: tuple[str, str] | None, *, is_narrow: bool
) -> Finding:
    """The finding about gradients that are not finite behind a forward pass that is.

    Args:
        bad: parameters with such gradients; none where the gradients are not known, and the output was not finite.
        total: of the gradients.
        evidence: what was seen.
        derivative: module and operation that make the first such gradient, if they were found.
        is_narrow: whether numbers are float16 or bfloat16 somewhere.

    Returns: the finding.
    """
    title = (
        f"The gradients of {len(bad)} parameters are not finite"
        if bad
        else "The output is not finite, and was when the pass was repeated"
    )
    if derivative is not None and derivative[1] == CAST:  # which has a derivative of one
        derivative, is_narrow = None, True
    if derivative is None:
        where = "all layers" if len(bad) > MOST * total else some(bad, SHOWN)
        cause = "The loss, its gradient or an earlier batch of this step left the range of the dtype"
        cause += " (65,504 for float16)." if is_narrow else ", or the derivative of the loss is infinite."
        advice = "Lower the loss scale, or use bfloat16; t" if is_narrow else "Look at what the loss is given; t"
        advice += "orch.autograd.detect_anomaly names the operation."
    else:
        module, operation = derivative
        where = module or "the model's own forward"
        title += f", from the derivative of {operation} on"
        cause = f"The gradient goes into the derivative of {operation} finite, and comes out NaN or infinite (exact): "
        cause += "it left the range of its dtype (65,504 for float16), " if is_narrow else ""
        cause += "a derivative is infinite where its function is finite (√0, ‖0‖, 0⁰, arccos 1), or 0 · ∞ was "
        cause += "computed for values that torch.where then drops."
        advice = "Keep the argument away from that point: an ε inside of the root or the norm, a clamp before it, and "
        advice += "torch.where on the argument in place of the result."
    return Finding("gradient-overflow", "error", title, where=where, evidence=evidence, cause=cause, advice=advice)


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (float16_weights,)
