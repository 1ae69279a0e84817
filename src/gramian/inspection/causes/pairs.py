"""Causes in what is compared with what: samples, and embeddings of a pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gramian.inspection.causes.context import Context
from gramian.inspection.experiments.contrastive_losses import Contrast
from gramian.report import Finding

__all__ = ["RULES"]


def rows(context: Context) -> Iterator[Finding]:
    """Find numbers of a sample that are compared with another's output, or with all. Exact."""
    found = context.probes.rows
    if found is None or context.observed.broadcast is not None:
        return
    if found.kind == "all":
        yield Finding(
            "loss-broadcast",
            "error",
            f"The loss compares every output with every number of {found.label}",
            where="loss",
            evidence=f"another value of one sample in {found.label} {found.shapes[0]} changes the gradients of all "
            f"outputs {found.shapes[1]}, by the same or whatever the order of the samples (measured)",
            cause="Each output is compared with all targets, by broadcasting, or outputs are averaged over the samples "
            "before they are compared.",
            advice="Give both the same shape, and compare sample by sample: output.squeeze(-1), or "
            "target.unsqueeze(-1).",
        )
        return
    one, other = found.rows
    yield Finding(
        "pairs-mismatched",
        "error",
        f"The loss compares the output of a sample with {found.label} of another",
        where="loss",
        evidence=f"other values of sample {one} in {found.label} change the gradient of output {other} alone (exact)",
        cause="Outputs or targets are rolled, shuffled, sorted or reversed before they are compared.",
        advice="Compare both in the order of the batch.",
    )


def contrast(context: Context) -> Iterator[Finding]:
    """Find losses of embeddings that pull together what is not alike. Measured."""
    found = context.probes.contrast
    if found is None:
        return
    if found.kind == "alike":
        yield _alike(found)
        return
    if found.kind == "labels":
        yield _reversed(found)
        return
    is_of_pairs = found.kind == "pairs"
    yield Finding(
        "pairs-mismatched",
        "error",
        "The loss is lower where embeddings of different samples are equal than where those of a pair are"
        if is_of_pairs
        else "Of three inputs the loss pulls together the two that are less alike",
        where="loss",
        evidence=f"with random embeddings, {found.here:.3g} where the two of each pair are equal, and "
        f"{found.there:.3g} where each equals that of the sample {found.shift} behind (measured)"
        if is_of_pairs
        else "with random embeddings, the loss is lowest where those of the first and the "
        f"{('', 'second', 'third')[found.shift]} are equal; the first is more like the other (p < 1e-6)",
        cause="The sign is wrong, or what is alike and what is not are exchanged, shifted or shuffled.",
        advice="Let the loss be lowest where the embeddings of what belongs together are equal.",
    )


def _alike(found: Contrast) -> Finding:
    which = ("", "second", "third")[found.shift]
    return Finding(
        "pairs-mismatched",
        "warning",
        f"Of three inputs the loss pushes the {which} away, which is as much like the first as the other is",
        where="data",
        evidence=f"the second is nearer to its first than to that of the next sample by {found.here:.3g} of its "
        f"variance, the third by {found.there:.3g}, and neither by more than the other (p > 0.05)",
        cause="What is to be different was drawn from the same class or neighborhood as what is to be alike.",
        advice="Draw negatives from other classes or samples; if hard ones are chosen on purpose, all is well.",
    )


def _reversed(found: Contrast) -> Finding:
    return Finding(
        "loss-reversed",
        "error",
        f"The loss pulls together pairs of label {found.shift}, and those of the other label are alike",
        where="loss",
        evidence=f"with random embeddings, it is lower with equal ones where the label is {found.shift}, and higher "
        "where it is the other; inputs of a pair are nearer than those of other pairs, as shares of the variance, "
        f"by {found.here:.3g} with that label (by chance), and {found.there:.3g} with the other (p < 1e-6)",
        cause="The loss and the data have opposite conventions of which label says that two are alike.",
        advice="Exchange the two terms, or take one minus the label.",
    )


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (rows, contrast)
