"""Causes in the loss: what it is applied to, and where it starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gramian.inspection.causes.context import Context
from gramian.inspection.observed import Criterion
from gramian.report import Finding

__all__ = ["RULES"]

# Share of the targets outside the range of the output from which on it is told.
OUTSIDE = 0.2
# Numbers are log-probabilities if their exponentials sum to one this closely.
SUMS = 1e-2


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
    elif bool((logits.abs() <= 1).all()):
        function = next((f for f in ("sigmoid", "tanh") if _ends_with(context, f, logits.shape[-1])), None)
        if function is not None:
            yield Finding(
                "loss-double-softmax",
                "warning",
                f"Cross-entropy is applied to scores between {'-1' if function == 'tanh' else '0'} and 1",
                where="loss",
                evidence=f"all {logits.numel():,} scores are in this range (exact)",
                cause=f"The network ends with a {function}, so that scores hardly differ, and the loss stays near "
                "guessing.",
                advice="Remove the activation after the last layer.",
            )


def binary_scores(context: Context) -> Iterator[Finding]:
    """Find a binary cross-entropy of scores that is applied to probabilities. Exact."""
    found = _criterion(context, "binary_cross_entropy_with_logits")
    ends = context.observed.ends
    if found is None or ends is None or ends.function not in ("sigmoid", "softmax"):
        return
    if bool((found.given >= 0).all()) and bool((found.given <= 1).all()):
        yield Finding(
            "loss-double-sigmoid",
            "error",
            "A loss of scores is applied to probabilities",
            where="loss",
            evidence=f"the network ends with a {ends.function}, and all {found.given.numel():,} of its outputs go to "
            "binary_cross_entropy_with_logits (exact)",
            cause="The loss takes another sigmoid: no probability can be below 0.5 or above 0.73.",
            advice=f"Remove the {ends.function} at the end of the network.",
        )


def log_probabilities(context: Context) -> Iterator[Finding]:
    """Find a negative log-likelihood that is applied to something else than log-probabilities. Exact."""
    for function in ("kl_div", "ctc_loss"):
        found = _criterion(context, function)
        if found is not None:
            yield from _divergence(found)
            return
    found = _criterion(context, "nll_loss")
    if found is None or found.given.ndim < 2 or not bool(found.given.isfinite().all()):
        return
    sums = found.given.float().logsumexp(1)
    wrong = float((sums.abs() > SUMS).float().mean())
    if wrong > 0.5 and bool((found.given > 0).any()):  # a weighted log-probability is never positive
        yield Finding(
            "loss-not-log-probabilities",
            "error",
            "nll_loss is applied to numbers that are no log-probabilities",
            where="loss",
            evidence=f"the exponentials of the scores sum to {float(sums.exp().median()):.3g} for the median row, not "
            "to 1 (exact)",
            cause="nll_loss takes the output of log_softmax. Of other scores it has no minimum: they grow without end."
            if not _is_over_rows(found.given)
            else "The log-softmax is over the samples, and not over the classes.",
            advice="Use cross_entropy, or log_softmax(scores, dim=1) before it.",
        )


def _divergence(found: Criterion) -> Iterator[Finding]:
    """The finding for kl_div or ctc_loss of something else than log-probabilities, or against log-probabilities."""
    given, function = found.given.float(), found.function
    if given.ndim < 2 or not bool(given.isfinite().all()):
        return
    # kl_div does not know which dimension holds the classes: each is tried, and one that fits is enough.
    dims = range(given.ndim) if function == "kl_div" else (given.ndim - 1,)
    sums = {dim: given.logsumexp(dim) for dim in dims if given.shape[dim] > 1}
    if any(float((s.abs() > SUMS).float().mean()) <= 0.5 for s in sums.values()):
        if function == "kl_div" and bool((found.target < 0).any()):
            yield Finding(
                "loss-not-log-probabilities",
                "error",
                "kl_div is given a target of log-probabilities, and takes probabilities",
                where="loss",
                evidence=f"{float((found.target < 0).float().mean()):.0%} of the target's entries are negative (exact)",
                cause="The target's entropy is computed as that of probabilities: of negative ones it is NaN.",
                advice="Pass log_target=True, or target.exp().",
            )
        return
    is_probability = bool((given >= 0).all()) and any(bool(((given.sum(dim) - 1).abs() < SUMS).all()) for dim in sums)
    if not is_probability and not bool((given > 0).any()):
        return  # a weighted or masked log-probability is never positive
    advice = "Use log_softmax(scores, dim=-1), or probabilities.log()"
    yield Finding(
        "loss-not-log-probabilities",
        "error",
        f"{function} is applied to " + ("probabilities" if is_probability else "numbers that are no log-probabilities"),
        where="loss",
        evidence=f"the exponentials of the inputs sum to {float(sums[max(sums)].exp().median()):.3g} for the median "
        "row, not to 1 (exact)",
        cause=f"{function} takes log-probabilities as its input. Of others it has no minimum: they grow without end."
        if not is_probability
        else f"{function} takes log-probabilities as its input; probabilities cannot fall below zero, and the loss has "
        "its minimum where the largest is 1, whatever the target.",
        advice=f"{advice}." if function == "kl_div" else "Use log_softmax(scores, dim=-1) before it.",
    )


def rows(context: Context) -> Iterator[Finding]:
    """Find losses that join each output with every target, or normalize over the samples. Exact."""
    found = context.observed.broadcast
    if found is not None:
        yield Finding(
            "loss-broadcast",
            "error",
            f"The loss compares every output with every target: {tuple(found.left)} with {tuple(found.right)}",
            where="loss",
            evidence=f"{found.function} of these shapes gives a matrix of all pairs (exact)",
            cause="A dimension of 1 is broadcast. The best that the network can do is the mean of the targets.",
            advice="Give both the same shape: output.squeeze(-1), or target.unsqueeze(-1).",
        )
    shape = context.observed.softmax_over_rows
    if shape is not None and context.num_labels == shape[0]:
        yield Finding(
            "samples-mixed",
            "error",
            "The loss takes a softmax over the samples, and not over the classes",
            where="loss",
            evidence=f"softmax over the first dimension of {tuple(shape)}, of {shape[0]} samples (exact)",
            cause="The scores of each class sum to one over the batch.",
            advice="Use dim=1, or dim=-1.",
        )


def output_range(context: Context) -> Iterator[Finding]:
    """Find targets that the last function of the network cannot reach. Exact."""
    ends, output, target = context.observed.ends, context.observed.output, context.targets
    if ends is None or output is None or target is None or target.numel() != output.numel():
        return
    outside = (target < ends.low) | (target > ends.high)
    share = float(outside.float().mean())
    if share > OUTSIDE:
        yield Finding(
            "output-range",
            "error",
            f"{share:.0%} of the targets are outside the range of the output",
            where="loss",
            evidence=f"the network ends with {ends.function}, of values in [{ends.low:g}, {ends.high:g}]; targets are "
            f"{float(target.min()):.3g} to {float(target.max()):.3g} (exact)",
            cause="Outputs at an end of the range get no gradient.",
            advice=f"Remove the {ends.function} at the end, or scale the targets into its range.",
        )


def single_softmax(context: Context) -> Iterator[Finding]:
    """Find a softmax over one value at the end. Exact."""
    ends, output = context.observed.ends, context.observed.output
    if ends is not None and ends.function == "softmax" and output is not None and ends.size == 1:
        yield Finding(
            "softmax-single-value",
            "error",
            "The network ends with a softmax over one value, which is always 1",
            where="loss",
            evidence=f"its dimension has one entry, and the output the shape {tuple(output.shape)} (exact)",
            cause="A softmax divides by the sum over its dimension, which has one entry: no gradient passes.",
            advice="Use a sigmoid, or no function and a loss of scores.",
        )


def training_fails(error: str) -> Iterator[Finding]:
    """The finding for a training step that raises, in a model that runs in evaluation mode."""
    yield Finding(
        "training-fails",
        "error",
        "A training step fails, and evaluation mode does not",
        where="training step",
        evidence=error,
        cause="What runs in training mode only cannot take these batches; a batch norm cannot take one value for each "
        "channel.",
        advice="Run a training step by hand to see where; use larger batches (drop_last=True) for batch norms.",
    )


def _criterion(context: Context, function: str) -> Criterion | None:
    return next((c for c in context.observed.criteria if c.function == function), None)


def _is_over_rows(given: Tensor) -> bool:
    return given.ndim == 2 and bool((given.float().logsumexp(0).abs() < SUMS).all())


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
    if parameters or any(t.is_floating_point() and not bool(t.isfinite().all()) for t in context.labels):
        return  # said by the rules for parameters and labels
    yield Finding(
        "loss-non-finite",
        "error",
        f"The first value that is not finite is made by {made[1]}" if made else "The loss is NaN or infinite",
        where=where,
        evidence=f"the loss is {context.observed.loss}"
        + (
            f"; in {context.told(made[0])}, the inputs of {made[1]} are finite and its output is not (exact)"
            if made
            else ""
        ),
        cause="An overflow, a division by zero, or the logarithm or root of zero.",
        advice="Look at this operation's inputs; bound them, or compute in float32."
        if made
        else "Look at what the loss is given.",
    )


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (
    scores,
    binary_scores,
    log_probabilities,
    rows,
    output_range,
    single_softmax,
    non_finite,
)
