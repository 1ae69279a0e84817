"""Labels that belong to other samples or places, of whatever loss, and labels of padding that count."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from gramian.inspection.causes.alignment import places_depend
from gramian.inspection.causes.context import Context
from gramian.inspection.causes.data import rows_of
from gramian.inspection.causes.dependence import DEPENDENCE, labels_depend
from gramian.report import Finding

__all__ = ["RULES"]

# Scores from here down are masked where the others of their row are below this share of them; so large is the loss.
MASKED, SMALL = -1e4, 1e-2


def paired(context: Context) -> Iterator[Finding]:
    """Find labels that do not depend on the inputs, beside those that `labels` tests."""
    names = context.probes.labels
    if not names or context.has_learned or context.observed.changed:
        return
    tested = context.given_labels[0] if context.given_labels and context.are_compared else None
    inputs = context.given_inputs
    for given in context.given:
        y = given.values
        if given.name not in names or len(inputs) != len(y):
            continue
        evidence, aligned, is_seen = "", "", False
        if y[0].ndim == 1 or (y[0].ndim == 2 and y[0].is_floating_point() and y[0].shape[1] == 1):
            if tested is y[0] or context.probes.ignores_order:
                continue
            test = labels_depend(*rows_of(context, y))
            is_seen = test is not None and (test.are_independent or test.p_value <= test.level)
            evidence = test.evidence if test is not None and test.are_independent else ""
        elif len(inputs[0]) == 1:
            place = places_depend([one[0] for one in inputs], y)
            is_seen = place is not None
            if place is not None and place.are_independent:
                samples, places = place.num
                aligned = place.aligned
                what = f"of {samples} samples with {places} places, labels go with what stands at their place"
                evidence = (
                    f"{what} by {place.z:.1f} deviations more than those of other samples do"
                    if aligned
                    else f"{what}, with it and the label before, and on average, no more than those of other samples "
                    f"do: {place.z:.1f} deviations above chance, and 2 would be seen"
                )
        if is_seen:
            context.skipped.pop(DEPENDENCE, None)
        if evidence:
            yield Finding(
                "labels-independent",
                "warning",
                f"The labels {given.name} go with the inputs if they are taken {aligned}"
                if aligned
                else f"The labels {given.name} do not depend on the inputs, as far as simple tests see",
                where="labels",
                evidence=evidence + (f"; taken {aligned}, by over twice as many, with p < 1e-9" if aligned else ""),
                cause="Inputs and labels were shuffled apart, or joined by the wrong index or in the wrong order.",
                advice="Look at a few samples beside their labels.",
            )
            return


def padded(context: Context) -> Iterator[Finding]:
    """Find padding that counts in the loss as one of the classes. Exact."""
    found = context.probes.counted
    if found is None or context.observed.changed:
        return
    padding = "have the token padding_idx" if found.is_known else "are filled by one token at the ends of rows"
    yield Finding(
        "padding-read",
        "info" if found.is_end else "warning",
        f"Padding counts in the loss, as class {found.label}",
        where="labels",
        evidence=f"{found.padded:,} of {found.num:,} positions {padding}, all with {found.label} in "
        f"{found.name}, and the loss has a gradient there (exact)",
        cause="Labels were padded with a number that is a class, so that the network learns to tell padding, and the "
        "loss and the accuracy are better than they are."
        + (" This is as it should be where the padding token is what ends a text." if found.is_end else ""),
        advice="Pad labels with -100, the ignore_index of torch's cross-entropy, or leave these positions out.",
    )


def shifted(context: Context) -> Iterator[Finding]:
    """Find next tokens that the loss shifts once more. Exact."""
    name = context.probes.shifted
    if name:
        yield Finding(
            "labels-independent",
            "error",
            f"The labels {name} are the next tokens already, and the loss shifts them again",
            where="labels",
            evidence="each label is the input one place on, and the scores of the last place have no gradient (exact)",
            cause="Each place is compared with the token after the next: the batch and the loss both shift.",
            advice="Give the tokens as labels where the loss shifts them, as Hugging Face's models and "
            "Objective.next_token do with a dict; or the pair (tokens, next tokens).",
        )


def masked(context: Context) -> Iterator[Finding]:
    """Find targets of a cross-entropy whose scores are masked. Exact on the first call."""
    for found in context.observed.criteria:
        scores, target = found.given, found.target
        if found.function not in ("cross_entropy", "nll_loss") or target.is_floating_point() or scores.ndim < 2:
            continue
        rows, labels = scores.movedim(1, -1).flatten(0, -2).float(), target.flatten()
        is_class = (labels >= 0) & (labels < rows.shape[1])
        asked = rows.gather(1, labels.clamp(0, rows.shape[1] - 1)[:, None])[:, 0]
        others = torch.where(rows > MASKED, rows.abs(), 0.0).amax(1)
        are_hidden = is_class & (asked <= MASKED) & (others < SMALL * -asked)
        # Rows that do not count, as those of padding, may have any target.
        if not bool(are_hidden.any()) or context.observed.loss < SMALL * -MASKED:
            continue
        num = int(are_hidden.sum())
        places = torch.arange(len(labels), device=labels.device)[are_hidden]
        are_own = rows.shape[0] == rows.shape[1] and torch.equal(labels[are_hidden], places)
        yield Finding(
            "labels-out-of-range",
            "error",
            "The loss asks each row for itself, which is masked"
            if are_own
            else f"The loss asks for classes whose scores are masked, in {num} of {len(rows)} rows",
            where="loss",
            evidence=f"the scores of {num} targets are {float(asked[are_hidden].max()):.3g} or less, and others of "
            f"these rows up to {float(others[are_hidden].max()):.3g}; the loss is {context.observed.loss:.3g} (exact)",
            cause="The target is what the mask hides: of a contrast of all pairs it is to be the other view of the "
            "sample, and not the diagonal."
            if are_own
            else "Mask and target contradict each other: what is masked has no probability, and no gradient that "
            "another score could follow.",
            advice="Of N pairs, the target of row i of (2N, 2N) is (i + N) % 2N."
            if are_own
            else "Take the targets out of the mask, or leave these rows out with ignore_index.",
        )
        return


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (paired, padded, shifted, masked)
