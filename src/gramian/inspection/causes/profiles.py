"""Causes in the slope of a loss along its outputs: a wrong sign, or no minimum."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gramian.inspection.causes.context import Context
from gramian.inspection.causes.loss import maximized
from gramian.report import Finding

__all__ = ["RULES"]


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


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (profile, choices)
