"""Causes in the loss: what it is applied to, and where it starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gramian.inspection.causes.context import Context
from gramian.inspection.passes.batch_roles import key
from gramian.inspection.passes.loss_inputs import VALUES
from gramian.report import Finding

__all__ = ["RULES"]

# Share of the targets outside the range of the output from which on it is told.
OUTSIDE = 0.2


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
    found, seen = context.criterion("binary_cross_entropy_with_logits"), context.observed
    if found is None:
        return
    # Of a network with several outputs, one may end with a sigmoid and another be what the loss is given.
    in_model = seen.output is not None and _of_one_memory(seen.output, found.given)
    made = [
        e for e in (seen.ends if in_model else None, seen.scores_end, found.ends)
        if e and e.function in ("sigmoid", "softmax")
    ]  # fmt: skip
    if not made:
        return
    function = made[0].function
    if bool((found.given >= 0).all()) and bool((found.given <= 1).all()):
        yield Finding(
            "loss-double-sigmoid",
            "error",
            "A loss of scores is applied to probabilities",
            where="loss",
            evidence=f"{'the network' if in_model else 'what the loss is given'} ends with a {function}, and all "
            f"{found.given.numel():,} values go to binary_cross_entropy_with_logits (exact)",
            cause="The loss takes another sigmoid: no probability can be below 0.5 or above 0.73.",
            advice=f"Remove the {function} at the end of the network."
            if in_model
            else f"Remove the {function} before the loss, or use binary_cross_entropy.",
        )


def _of_one_memory(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


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
    if ends is None or output is None or target is None:  # or of what the loss takes of it
        part = next((c for c in context.observed.criteria if c.ends is not None and c.function in VALUES), None)
        if part is None or not part.target.is_floating_point():
            return
        ends, output, target = part.ends, part.given, part.target
    if ends is None or not _fits(target.shape, output.shape):
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


def drawn_target(context: Context) -> Iterator[Finding]:
    """Find outputs that are compared with numbers which are drawn for it and used nowhere else. Exact."""
    if context.observed.drawn_target:
        yield Finding(
            "target-drawn",
            "error",
            "The loss compares an output with random numbers of which nothing else was made",
            where="loss",
            evidence=f"the target comes from {context.observed.drawn_target}, and no other operation takes it (exact)",
            cause="The noise that is to be predicted was drawn a second time, so that the input says nothing about it: "
            "the best output is its mean.",
            advice="Keep the noise with which the input was made, and compare with that.",
        )


def maximized(context: Context) -> Iterator[Finding]:
    """Find a loss of torch's that falls when its value rises, with targets of the batch. Exact.

    With targets of the user's own, it may be meant: a generator's, against a discriminator.
    """
    given = {key(one.values[0]) for one in context.given}
    pulls = {name: ends for name, ends in context.observed.pulls.items() if ends[0] < 0 or ends[1] > 0}
    for name, (low, high) in pulls.items():
        found = context.criterion(name)
        if found is None or not (low < 0 and high <= 0) or key(found.target) not in given:
            continue
        alone = len(pulls) == 1
        yield Finding(
            "loss-unbounded",
            "error" if alone else "warning",
            f"The loss falls when {name} rises",
            where="loss",
            evidence=f"the gradient of the loss by the values of {name} is {low:.2g} to {high:.2g} (exact)",
            cause="The sign is wrong: the loss that is to be minimized is maximized, without an end."
            + ("" if alone else " Of one of several terms it may be meant, against an adversary."),
            advice="Remove the minus.",
        )
        return


def _fits(target: torch.Size, output: torch.Size) -> bool:
    """Whether each output has a target, one of its own or one of its sample's."""
    if target.numel() == output.numel():
        return True
    try:
        return torch.broadcast_shapes(target, output) == output and target[:1] == output[:1]
    except RuntimeError:
        return False


def single_softmax(context: Context) -> Iterator[Finding]:
    """Find a softmax over one value, at the end or of scores that weigh positions. Exact."""
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
        return
    for name, shape in context.observed.single_softmax.items():
        yield Finding(
            "softmax-single-value",
            "error",
            f"A softmax in {context.told(name)} is over one value, and always 1",
            where=name or "all layers",
            evidence=f"of scores {shape}, which a matrix gives, its dimension has one entry (exact)",
            cause="The softmax is over the last dimension, and the weights are to sum to one over another one.",
            advice="Use the dimension of the positions, as softmax(dim=1).",
        )
        return


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


def _ends_with(context: Context, function: str, num_classes: int) -> bool:
    """Whether this activation has made the scores.

    Where torch's own loss was seen, it has made what that is given; else one with as many channels as there are classes
    follows the last parameter, and the network has one output.
    """
    seen, found = context.observed, context.criterion("cross_entropy")
    if found is not None:
        return found.ends is not None and found.ends.function.lower() == function
    last = max(seen.used.values(), default=0)
    after = [a for a in seen.activations if a.order > last and a.channels == num_classes]
    return len(seen.output_ends) < 2 and any(function in a.function for a in after)


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
    rows,
    drawn_target,
    maximized,
    output_range,
    single_softmax,
    non_finite,
)
