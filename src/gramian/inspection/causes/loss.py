"""Causes in the loss: what it is applied to, and where it starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from gramian.inspection.causes.context import Context
from gramian.report import Finding

__all__ = ["RULES"]

# A loss this many times above that of guessing, with scores this large, starts in the saturated range of the softmax.
START, SPREAD = 2.0, 8.0


def scores(context: Context) -> Iterator[Finding]:
    """Judge what cross-entropy is applied to: probabilities, or rectified scores. Exact."""
    logits = context.observed.logits
    if logits is None or logits.shape[-1] < 2 or not bool(logits.isfinite().all()):
        return
    sums = logits.sum(-1)
    if bool((logits >= 0).all()) and bool((sums - 1).abs().max() < 1e-3):
        yield Finding(
            "loss-double-softmax",
            "error",
            "Cross-entropy is applied to probabilities, not to scores",
            where="loss",
            evidence=f"all {len(logits)} rows are nonnegative and sum to one (exact)",
            cause="The network ends with a softmax, and cross-entropy takes another. Gradients are small, and the loss "
            f"cannot fall below {math.log(1 + (logits.shape[-1] - 1) / math.e):.3g}.",
            advice="Remove the softmax at the end of the network.",
        )
    elif bool((logits >= 0).all()) and _ends_with(context, "relu", logits.shape[-1]):
        yield Finding(
            "loss-rectified",
            "error",
            "Cross-entropy is applied to scores after a ReLU",
            where="loss",
            evidence=f"no score is negative, and {float((logits == 0).float().mean()):.0%} are exactly zero",
            cause="The network ends with a ReLU: scores cannot become negative, and zero ones get no gradient.",
            advice="Remove the activation after the last layer.",
        )
    elif bool((logits >= 0).all()) and bool((logits <= 1).all()) and _ends_with(context, "sigmoid", logits.shape[-1]):
        yield Finding(
            "loss-double-softmax",
            "warning",
            "Cross-entropy is applied to scores between 0 and 1",
            where="loss",
            evidence=f"all {logits.numel():,} scores are in [0, 1] (exact)",
            cause="The network ends with a sigmoid: scores differ by at most one, so the loss stays near guessing.",
            advice="Remove the activation after the last layer.",
        )


def _ends_with(context: Context, function: str, num_classes: int) -> bool:
    """Whether this activation, of as many channels as there are classes follows the last parameter."""
    seen = context.observed
    last = max(seen.used.values(), default=0)
    after = [a for a in seen.activations if a.order > last and a.channels == num_classes]
    return any(function in a.function for a in after)


def non_finite(context: Context) -> Iterator[Finding]:
    """Find a loss that is not finite, and the operation that made the first such value."""
    made = context.observed.first_non_finite
    if math.isfinite(context.observed.loss) and made is None:
        return
    where = made[0] if made and made[0] else "loss"
    parameters = [n for n, p in context.parameters.items() if not bool(torch.isfinite(p.detach()).all())]
    if parameters:
        return  # said by the rule for parameters
    yield Finding(
        "loss-non-finite",
        "error",
        f"The first value that is not finite is made by {made[1]}" if made else "The loss is NaN or infinite",
        where=where,
        evidence=f"the loss is {context.observed.loss}; "
        + (f"in {where}, the inputs of {made[1]} are finite and its output is not (exact)" if made else ""),
        cause="An overflow, a division by zero, or the logarithm or root of zero.",
        advice="Look at this operation's inputs; bound them, or compute in float32.",
    )


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (scores, non_finite)
