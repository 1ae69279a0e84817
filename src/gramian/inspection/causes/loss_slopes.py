"""Causes in the slope of a loss along its outputs: a wrong sign, or no minimum."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gramian.inspection.causes.context import Context
from gramian.inspection.causes.loss import maximized
from gramian.report import Finding

__all__ = ["RULES"]

# Share of the largest worth of a choice above which an entropy's factor is no rounding.
SMALL = 1e-4


def profile(context: Context) -> Iterator[Finding]:
    """Find outputs along which the loss has no minimum, or which larger labels push down. Measured."""
    found, probes = context.probes.profile, context.probes
    if found is None or probes.supervision or probes.falls or probes.plunges or any(True for _ in maximized(context)):
        return
    low, high = (f"{v:.2g}" for v in found.slopes)
    which = (
        f"column {found.column} of the outputs {found.shape}"
        if len(found.shape) > 1 and found.shape[1] > 1
        else f"the outputs {found.shape}"
    )
    if found.kind == "reversed":
        yield Finding(
            "loss-reversed",
            "error",
            f"Larger values of {found.label} push the outputs down",
            where="loss",
            evidence=f"the slope of the loss along {which} rises with {found.label} for all of 16 samples, and is "
            f"{low} far below and {high} far above, or zero at minus the labels (measured)",
            cause="The sign of a term, or of the whole loss, is wrong: outputs move away from what they should follow.",
            advice="Correct the sign, so that the loss is least where outputs follow the labels.",
        )
        return
    yield Finding(
        "loss-unbounded",
        "error",
        f"The loss falls without end along {which}",
        where="loss",
        evidence=f"its slope is {low} with these 6 lower and {high} with these 6 higher, for all samples of one sign "
        "or the same at all places (measured with the outputs alone)",
        cause="A term is missing or has the wrong sign: that of a variance, a normalization or a square.",
        advice="Write the likelihood down term by term: each output needs one that holds it on either side.",
    )


def choices(context: Context) -> Iterator[Finding]:
    """Find rewards that lower the scores of their actions, or that move the scores of other actions. Measured."""
    found = context.probes.choices
    if found is None:
        return
    if found.columns is not None:
        one, other = found.columns
        yield Finding(
            "pairs-mismatched",
            "error",
            f"{found.choice} chooses column {one}, and {found.reward} moves column {other} of the scores",
            where="loss",
            evidence=f"with other values of {found.reward} for every other sample, of the scores {found.shape} the "
            "same other columns change for each choice (measured)",
            cause="Indices are shifted or exchanged between the choice and the gather: off by one, or another order.",
            advice="Gather the scores with the choices as they are: scores.gather(1, choice[:, None]).",
        )
        return
    yield Finding(
        "loss-reversed",
        "error",
        f"Larger values of {found.reward} lower the scores of {found.choice}",
        where="loss",
        evidence=f"with a large value in place of a small one for every other sample, the gradient by the score of its "
        f"choice, of the scores {found.shape}, rises, and by no other (measured)",
        cause="The sign of the loss is wrong: the probability of what was good falls. If the numbers are costs, of "
        "which less is better, all is well.",
        advice="Minimize −log p(action) · advantage, or the square of Q(action) − target.",
        source="Williams 1992",
    )


def entropy(context: Context) -> Iterator[Finding]:
    """Find policies whose entropy counts for more than what came of their choices, or is drawn to zero. Measured."""
    found = context.probes.policy
    if found is None:
        return
    evidence = (
        f"by the scores {found.shape}, drawn at random, the gradient is that of log p({found.choice}), times "
        f"{found.worth:.3g} at most, and {abs(found.entropy):.3g} times that of the entropy (fitted, exact to 10⁻³)"
    )
    if found.entropy > found.worth:
        yield Finding(
            "loss-term-dominates",
            "warning",
            f"The entropy's factor of {found.entropy:.3g} is larger than all that a choice is worth: up to "
            f"{found.worth:.3g}",
            where="loss",
            evidence=evidence,
            cause="The policy is drawn to equal probabilities, whatever came of its choices: the best that it can "
            "reach is softmax(advantage / factor).",
            advice="Use 0.01 or less beside advantages of about 1, and normalize these.",
            source="Mnih et al. 1602.01783, §4",
        )
    elif found.entropy < -SMALL * found.worth:
        yield Finding(
            "loss-reversed",
            "warning",
            "The loss falls as the entropy of the policy falls",
            where="loss",
            evidence=evidence,
            cause="The entropy has the wrong sign: the policy is drawn to the choices that it makes already, and stops "
            "trying others.",
            advice="Subtract the entropy: loss − 0.01 · H, where H = −(p · log p).sum().",
            source="Mnih et al. 1602.01783, §4",
        )


def attached(context: Context) -> Iterator[Finding]:
    """Find advantages through which a policy's loss moves its baseline. Exact."""
    found = context.probes.policy
    if found is None or not found.is_attached:
        return
    yield Finding(
        "target-not-detached",
        "warning",
        f"The gradient of the policy's loss goes on into the values that {found.reward} is compared with",
        where="loss",
        evidence=f"the gradient by an output of one number for each sample holds log p({found.choice}), and has a "
        "derivative by the scores (exact)",
        cause="The advantage is not detached: the values are moved to make likely choices look worth more, and not to "
        "what they estimate.",
        advice="Detach the advantage where it multiplies the log-probability: (returns − values).detach().",
        source="Mnih et al. 1602.01783, §4",
    )


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (profile, choices, entropy, attached)
