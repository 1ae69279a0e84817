"""Causes in losses of one's own: what they do with labels, pairs, terms and padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gramian.errors import some
from gramian.inspection.causes.context import Context
from gramian.inspection.causes.loss import maximized
from gramian.inspection.causes.optimizer import steps
from gramian.inspection.experiments.label_response import FAR, Supervision
from gramian.report import Finding
from gramian.report.model import plural

__all__ = ["RULES"]


def _numbers(values: tuple[float, ...]) -> list[str]:
    return [f"{v:.3g}" for v in values]


def labels(context: Context) -> Iterator[Finding]:
    """Find losses that do not become lower as outputs follow the labels. Measured with the outputs alone."""
    found = context.probes.supervision
    if found is None or any(True for _ in maximized(context)):
        return
    make = {
        "dimension": _dimension, "endless": _endless, "reversed": _reversed, "alone": _alone, "one-sided": _sided,
        "flat": _flat, "unsquared": _unsquared, "shifted": _shifted,
    }[found.kind]  # fmt: skip
    finding = make(found)
    if found.kind == "dimension" and context.observed.softmax_over_rows is not None and context.num_labels:
        return  # told by `rows`
    if found.kind == "flat" and context.probes.silent is not None:
        return  # a term without a gradient, as of a threshold, is told by `terms`
    if finding.code == "loss-unbounded" and (context.probes.falls or context.probes.plunges):
        return  # told already
    yield finding


def _dimension(found: Supervision) -> Finding:
    axis, dim = found.dims
    what = "samples" if dim == 0 else "positions"
    return Finding(
        "samples-mixed" if dim == 0 else "loss-not-log-probabilities",
        "error",
        f"The loss takes probabilities over the {what}, and not over the classes",
        where="loss",
        evidence=f"of the outputs {found.shape}, {found.label} names entries of dimension {axis}; adding a number to "
        f"all scores of a class along dimension {dim} leaves the loss as it is, and adding one to all classes of a "
        "sample does not (measured)",
        cause=f"A softmax, log_softmax or logsumexp has dim={dim}: the scores of one class compete with each other.",
        advice=f"Use dim={axis}, or cross_entropy of the scores.",
    )


def _shifted(found: Supervision) -> Finding:
    one, other = (int(v) for v in found.losses)
    return Finding(
        "pairs-mismatched",
        "error",
        "The loss compares the output of a sample with the label of another",
        where="loss",
        evidence=f"another label for sample {one} in {found.label} changes the gradient of output {other} "
        "alone (exact)",
        cause="Outputs or labels are rolled, shuffled, sorted or reversed before they are compared.",
        advice="Compare both in the order of the batch.",
    )


def _endless(found: Supervision) -> Finding:
    here, wrong = _numbers((found.losses[0], found.losses[-1] if len(found.losses) == 4 else found.losses[1]))
    return Finding(
        "loss-unbounded",
        "error",
        "The loss falls without end, the farther the scores are from the labels",
        where="loss",
        evidence=f"{here} as it is, {wrong} where the scores that {found.label} calls for are {FAR:g} lower (measured)",
        cause="The sign of the loss is wrong: a minus is missing, or stands too much.",
        advice="Correct the sign: the negative logarithm of the probability of what is right.",
    )


def _reversed(found: Supervision) -> Finding:
    here, right, wrong = _numbers(found.losses[:3])
    return Finding(
        "loss-reversed",
        "error",
        "The loss is lower with outputs opposite to the labels than with those that they call for",
        where="loss",
        evidence=f"{here} as it is, {right} with outputs as {found.label} says, {wrong} with the opposite (measured)",
        cause="The sign is wrong, a similarity is minimized in place of one minus it, or the two cases of the labels "
        "are exchanged.",
        advice="Correct the sign, or exchange the cases; if outputs stand for the opposite of the labels on purpose, "
        "all is well.",
    )


def _alone(found: Supervision) -> Finding:
    here, raised = _numbers(found.losses)
    return Finding(
        "loss-not-log-probabilities",
        "error",
        "The loss takes the scores of the right classes alone, which grow without end",
        where="loss",
        evidence=f"the gradient by the scores of all other classes is zero (exact); {here} as it is, {raised} with "
        f"the right scores {FAR:g} higher",
        cause="What is taken of the scores is no log-probability: the sum over the classes is missing.",
        advice="Use cross_entropy, or log_softmax(scores, dim=-1) before it.",
    )


def _sided(found: Supervision) -> Finding:
    return Finding(
        "loss-term-missing",
        "error",
        f"Outputs where the target is {found.target} have no effect on the loss",
        where="loss",
        evidence=f"with other outputs there, far in both directions, the loss stays {found.losses[0]:.3g} (exact)",
        cause="A term is missing: of a binary cross-entropy, y log p is there and (1 − y) log(1 − p) is not, or the "
        "reverse. The same output for all samples is best.",
        advice="Add the term, or use binary_cross_entropy_with_logits.",
    )


def _flat(found: Supervision) -> Finding:
    return Finding(
        "loss-flat",
        "error",
        "The loss does not change where outputs are clearly right or wrong",
        where="loss",
        evidence=f"with outputs of two and of six, or of minus these, for either target, it is the same number, "
        f"{found.losses[-1]:.3g} (exact)",
        cause="A clamp before the logarithm or the sum has too narrow bounds: what it cuts gets no gradient.",
        advice="Clamp probabilities at 1e-7 and 1 − 1e-7 only, or use a loss of scores.",
    )


def _unsquared(found: Supervision) -> Finding:
    here, above, below = _numbers(found.losses)
    return Finding(
        "loss-unbounded",
        "error",
        "The loss falls without end as outputs move one way, past the targets",
        where="loss",
        evidence=f"{here} as it is, {above} with outputs far above the targets, {below} with outputs far below; all "
        "gradients have one sign at both places (measured)",
        cause="Differences are added up as they are, so that those below zero count as gain: a square or an absolute "
        "value is missing.",
        advice="Take the square or the absolute value of the differences.",
    )


def terms(context: Context) -> Iterator[Finding]:
    """Find terms of the loss that depend on the network and have no gradient. Exact."""
    found = context.probes.silent
    seen = context.observed
    if found is None or any(seen.gradients[n] is None for n in seen.gradients if n in seen.used):
        return  # the parameters that are cut off are told
    silent, num, value = found
    yield Finding(
        "graph-cut",
        "error",
        f"{plural(silent, 'term')} of the loss {'has' if silent == 1 else 'have'} no gradient",
        where="loss",
        evidence=f"of {num} terms; no parameter is in its graph, and its mean, {value:.3g}, changes with the "
        "parameters (exact)",
        cause="A .detach(), .item(), .data or torch.no_grad() stands before it; of a derivative, create_graph=True is "
        "missing, or it was detached. The term counts in the loss, and nothing learns from it.",
        advice="Let its gradient through, or leave it out of the loss.",
    )


def column(context: Context) -> Iterator[Finding]:
    """Find a column of the outputs that counts and has no gradient. Exact, and measured."""
    found = context.probes.column
    if found is None or context.probes.silent is not None:
        return
    which, num = found
    yield Finding(
        "graph-cut",
        "error",
        f"Of the {num} columns of the output, number {which} has no gradient, and the loss depends on it",
        where="loss",
        evidence="its gradient is zero for all samples (exact); with values a little larger or smaller the loss "
        "changes",
        cause="This part of the output is detached in the loss: it learns nothing.",
        advice="Remove .detach() there.",
    )


def bootstrapped(context: Context) -> Iterator[Finding]:
    """Find targets that are data plus another output, with its gradient. Exact."""
    if not context.observed.bootstrapped:
        return
    yield Finding(
        "target-not-detached",
        "warning",
        "A target is made of the network's own output, and has a gradient",
        where="loss",
        evidence="the loss compares an output with data plus what the same parameters make of other inputs, and "
        "gradients go to both (exact)",
        cause="Of temporal differences, r + γ Q(s′), the target is to be held fixed: else it is moved towards the "
        "output as well, which is another and slower method.",
        advice="Compute the target under torch.no_grad(), or detach it; a copy of the network that is renewed now and "
        "then keeps it still.",
        source="Mnih et al. 2015; Baird 1995 for residual gradients",
    )


def mixture(context: Context) -> Iterator[Finding]:
    """Find a loss of which some terms are sums over the samples and others means. Exact on halves of a batch."""
    found = context.probes.mixed
    if found is None:
        return
    diverges = any(finding.code == "rate-too-high" for finding in steps(context))
    yield Finding(
        "loss-summed",
        "error" if diverges or found.ratio > 1 else "info",
        f"A term of the loss is a sum over the {found.num} samples of a batch, and another is their mean",
        where="loss",
        evidence=f"the summed term of halves adds up to that of the whole; its gradient is {found.ratio:.2g} times "
        "that of the others",
        cause=f"It weighs {found.num} times as much as its mean would, and more with larger batches.",
        advice="Sum over the features and take the mean over the samples, in both terms: .flatten(1).sum(1).mean(). A "
        "mean over all entries of one of them, as F.mse_loss gives, makes it as many times smaller as it has features.",
    )


def together(context: Context) -> Iterator[Finding]:
    """Find a loss without labels that is lowest where all samples have one output. Measured with outputs alone."""
    found = context.probes.together
    if found is None or context.probes.peak is not None:
        return
    here, there = _numbers(found)
    yield Finding(
        "loss-collapses",
        "error",
        "The loss is lowest where all samples have the same output",
        where="loss",
        evidence=f"{here} as it is, {there} with one output for all, and no lower with random ones; a gradient reaches "
        "all outputs (measured)",
        cause="Nothing keeps outputs of different samples apart: pairs that are to differ are missing or are the same "
        "sample, a margin has the wrong sign, or the gradient of one side is not stopped.",
        advice="Add pairs of different samples, or a term for their variance, or detach one side (with a predictor on "
        "the other).",
    )


def pairs(context: Context) -> Iterator[Finding]:
    """Find a loss of pairs that rises where the two of each are the same. Measured."""
    found = context.probes.pairs
    if found is None:
        return
    here, first, second = _numbers((found.here, found.first, found.second))
    yield Finding(
        "pairs-mismatched",
        "error",
        "The loss rises where the two inputs of each pair are the same",
        where="loss",
        evidence=f"{here} with {some(found.names)} as they are; {first} with the first in place of both, {second} with "
        "the second (measured)",
        cause="It brings together what is of different samples, or keeps the two of a pair apart: pairs are shifted or "
        "shuffled, or the sign is wrong.",
        advice="Let the entry (i, i) of the similarities be the one that is to be large.",
    )


def padding(context: Context) -> Iterator[Finding]:
    """Find sequences that are read at their padding. Exact."""
    found = context.probes.reading
    if found is None:
        return
    if not found.is_state and not found.position:
        yield Finding(
            "padding-read",
            "error",
            f"Of {context.told(found.name)} the loss reads padding, and no token",
            where=f"loss, {found.name}",
            evidence=f"in {found.padded} of the first {found.num} sequences the gradient is not zero at padding, "
            "and in none at a token (exact)",
            cause="The mask of the loss is inverted, or is another batch's.",
            advice="Multiply the losses by ones at the tokens and zeros at the padding.",
        )
        return
    place = "the state after all positions" if found.is_state else f"position {found.position} alone"
    yield Finding(
        "padding-read",
        "warning",
        f"Of {context.told(found.name)} the loss reads {place}, which is padding in {found.padded} of {found.num} "
        "samples",
        where=found.name,
        evidence=f"the gradient is zero at all other positions (exact); {found.padded} of the first {found.num} "
        "sequences are shorter",
        cause="output[:, -1] is taken of sequences that are padded at the end, or a recurrence runs on through the "
        "padding.",
        advice="Take the last token of each: output[torch.arange(n), lengths - 1]; or pack_padded_sequence and the "
        "last state; or pad in front.",
    )


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (
    labels,
    terms,
    column,
    bootstrapped,
    mixture,
    together,
    pairs,
    padding,
)
