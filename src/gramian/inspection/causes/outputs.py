"""Causes in a loss as a function of its outputs: where it is least, and whether labels have a say in that."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gramian.errors import some
from gramian.inspection.causes.context import Context
from gramian.inspection.causes.loss import maximized, output_range
from gramian.report import Finding

__all__ = ["RULES"]


def _is_told(context: Context) -> bool:
    """Whether another rule has found in which direction the loss is wrong."""
    probes = context.probes
    told = (probes.supervision, probes.falls, probes.plunges, probes.profile, probes.choices, probes.contrast)
    return any(one is not None for one in told) or any(True for _ in maximized(context))


def determinant(context: Context) -> Iterator[Finding]:
    """Find log-determinants that a loss raises, or leaves out. Measured."""
    found = context.probes.density
    if found is None:
        return
    evidence = (
        "one output is log |det ∂z/∂x| of the other, z, by the input x, up to its sign: compared with the Jacobians of "
        f"4 samples it misses them by {found.error:.1e} at most"
    )
    if found.kind == "missing":
        yield Finding(
            "loss-collapses",
            "error",
            "The loss does not take the log-determinant that the model gives",
            where="loss",
            evidence=f"{evidence}; the gradient of the loss by it is zero (exact)",
            cause="Without it, the likelihood is largest where all inputs are mapped to the mode of the prior.",
            advice="Minimize −(log p(z) + log |det ∂z/∂x|).",
            source="Rezende and Mohamed 1505.05770",
        )
        return
    yield Finding(
        "loss-reversed",
        "error",
        "The loss rises with the log-determinant, and is to fall",
        where="loss",
        evidence=f"{evidence}; the slope of the loss along it is {found.slope:.2g} for all samples together",
        cause="The log-determinant has the wrong sign, in the loss or in a layer: the transformation is drawn together "
        "without an end.",
        advice="Minimize −(log p(z) + log |det ∂z/∂x|); of a model that maps z to x, its log-determinant is subtracted "
        "from log p(z).",
        source="Rezende and Mohamed 1505.05770",
    )


def peak(context: Context) -> Iterator[Finding]:
    """Find losses that are highest at the labels, and labels that are added to a loss. Measured."""
    found = context.probes.peak
    if found is None or (found.kind == "highest" and _is_told(context)):
        return
    if found.kind == "highest":
        yield Finding(
            "loss-reversed",
            "error",
            f"The loss is highest where the outputs are as {found.label} says",
            where="loss",
            evidence=f"{found.here:.3g} with the labels in place of the outputs, and at most {found.there:.3g} at 18 "
            "places around them, on all sides (measured)",
            cause="The sign is wrong, or a similarity is minimized in place of one minus it.",
            advice="Correct the sign, so that the loss is least where outputs are as the labels say.",
        )
        return
    yield Finding(
        "loss-unbounded",
        "error",
        f"Nothing is learned from {found.label}: the loss adds it up beside the outputs",
        where="loss",
        evidence=f"{found.here:.3g} with it as it is, {found.there:.3g} with other values, and all gradients by the "
        "outputs are the same; they are so wherever the outputs are (measured)",
        cause="The loss is linear in the outputs, and falls without end: a square or an absolute value of the "
        "differences is missing.",
        advice="Take the square or the absolute value of the differences.",
    )


def two_values(context: Context) -> Iterator[Finding]:
    """Find losses of two labels that do not end where outputs are right, or do not see one of them. Measured."""
    found = context.probes.two_values
    if found is None or (_is_told(context) and found.kind != "encoded"):
        return
    here, right = (f"{v:.3g}" for v in (found.losses * 2)[:2])
    low, high = (f"{v:g}" for v in found.values)
    if found.kind == "alone":
        yield Finding(
            "labels-ignored",
            "error",
            f"Outputs where {found.label} is {found.target:g} have no effect, and all others are pushed one way",
            where="loss",
            evidence="with other outputs there, far in both directions, the loss is the same (exact); the slopes of "
            "the others have one sign wherever they are",
            cause="A weight is zero, as pos_weight, or a term is missing: one output for all samples is best.",
            advice="Give both values a weight, or use binary_cross_entropy_with_logits as it is.",
        )
    elif found.kind == "even":
        yield Finding(
            "loss-flat",
            "warning",
            "The loss does not see the sign of the outputs",
            where="loss",
            evidence=f"it is {right} with outputs as {found.label} says, and the same with the opposite (exact)",
            cause="An absolute value or a square stands around the output, so that its sign says nothing of the label.",
            advice="Use the output itself, as in relu(1 − y·output) with y of −1 and 1.",
        )
    elif found.kind == "encoded":
        yield Finding(
            "labels-out-of-range",
            "error",
            f"{found.label} is {low} and {high}, and the loss takes 0 and 1",
            where="labels",
            evidence=f"the loss is {here} as it is, {right} with outputs clearly as the labels say, and "
            f"{found.losses[2]:.3g} ten times as far; with 0 and 1 in place of the labels it ends (measured)",
            cause="Of y log p + (1 − y) log(1 − p) with other labels, one factor is negative, and the loss falls "
            "without end.",
            advice="Turn the labels into 0 and 1, or use a loss of y·output.",
        )
    else:
        yield Finding(
            "loss-unbounded",
            "error",
            "The loss falls without end where outputs are as the labels say",
            where="loss",
            evidence=f"{here} as it is, {right} with outputs clearly as {found.label} says, {found.losses[2]:.3g} ten "
            "times as far (measured)",
            cause="A term has a wrong sign or no bound, so that scores grow for ever.",
            advice="Use binary_cross_entropy_with_logits of the scores.",
        )


def one_way(context: Context) -> Iterator[Finding]:
    """Find losses without labels that are least where all samples have one large output. Measured."""
    found = context.probes.one_way
    if found is None or _is_told(context) or context.probes.together is not None:
        return
    criteria = [context.criterion(f"binary_cross_entropy{end}") for end in ("_with_logits", "")]
    constant = [c for c in criteria if c is not None and float(c.target.min()) == float(c.target.max())]
    how = (
        f"all the same row, 30 times as long, {found.there:.3g}"
        if found.are_embeddings
        else "all the same and far on one side,"
    )
    yield Finding(
        "labels-constant" if constant else "loss-unbounded",
        "error",
        f"All targets that the loss makes are {float(constant[0].target.max()):g}"
        if constant
        else "The loss falls as all outputs grow, whatever the input is",
        where="labels" if constant else "loss",
        evidence=f"the loss is {found.here:.3g} as it is and, with the outputs {how} {found.there:.3g} (measured "
        "with the outputs alone)",
        cause="Nothing pushes any output the other way: negative samples are missing, or their term has the sign or "
        "the target of the positive ones. One output for all samples is best.",
        advice="Let the scores of negatives fall: softplus(score) or −logsigmoid(−score), or a target of 0.",
    )


def concave(context: Context) -> Iterator[Finding]:
    """Find losses that are concave in the outputs, which have no minimum. Measured on lines."""
    found, probes = context.probes.concave, context.probes
    if found is None or _is_told(context) or probes.peak or probes.two_values or probes.one_way or probes.together:
        return
    yield Finding(
        "loss-unbounded",
        "error",
        "The loss bends down wherever the outputs go: it has no minimum",
        where="loss",
        evidence=f"along 6 random lines through the outputs it lies above all of its chords; {found.here:.3g} as it "
        f"is, {found.below:.3g} and {found.above:.3g} at the ends of the lowest (measured)",
        cause="The sign of the loss is wrong: what is to be maximized, as a likelihood, is minimized.",
        advice="Minimize its negative.",
    )


def shortcut(context: Context) -> Iterator[Finding]:
    """Find outputs that make the loss small whatever the labels are. Measured."""
    found, probes = context.probes.shortcut, context.probes
    if found is None or _is_told(context) or probes.peak or probes.concave or probes.two_values:
        return
    numbers = some(map(str, found.columns))
    which = f"column{'s' if len(found.columns) > 1 else ''} {numbers} of " if found.columns else ""
    yield Finding(
        "loss-term-missing",
        "error",
        f"Large {'positive' if found.is_up else 'negative'} values in {which}output {found.output} make the loss "
        "small for any labels",
        where="loss",
        evidence=f"{found.here:.3g} as it is, {found.there:.3g} with these moved far for all samples; there, other "
        f"values of {found.label} hardly change the loss, and no gradient is left (measured)",
        cause="This output divides or weighs the error, and nothing keeps it from doing so without end: of a variance, "
        "its logarithm is missing.",
        advice="Add the term that grows with it: log σ² of a Gaussian, log b of a Laplace, −log c of a confidence.",
    )


def beyond(context: Context) -> Iterator[Finding]:
    """Find numbers that a loss draws outputs to, and that are beyond their range. Measured."""
    found = context.probes.beyond
    if found is None or any(True for _ in output_range(context)):
        return
    yield Finding(
        "output-range",
        "error",
        f"{found.share:.0%} of {found.label} are outside the range of the output",
        where="loss",
        evidence=f"an output ends with {found.ends.function}, of values in [{found.ends.low:g}, {found.ends.high:g}]; "
        f"{found.label} is {found.low:.3g} to {found.high:.3g}, and the loss "
        + ("is a binary cross-entropy (measured)" if found.is_binary else "is stationary there (measured)"),
        cause="The loss draws outputs to where they cannot go; at an end of their range they get no gradient.",
        advice="Of classes, give each an output of its own, and use cross_entropy; of numbers, divide them by their "
        "largest, or use a squared error."
        if found.is_binary
        else f"Remove the {found.ends.function} at the end, or scale the targets into its range.",
    )


def ignored(context: Context) -> Iterator[Finding]:
    """Find classes that a loss of one's own leaves out. Exact on 16 samples."""
    found = context.probes.ignored
    if found is None or context.observed.ungraded_labels:
        return
    yield Finding(
        "labels-ignored",
        "error" if 2 * found.silent > found.num else "warning",
        f"The loss ignores the samples of class {some(map(str, found.classes))}",
        where="loss",
        evidence=f"with other scores for {found.silent} of {found.num} samples, all those of which {found.label} says "
        "so, it is the same number (exact)",
        cause="A weight is zero, or a mask leaves them out.",
        advice="Give each class a weight.",
    )


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (
    determinant, peak, two_values, one_way, concave, shortcut, beyond, ignored,
)  # fmt: skip
