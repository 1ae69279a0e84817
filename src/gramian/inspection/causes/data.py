"""Causes in the data: what the labels are like, and samples that mix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gramian.errors import some
from gramian.inspection.causes.context import Context
from gramian.inspection.causes.dependence import DEPENDENCE, LEAST, POWER, labels_depend
from gramian.inspection.passes.batch_roles import given_of
from gramian.inspection.passes.loss_inputs import VALUES
from gramian.report import Finding

__all__ = ["RULES", "labels_in_range", "lost_labels", "rows_of"]

# Samples from which on labels are judged.
FEW = 30

# Labels from which on, and the share of one class above which, an imbalance is told.
MANY, NEARLY_ALL = 100, 0.95

# Targets are told that are this large, and this many times as large as the outputs.
TARGETS = 30.0
# From this size on, and this many times the outputs', it is an error.
FAR = 300.0


def labels_in_range(context: Context) -> Iterator[Finding]:
    """Find labels that are no class. Exact."""
    if context.observed.labels is None:
        return
    smallest, largest, classes = context.observed.labels
    if 0 <= smallest <= largest < classes:
        return
    batch: Any = context.observed.batches[0] if context.observed.batches else None
    if _has_lengths_second(batch) and (int(batch[1].min()), int(batch[1].max())) == (smallest, largest):
        yield Finding(
            "labels-out-of-range",
            "error",
            "The second part of each batch is read as the labels, and looks like lengths",
            where="labels",
            evidence=f"it holds {smallest} to {largest}, one for each input of {batch[0].shape[1]} positions, and the "
            f"third part classes of shape {tuple(batch[2].shape)} (exact)",
            cause="A tuple is (inputs, labels, weights).",
            advice="Name the parts: a dict with the keys that the model's forward takes, and 'labels'.",
        )
    else:
        yield Finding(
            "labels-out-of-range",
            "error",
            f"Labels are {smallest} to {largest}, and there are {classes} classes",
            where="labels",
            evidence=f"classes are 0 to {classes - 1} (exact)"
            + (f"; the loss raised {type(context.observed.error).__name__}" if context.observed.error else ""),
            cause="Labels that count from one, or a head with too few outputs.",
            advice="Subtract the smallest label, or give the head an output for each class.",
        )


def _imbalanced(labels: Sequence[Tensor]) -> Iterator[Finding]:
    """Tell of classes of which one has nearly all labels, so that a constant answer is nearly always right."""
    y = _joined(labels)
    is_one_hot = labels[0].is_floating_point() and labels[0].ndim > 1 and bool((labels[0].sum(1) == 1).all())
    if len(y) < MANY or is_one_hot or not bool((y == y.round()).all()):
        return
    values, counts = y.unique(return_counts=True)
    share = float(counts.max()) / len(y)
    if share > NEARLY_ALL and len(values) <= FEW:
        most = values[counts.argmax()].item()
        yield Finding(
            "labels-imbalanced",
            "info",
            f"{share:.1%} of {len(y):,} labels are {most:g}",
            where="labels",
            evidence=f"{int(counts.max()):,} of {len(y):,}, in {len(labels)} batches (exact)",
            cause=f"Who answers {most:g} to everything is right in {share:.1%}: a network that learns no more has a "
            "small loss and a high accuracy.",
            advice="Look at the recall of the rare classes, or the Dice score, and not at the accuracy. Where it stays "
            "at zero, weigh the rare classes (weight, pos_weight), draw them more often, or use a Dice or focal loss.",
        )


def _has_lengths_second(batch: Any) -> bool:
    """Whether of three parts the second has a number of positions for each sequence, and the third classes."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 3 or not all(isinstance(t, Tensor) for t in batch):
        return False
    x, lengths, y = batch
    are_whole = not any(t.is_floating_point() or t.dtype == torch.bool for t in (lengths, y))
    if not are_whole or x.ndim < 2 or lengths.ndim != 1 or not len(x) == len(lengths) == len(y) > 0:
        return False
    return int(lengths.min()) >= 1 and int(lengths.max()) <= x.shape[1]


def labels(context: Context) -> Iterator[Finding]:
    """Judge the labels: several classes, and related to the inputs."""
    found = context.given_labels
    kept = [y for y in found if y is not None]
    if not kept or len(kept) < len(found):
        context.skipped[DEPENDENCE] = "the batches have no label for each sample"
        return
    y = _joined(kept)
    if lost := lost_labels(kept):
        yield from lost
        return
    others = [g.values for g in context.given if g.is_target and not g.is_input]
    constant = next((one for one in (y, *map(_joined, others)) if _is_constant(one)), None)
    if constant is not None:
        yield Finding(
            "labels-constant",
            "error",
            f"All {len(constant)} labels are the same",
            where="labels",
            evidence=f"every label is {constant[0].item():g} (exact)",
            cause="The loader is sorted by class, or the labels were lost.",
            advice="Shuffle the training data, and look at the labels that the loader returns.",
        )
        return
    if _are_sorted(kept):
        yield Finding(
            "labels-sorted",
            "warning",
            f"The {len(y)} labels of {len(kept)} batches come in order: {y[0].item():g} to {y[-1].item():g}",
            where="labels",
            evidence=f"each of {len(y)} labels is at least the one before it, or each at most (exact)",
            cause="The data are sorted by class and not shuffled: each batch pulls the weights to the classes that it "
            "holds.",
            advice="Shuffle the training data: DataLoader(…, shuffle=True).",
        )
    yield from _imbalanced(kept)
    if not context.are_compared:
        beside = context.beside_labels
        context.skipped[DEPENDENCE] = (
            f"the loss takes {some(beside)} too, on which they may depend"
            if beside
            else "no loss of torch is seen to take the labels"
        )
        return
    if any(g.values[0] is kept[0] for g in context.given if g.name in context.probes.made):
        context.skipped[DEPENDENCE] = "the model's inputs are made of the labels"
        return
    if context.probes.ignores_order:
        context.skipped[DEPENDENCE] = "the model takes sets, whose neighbors nothing tells"
        return
    if context.has_learned:
        context.skipped[DEPENDENCE] = "the network predicts them already"
        return
    test = labels_depend(*rows_of(context, kept))
    if test is None:
        num = sum(map(len, kept))
        few = f"{num} samples, and {LEAST} or more are needed"
        context.skipped[DEPENDENCE] = few if num < LEAST else "no test is for inputs and labels of these kinds"
    elif test.p_value > test.level and test.linear_power < POWER:
        context.skipped[DEPENDENCE] = f"too few samples for so many features: {test.evidence}"
    elif test.p_value > test.level:
        yield Finding(
            "labels-independent",
            "warning" if test.are_independent else "info",
            "The labels do not depend on the inputs, as far as simple tests see",
            where="labels",
            evidence=test.evidence,
            cause="Inputs and labels were shuffled apart, or joined by the wrong index."
            if test.are_independent
            else "Inputs and labels were shuffled apart, or joined by the wrong index; or these samples are too few "
            "for relations that are no linear ones.",
            advice="Look at a few samples beside their labels. Relations that no neighborhood or linear test sees "
            "(parity, copying) also look like this.",
        )


def rows_of(context: Context, labels: list[Tensor]) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The inputs and labels of each batch, of those beyond the first few too where these are in memory.

    Args:
        context: what was seen.
        labels: those of the first few batches.
    """
    seen = context.observed
    inputs = [given.name for given in context.given if given.is_input]
    label = next((given.name for given in context.given if given.values[0] is labels[0]), "")
    of = {given.name: given.values for given in given_of([*seen.batches, *context.further], seen.fed, set())}
    if not context.further or not inputs or not {*inputs, label} <= of.keys():
        return context.given_inputs, labels
    return [list(one) for one in zip(*(of[name] for name in inputs), strict=True)], of[label]


def lost_labels(batches: Sequence[Tensor]) -> list[Finding]:
    """The finding for labels that are no numbers, where there are some. Exact.

    Args:
        batches: the labels of each.
    """
    y = _joined(batches)
    lost = int((~y.isfinite()).sum()) if y.is_floating_point() else 0
    if not lost:
        return []
    return [
        Finding(
            "labels-non-finite",
            "error",
            f"{lost} of {len(y)} labels are NaN or infinite",
            where="labels",
            evidence=f"{lost} values in {len(batches)} batches (exact)",
            cause="The targets have missing values; the loss and every gradient are lost with them.",
            advice="Drop those samples, or leave them out of the loss.",
        )
    ]


def _joined(batches: Sequence[Tensor]) -> Tensor:
    """The labels of all batches, in a row; of classes, those that count."""
    y = torch.cat([one.detach().reshape(-1).cpu() for one in batches])
    return y if y.is_floating_point() else y[y >= 0]


def _is_constant(y: Tensor) -> bool:
    """Whether there are many labels, and all are the same."""
    if len(y) < FEW:
        return False
    if y.is_floating_point():
        return float(y.std()) <= 1e-7 * float(y.abs().amax() + 1e-30)
    return bool((y == y[0]).all())


def _are_sorted(batches: Sequence[Tensor]) -> bool:
    """Whether class labels never fall, or never rise, from the first of several batches to the last."""
    if len(batches) < 2 or any(y.is_floating_point() or y.ndim != 1 for y in batches):
        return False
    steps = torch.cat([y.cpu() for y in batches]).diff()
    return len(steps) >= FEW and bool((steps >= 0).all() or (steps <= 0).all())


def size_of_targets(context: Context) -> Iterator[Finding]:
    """Find numbers to be predicted that are far larger than what the network puts out."""
    for found in context.observed.criteria:
        target, output = found.target, found.given
        if found.function not in VALUES or not target.is_floating_point() or not target.numel():
            continue
        if not bool(target.isfinite().all()):
            continue
        size, made = (float(t.double().square().mean().sqrt()) for t in (target, output))
        if not (size > TARGETS and size > TARGETS * made):
            continue
        yield Finding(
            "labels-scale",
            "error" if size > FAR * max(made, 1.0) else "warning",
            f"The targets' root mean square is {size:.3g}, that of the outputs {made:.2g}",
            where="labels",
            evidence=f"mean {float(target.double().mean()):.3g}, standard deviation {float(target.double().std()):.3g}",
            cause="The targets are in units that the network was not initialized for: it first has to learn their mean "
            "and scale, in steps as small as the rate.",
            advice="Standardize the targets: subtract their mean over the training data and divide by their standard "
            "deviation.",
        )


def mixed(context: Context) -> Iterator[Finding]:
    """Find outputs that depend on the other samples of the batch."""
    by, before = (context.evaluated.mixed_by, context.evaluated.before) if context.evaluated is not None else (None, "")
    if by is not None and not context.observed.changed:  # else each pass gets other inputs
        yield Finding(
            "samples-mixed",
            "error" if context.evaluated is None or context.evaluated.is_labeled else "warning",
            "The output for a sample depends on the other samples of the batch",
            where=", ".join(n for n in (before, by) if n) or "all layers",
            evidence="in evaluation mode, with another first and last sample the outputs of the others change: that of "
            f"{by or 'the model'} does" + (f", and that of {before} before it does not" if before else ""),
            cause="A softmax, mean, reshape or recurrence runs over the samples: a wrong dim, a transpose, or "
            "batch_first.",
            advice=f"Look at the dimensions in {by or 'the model'}"
            + (f" and between {before} and it" if before else "")
            + ", unless samples are meant to be compared.",
        )


def changed(context: Context) -> Iterator[Finding]:
    """Find tensors of a batch that a pass writes into. Exact."""
    names = context.observed.changed
    if names:
        yield Finding(
            "input-changed",
            "error",
            f"A pass writes into {some(names)}",
            where="data",
            evidence=f"{'its' if len(names) == 1 else 'their'} values are others after the loss was computed (exact)",
            cause="An operation in place, as x -= 1 or x.clamp_(), changes the data set itself where a batch is a view "
            "of it: from the second epoch on, the network is trained on other data.",
            advice="Write x = x - 1 in place of x -= 1, or begin with x = x.clone().",
        )


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (changed, labels_in_range, labels, size_of_targets, mixed)
