"""What small changes tell of a model and its loss: each is tried on the first batch, in evaluation mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from gramian.autograd import CUT_OFF, NO_GRAPH
from gramian.batch import num_samples
from gramian.inspection.experiments.affine import is_affine
from gramian.inspection.experiments.binary_labels import TwoValues, of_two_values
from gramian.inspection.experiments.blocked_inputs import are_constant, blocking_zeros
from gramian.inspection.experiments.chosen_actions import Choices, along_choices
from gramian.inspection.experiments.collapsed_outputs import Pairs, constant_loss, falls_together, unlike_pairs
from gramian.inspection.experiments.columns_without_gradient import silent_columns
from gramian.inspection.experiments.compared_rows import Rows, compared_rows
from gramian.inspection.experiments.compared_tensors import label_names
from gramian.inspection.experiments.concave_losses import Concave, is_concave
from gramian.inspection.experiments.contrastive_losses import Contrast, pulled_apart
from gramian.inspection.experiments.double_shift import shifted_twice
from gramian.inspection.experiments.flat_losses import largest_slope
from gramian.inspection.experiments.gradient_reach import cut, unlinked
from gramian.inspection.experiments.ignored_classes import Ignored, ignored_classes
from gramian.inspection.experiments.input_order import ignores_order
from gramian.inspection.experiments.inverted_masks import inverted_mask
from gramian.inspection.experiments.label_response import Supervision, against_labels
from gramian.inspection.experiments.log_determinants import Density, log_determinant
from gramian.inspection.experiments.loss_profiles import Profile, along_outputs
from gramian.inspection.experiments.loss_terms import Mixed, mixed_terms, silent_terms
from gramian.inspection.experiments.maximum_at_labels import Peak, at_labels
from gramian.inspection.experiments.mixing_reshapes import Recut, recut
from gramian.inspection.experiments.paired_tensors import Together, made_into_inputs, rows_together
from gramian.inspection.experiments.policy_losses import Policy, policy_terms
from gramian.inspection.experiments.read_padding import Counted, Reading, counts_padding, reads_padding
from gramian.inspection.experiments.replay import Asked
from gramian.inspection.experiments.shortcuts import OneWay, Shortcut, one_way, shortcut
from gramian.inspection.experiments.target_ranges import Beyond, beyond_range
from gramian.inspection.experiments.unbounded_losses import falls, plunges
from gramian.inspection.experiments.unused_arguments import unheard_arguments
from gramian.inspection.experiments.unused_inputs import (
    Idle,
    Unused,
    idle_half,
    idle_targets,
    without_columns,
    without_effect,
)
from gramian.inspection.passes.signal import in_words
from gramian.inspection.passes.step_records import Observed
from gramian.objective import Objective
from gramian.recording.measuring import eager, evaluating
from gramian.report.formatting import plural

__all__ = ["Probes", "probe", "untried"]

TRIED = {
    "unlinked": "whether parameters without a gradient change the loss",
    "cut": "whether a gradient reaches all positions",
    "is_affine": "whether the network is an affine map",
    "sum_over": "whether the loss is a sum over the batch",
    "falls": "whether the loss has a minimum",
    "plunges": "whether the loss falls faster than the outputs grow",
    "without_effect": "whether each input has an effect",
    "idle": "whether both halves of each input have an effect",
    "idle_targets": "whether the loss takes all labels",
    "ignores_order": "whether the output depends on the order of tokens or patches",
    "supervision": "whether the loss is lower where the outputs are as the labels say",
    "column": "whether all columns of the output have a gradient",
    "silent": "whether a term of the loss has no gradient",
    "mixed": "whether terms of the loss are sums and others means",
    "together": "whether the loss has its minimum where all outputs are equal",
    "pairs": "whether the loss falls where the two of a pair are the same",
    "reading": "whether the loss reads a sequence at its padding",
    "profile": "whether the loss has a minimum along each output",
    "choices": "whether larger rewards raise the scores of their actions",
    "policy": "what a policy's loss is made of",
    "rows": "whether the loss compares each sample with itself",
    "contrast": "what a loss of embeddings pulls together",
    "labels": "which tensors the loss compares outputs with",
    "columns": "whether each column of the input has an effect",
    "slope": "whether the loss has a slope at all",
    "density": "whether an output is a log-determinant, and lowers the loss",
    "peak": "whether the loss is highest at its labels, or adds them up",
    "two_values": "whether the loss has an end where outputs are as labels of two values say",
    "one_way": "whether a loss without labels is least with one large output for all samples",
    "concave": "whether the loss bends down on all sides",
    "shortcut": "whether an output makes the loss small for any labels",
    "beyond": "whether the loss draws outputs beyond their range",
    "ignored": "whether a loss of one's own leaves classes out",
    "recut": "whether a reshape gives an axis another place",
    "share_of_constant": "the loss with equal outputs for all samples",
    "together_rows": "what the loss takes of each row of a batch",
    "made": "of which tensors the loss makes inputs",
    "unheard": "whether each argument has an effect",
    "inverted": "whether a mask hides what is no padding",
    "blocking": "whether matrices of zeros keep the outputs from the inputs",
    "is_constant": "whether samples get different outputs",
    "counted": "whether padding counts in the loss",
    "shifted": "whether next tokens are shifted twice",
}
"""What a report says of a change that could not be tried."""

# Samples that are enough for a property of the model.
ENOUGH = 8
# Outputs that differ by less than this share of what differs between samples are equal up to rounding.
EQUAL = 1e-4
# The share by which halves of a batch may miss the whole's sum.
SUM = 1e-3


@dataclass(frozen=True)
class Probes:
    """What was found; each has the value of a healthy model where it could not be tried.

    Attributes:
        unlinked: parameters without a gradient whose values change the loss.
        cut: of a sequence, how many positions have no gradient though the loss depends on them, how many there are,
            and the module whose output was looked at.
        is_affine: whether the model's output, before a function at its end, is an affine function of its input.
        sum_over: the number of samples, where the loss of a batch is the sum of those of its halves; else 0.
        falls: losses where the output is far below, as it is, and far above, where it is lower at both ends.
        plunges: the loss as it is, and with the outputs a little and far down its gradient, where it has no minimum.
        without_effect: the inputs that can be exchanged between samples without any effect on the loss; of none that
            has one, those whose NaN do not arrive.
        idle: a half of an input's positions or columns that has no effect.
        idle_targets: what of the batch neither the model nor the loss takes, where parameters get no gradient.
        ignores_order: whether the output stays, or changes places too, when the positions of a sequence change places.
        supervision: what the loss does wrong with its labels.
        column: of the outputs, one without a gradient that the loss depends on, and how many there are.
        silent: how many terms have no gradient though they depend on the parameters, of how many, and the first's mean.
        mixed: of a loss with terms that are sums over the samples and others that are means.
        together: the loss as it is, and with equal outputs for all samples, where it has its minimum there.
        pairs: losses of pairs, where it rises with equal ones.
        reading: where the loss reads one position, which is padding.
        profile: where the loss has no minimum along an output, or larger labels push it down.
        choices: what is wrong between choices, what came of them, and their scores.
        policy: the parts of a policy's loss.
        rows: numbers of a sample that are compared with other outputs than its own.
        contrast: embeddings that are pulled together, and are of other samples.
        labels: the tensors that the model is not given, and with which alone an output is compared.
        columns: of an input of few columns, its name, those without an effect, and how many there are.
        slope: the largest sum of its gradients by outputs, as they are and drawn.
        density: what is wrong with the log-determinant of another output.
        peak: where the loss is highest at its labels, or adds them up.
        two_values: what is wrong with labels of two values.
        one_way: the loss with one large output for all samples, where it takes no labels and is least there.
        concave: the loss at the ends of a line, where it lies above all its chords.
        shortcut: a part of the outputs that makes the loss small for any labels.
        beyond: a range that ends before the labels.
        ignored: classes that a loss of one's own leaves out.
        recut: a reshape that gives an axis another place.
        share_of_constant: the loss over that with the same output for all samples.
        together_rows: which tensors of a batch the loss takes row by row.
        made: tensors of which the loss makes what it gives the model.
        unheard: arguments of the model that change no output.
        inverted: an input that is read at its padding alone, the mask, and how many samples have padding.
        blocking: matrices of zeros that keep the outputs from depending on the inputs.
        is_constant: whether all samples get the same outputs in evaluation mode.
        counted: padding whose labels are one class, and count.
        shifted: labels that are the next tokens, and are shifted by the loss.
    """

    unlinked: tuple[str, ...] = ()
    cut: tuple[int, int, str] | None = None
    is_affine: bool = False
    sum_over: int = 0
    falls: tuple[float, float, float] | None = None
    plunges: tuple[float, float, float] | None = None
    without_effect: Unused = field(default_factory=lambda: Unused(()))
    idle: Idle | None = None
    idle_targets: tuple[str, ...] = ()
    ignores_order: bool = False
    supervision: Supervision | None = None
    column: tuple[int, int] | None = None
    silent: tuple[int, int, float] | None = None
    mixed: Mixed | None = None
    together: tuple[float, float] | None = None
    pairs: Pairs | None = None
    reading: Reading | None = None
    profile: Profile | None = None
    choices: Choices | None = None
    policy: Policy | None = None
    rows: Rows | None = None
    contrast: Contrast | None = None
    labels: tuple[str, ...] = ()
    columns: tuple[str, tuple[int, ...], int] | None = None
    slope: float | None = None
    density: Density | None = None
    peak: Peak | None = None
    two_values: TwoValues | None = None
    one_way: OneWay | None = None
    concave: Concave | None = None
    shortcut: Shortcut | None = None
    beyond: Beyond | None = None
    ignored: Ignored | None = None
    recut: Recut | None = None
    share_of_constant: float | None = None
    together_rows: Together | None = None
    made: tuple[str, ...] = ()
    unheard: tuple[str, ...] = ()
    inverted: tuple[str, str, int] | None = None
    blocking: tuple[str, ...] = ()
    is_constant: bool = False
    counted: Counted | None = None
    shifted: str | None = None


def probe(model: nn.Module, observed: Observed, objective: Objective) -> tuple[Probes, dict[str, Exception]]:
    """Try each of the changes.

    Args:
        model: left as it was.
        observed: of this model.
        objective: gives the loss.

    Returns: a `Probes`, and what could not be tried, with the error.
    Cost: a forward pass of 16 samples, and some more of these where inputs or parameters are changed, as those of
        sequences are.
    """
    found: dict[str, Any] = {}
    failed: dict[str, Exception] = {}
    asked, modules = Asked(model, observed, objective), list(model.modules())
    with evaluating(model), eager():
        for what, one in zip((f.name for f in fields(Probes)), _PROBES, strict=True):
            try:
                value = one(asked)
            except Exception as error:  # batches of one size, or a loss that needs a gradient
                failed[what] = error
            else:
                found |= {} if value is None else {what: value}
            if any(module.training for module in modules):  # whatever the loss has set
                model.eval()
    return Probes(**found), failed


def untried(failed: Mapping[str, Exception], objective: Objective) -> dict[str, str]:
    """What a report says was not tried, and why; in one line all that a loss of derivatives by inputs excludes.

    Args:
        failed: of `probe`.
        objective: that it was given.

    Returns: by what was not tried, the reason.

    >>> untried({"falls": ValueError("two samples are needed")}, Objective.regression())
    {'whether the loss has a minimum': 'two samples are needed'}
    """
    apart = [what for what, error in failed.items() if _is_cut_off(error, objective)]
    told = {TRIED[what]: in_words(error).partition(": ")[2] for what, error in failed.items() if what not in apart}
    if apart:
        checks = f"{plural(len(apart), 'check')} that put{'s' * (len(apart) == 1)} outputs in by hand"
        told[checks] = "the loss differentiates by the inputs, of which such outputs are no function"
    return told


def _is_cut_off(error: Exception, objective: Objective) -> bool:
    """Whether a loss failed since it differentiates outputs by inputs from which they do not come."""
    needed = objective.criterion.ungraded.needed  # type: ignore[attr-defined]
    return CUT_OFF in str(error) or (needed and NO_GRAPH in str(error))


def _sum_over(asked: Asked) -> int | None:
    """How many samples a loss is a sum over: it is, if the losses of two halves have the whole's as their sum."""
    num = num_samples(asked.seen.batches[0])
    if num < ENOUGH:
        return None
    rows = (slice(0, ENOUGH), slice(0, ENOUGH // 2), slice(ENOUGH // 2, ENOUGH))
    whole, one, two = (float(asked.of_part(part)().detach()) for part in rows)
    both_count = min(abs(one), abs(two)) > SUM * abs(whole)  # a mean over what counts is 0 where nothing does
    return num if both_count and abs(one + two - whole) < SUM * abs(whole) else 0


_PROBES = (
    unlinked, cut, is_affine, _sum_over, falls, plunges, without_effect, idle_half, idle_targets, ignores_order,
    against_labels, silent_columns, silent_terms, mixed_terms, falls_together, unlike_pairs, reads_padding,
    along_outputs, along_choices, policy_terms, compared_rows, pulled_apart, label_names, without_columns,
    largest_slope, log_determinant, at_labels, of_two_values, one_way, is_concave, shortcut, beyond_range,
    ignored_classes, recut, constant_loss, rows_together, made_into_inputs, unheard_arguments, inverted_mask,
    blocking_zeros, are_constant, counts_padding, shifted_twice,
)  # fmt: skip
