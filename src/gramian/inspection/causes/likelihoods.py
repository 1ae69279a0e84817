"""Causes in likelihoods: what is given to a loss of probabilities is none, or one over the wrong dimension."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from gramian.inspection.causes.context import Context
from gramian.inspection.passes.records import Criterion
from gramian.report import Finding

__all__ = ["RULES"]

# Numbers are log-probabilities if their exponentials sum to one this closely.
SUMS = 1e-2
# Share of samples with no or several classes from which on it is told.
SEVERAL = 0.1
# Share of sequences that do not fit from which on it is told, where their loss is made zero.
UNFIT = 0.1


def log_probabilities(context: Context) -> Iterator[Finding]:
    """Find a negative log-likelihood that is applied to something else than log-probabilities. Exact."""
    if _wrong_dimension(context) is not None:
        return  # told by `dimension`
    for function in ("kl_div", "ctc_loss"):
        found = context.criterion(function)
        if found is not None:
            yield from _divergence(found)
            return
    found = context.criterion("nll_loss")
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
            cause="nll_loss takes the output of log_softmax. Of other scores it has no minimum: they grow without end.",
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
    fits = [dim for dim, s in sums.items() if float((s.abs() > SUMS).float().mean()) <= 0.5]
    if fits:
        target = found.target.float()
        others = [dim for dim in sums if target.shape == given.shape and _normalized(target, dim)]
        if function == "kl_div" and others and not set(fits) & set(others):
            yield Finding(
                "loss-not-log-probabilities",
                "error",
                "kl_div is given probabilities over one dimension, and a target of them over another",
                where="loss",
                evidence=f"its input sums to one over dimension {fits[-1]}, and its target over {others[0]} (exact)",
                cause="One of the two softmaxes has the wrong dim: the scores of one class compete with each other.",
                advice="Use softmax(dim=-1) for both.",
            )
            return
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


def dimension(context: Context) -> Iterator[Finding]:
    """Find probabilities that sum to one over another dimension than that of the classes. Exact."""
    found = _wrong_dimension(context)
    if found is None:
        return
    criterion, axis, dim = found
    what = "samples" if dim == (1 if criterion.function == "ctc_loss" else 0) else "positions"
    yield Finding(
        "loss-not-log-probabilities",
        "error",
        f"{criterion.function} is given probabilities over the {what}, and not over the classes",
        where="loss",
        evidence=f"of its input {tuple(criterion.given.shape)}, the probabilities sum to one over dimension {dim}, and "
        f"the classes are dimension {axis} (exact)",
        cause=f"A softmax or log_softmax has dim={dim}: the scores of one class compete with each other.",
        advice="Use cross_entropy of the scores, without a softmax."
        if criterion.function != "ctc_loss"
        else "Use log_softmax(scores, dim=-1).",
    )


def _wrong_dimension(context: Context) -> tuple[Criterion, int, int] | None:
    """A loss of classes, their dimension, and the other one over which its input is normalized."""
    for function in ("nll_loss", "cross_entropy", "ctc_loss"):
        found = context.criterion(function)
        if found is None or found.given.ndim < 2 or not bool(found.given.isfinite().all()):
            continue
        axis = 1 if function != "ctc_loss" else found.given.ndim - 1
        if _normalized(found.given, axis):
            continue
        for dim in range(found.given.ndim):
            if dim != axis and found.given.shape[dim] > 1 and _normalized(found.given, dim):
                return found, axis, dim
    return None


def _normalized(given: Tensor, dim: int) -> bool:
    """Whether the entries along a dimension are probabilities, or their logarithms."""
    given = given.float()
    if bool((given <= 0).all()):
        return bool((given.logsumexp(dim).abs() < SUMS).all())
    return bool((given >= 0).all()) and bool(((given.sum(dim) - 1).abs() < SUMS).all())


def one_class(context: Context) -> Iterator[Finding]:
    """Find targets of several classes for each sample under a loss of one. Exact."""
    found = context.criterion("cross_entropy")
    of_one = found is not None
    if found is None:
        found = context.criterion("binary_cross_entropy")
        axis = -1
        if found is None or found.given.ndim < 2 or found.given.shape[-1] < 2 or not _normalized(found.given, axis):
            return
    else:
        axis = 1 if found.given.ndim > 1 else 0
    target = found.target
    if target.shape != found.given.shape or not bool(((target == 0) | (target == 1)).all()):
        return
    several = float((target.sum(axis) != 1).float().mean())
    if several <= SEVERAL:
        return
    yield Finding(
        "loss-double-softmax",
        "error",
        "The loss expects one class for each sample, and the targets have none or several",
        where="loss",
        evidence=f"of {several:.0%} of the rows, the targets' entries, 0 or 1, do not sum to 1 (exact)",
        cause="cross_entropy takes a softmax, whose probabilities sum to one: two classes of one sample compete, and a "
        "sample without a class has no effect."
        if of_one
        else "The network ends with a softmax, whose probabilities sum to one: two classes of one sample compete.",
        advice="Use binary_cross_entropy_with_logits of the scores" + ("." if of_one else ", without the softmax."),
    )


def probabilities(context: Context) -> Iterator[Finding]:
    """Find targets of a binary cross-entropy that are no probabilities. Exact."""
    for function in ("binary_cross_entropy_with_logits", "binary_cross_entropy"):
        found = context.criterion(function)
        if found is None or not found.target.numel():
            continue
        target = found.target.float()
        low, high = float(target.min()), float(target.max())
        if low < 0 or high > 1:
            yield Finding(
                "labels-out-of-range",
                "error",
                f"{function} is given targets from {low:.3g} to {high:.3g}, and takes probabilities",
                where="labels",
                evidence=f"{float(((target < 0) | (target > 1)).float().mean()):.1%} of the targets are outside of "
                "0 to 1 (exact)",
                cause="A mask of 0 and 255, labels of −1 and 1, or classes by number: the loss then has no minimum, "
                "and falls the farther the scores are from zero.",
                advice="Divide a mask by its largest value; turn labels of −1 and 1 into 0 and 1; use cross_entropy "
                "for classes by number.",
            )
            return


def sequences(context: Context) -> Iterator[Finding]:
    """Find a blank among the labels of ctc_loss, and labels that do not fit into their inputs. Exact."""
    found = context.observed.sequences
    if found is None:
        return
    if found.blanks:
        yield Finding(
            "labels-out-of-range",
            "error" if found.inside else "warning",
            f"ctc_loss has blank={found.blank}, and {found.blank} is among the labels",
            where="labels",
            evidence=f"{found.blanks:,} of {found.num_labels:,} labels within their lengths are {found.blank}, "
            f"{found.inside or 'none'} of them before another label (exact)",
            cause="The blank stands for no label, and decoding drops it: this label is never read."
            if found.inside
            else "Padding counts as labels: the lengths of the targets are those of the padded rows.",
            advice="Count labels from one, with a score more in the network, or give blank= a class that is no label."
            if found.inside
            else "Give the lengths without padding as target_lengths.",
        )
    if found.unfit and (not found.are_zeroed or found.unfit > UNFIT * found.num):
        yield Finding(
            "labels-ignored" if found.are_zeroed else "labels-out-of-range",
            "error" if not found.are_zeroed or 2 * found.unfit > found.num else "warning",
            f"{found.unfit} of {found.num} sequences of labels do not fit into their inputs",
            where="labels",
            evidence="labels, and a blank between two that are equal, are more than input_lengths says (exact)",
            cause="ctc_loss of such is infinite"
            + (", and zero_infinity=True makes it zero: nothing is learned from them." if found.are_zeroed else "."),
            advice="Shorten inputs by less before the loss, look at the order of the two lengths, or leave out what "
            "does not fit.",
        )


def mixtures(context: Context) -> Iterator[Finding]:
    """Find mixtures whose weights sum to one over the samples in place of the components. Exact."""
    shape = context.observed.mixture_over_samples
    if shape is None or not context.has_label_each(shape[0]):
        return
    yield Finding(
        "samples-mixed",
        "error",
        "The weights of a mixture are a softmax over the samples, and not over the components",
        where="loss",
        evidence=f"of the weights {tuple(shape)}, dimension 0 sums to one, and the sum of what they weigh is over "
        f"dimension 1; there are {shape[0]} samples (exact)",
        cause="Samples compete for each component, and the density of none sums to one.",
        advice="Use dim=-1 in the softmax.",
    )


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (
    log_probabilities,
    dimension,
    one_class,
    probabilities,
    sequences,
    mixtures,
)
