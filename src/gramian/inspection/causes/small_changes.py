"""Causes that a small change of the inputs, outputs, parameters or batch has shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from gramian.batch import main_input
from gramian.errors import some
from gramian.inspection.causes.context import Context
from gramian.inspection.causes.dependence import labels_depend
from gramian.inspection.causes.optimizer import steps
from gramian.inspection.causes.zero_started import opening_matrices
from gramian.inspection.experiments.input_order import are_in_order, as_set, without_order
from gramian.inspection.experiments.unbounded_losses import FAR, NEAR
from gramian.report import Finding

__all__ = ["RULES"]

# Labels depend on the order of tokens where p, with their positions, is below the second, and without above the first.
WEAKLY, CLEARLY = 1e-3, 1e-6

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


def cut_inside(context: Context) -> Iterator[Finding]:
    """Find positions of a sequence that the loss depends on, and that no gradient reaches. Exact."""
    found = context.probes.cut
    if found is None:
        return
    silent, length, name = found
    places = [c.name for c in context.observed.cuts if c.function in ("detach", "detach_", "__get__")]
    yield Finding(
        "graph-cut",
        "error",
        f"No gradient arrives at {silent} of {length} positions, on which the loss depends",
        where=next((p for p in places if p), name) or "all layers",
        evidence=f"the gradient of the loss by what {context.told(name)} gives at these positions is zero, and other "
        "inputs there change the output (exact)",
        cause="The state is detached between the steps of a recurrence, or computed under torch.no_grad(): the network "
        "learns from the last steps alone.",
        advice="Remove .detach() inside a sequence; detach the state between sequences only.",
    )


def affine(context: Context) -> Iterator[Finding]:
    """Find several layers that are one affine map. Measured on real inputs."""
    if context.probes.is_affine:
        used = [b.name for b in context.matrices if b.name in context.observed.used]
        opening = opening_matrices(context)
        yield Finding(
            "no-nonlinearity",
            "info" if opening else "warning",
            f"The network is an affine map: its {len(used)} matrices do what one does",
            where="all layers",
            evidence="the output for a mixture of two inputs is the mixture of their outputs, up to rounding, for "
            "samples of the first batch in evaluation mode",
            cause="The nonlinear branches started at zero, and have opened by a few steps so far."
            if opening
            else "No activation function stands between the layers, or each acts where it is linear.",
            advice="" if opening else "Put an activation function between the layers: nn.ReLU() or nn.GELU().",
        )


def summed(context: Context) -> Iterator[Finding]:
    """Tell of a loss that is a sum over the batch: an error where the rate is too large for it. Exact."""
    num = context.probes.sum_over
    if not num:
        return
    diverges = any(finding.code == "rate-too-high" for finding in steps(context))
    yield Finding(
        "loss-summed",
        "error" if diverges else "info",
        f"The loss is a sum over the {num} samples of a batch, and not their mean",
        where="loss",
        evidence="the losses of its halves add up to that of the whole batch (exact)",
        cause=f"Gradients are {num} times those of a mean, and as many times as large is a step at the same rate; they "
        "grow with the batch.",
        advice=f'Use reduction="mean", or divide the loss by the number of samples, or the rate by {num}.',
    )


def unbounded(context: Context) -> Iterator[Finding]:
    """Find a loss that is lower the farther the output is from the targets, in both directions. Measured."""
    found = context.probes.falls
    if found is not None:
        below, here, above = found
        yield Finding(
            "loss-unbounded",
            "error",
            "The loss falls without end, the farther the output is from the targets",
            where="loss",
            evidence=f"loss {here:.3g} as it is, {below:.3g} with outputs far below the targets, {above:.3g} with "
            "outputs far above",
            cause="The sign of the loss is wrong: max and min, or output and target, are exchanged, or a minus is left "
            "over.",
            advice="Correct the sign, so that the loss has its minimum at the targets.",
        )


def plunging(context: Context) -> Iterator[Finding]:
    """Find a loss that falls faster than the outputs grow. Measured."""
    found = context.probes.plunges
    if found is not None and context.probes.falls is None:
        here, near, far = found
        yield Finding(
            "loss-unbounded",
            "error",
            "The loss falls without end, faster than the outputs grow",
            where="loss",
            evidence=f"loss {here:.3g} as it is; with an output moved down its gradient by {NEAR:g} and {FAR:g} "
            f"times its size, {near:.3g} and {far:.3g}",
            cause="The sign of a term is wrong: a square, a variance or a divergence is subtracted.",
            advice="Correct the sign of this term, so that the loss has a minimum.",
        )


def without_effect(context: Context) -> Iterator[Finding]:
    """Find inputs with which the model is called, and that change nothing. Exact."""
    unused = context.probes.without_effect
    found = unused.names
    if not found:
        return
    yield Finding(
        "input-unused",
        "error" if unused.hides_others else "warning",
        f"The model is given {some(found)}, and does not use {'it' if len(found) == 1 else 'them'}",
        where="data",
        evidence="with NaN in its place the loss stays a number, and with those of the others it does not; the loss is "
        "the same for all samples (exact)"
        if unused.hides_others
        else "with the values of other samples, the loss is the same to the last bit, also where zero parameters "
        "get other values (exact)",
        cause="Another input is read twice in its place, and what is made of both cancels."
        if unused.hides_others
        else "What is computed of it is not passed on; a branch is commented out, or a mask is not handed to the "
        "attention.",
        advice="Use it in the forward pass, or do not pass it.",
    )


def columns(context: Context) -> Iterator[Finding]:
    """Find columns of the input that change nothing. Exact on the first samples."""
    if context.probes.columns is None or context.has_constant_output:
        return
    name, silent, num = context.probes.columns
    yield Finding(
        "input-unused",
        "warning",
        f"The model is given {num} columns in {name}, and does not use {some([str(k) for k in silent])}",
        where="data",
        evidence="with the values of other samples in the column, the outputs of 16 samples are the same to the last "
        "bit (exact)",
        cause="Another column is read twice in its place, or an index, as that of an embedding, is another one.",
        advice="Use it in the forward pass, or do not pass it.",
    )


def idle(context: Context) -> Iterator[Finding]:
    """Find a half of an input's positions, channels, rows or columns that changes nothing. Exact on 16 samples."""
    found = context.probes.idle
    if found is None or context.probes.columns is not None or context.probes.inverted is not None:
        return
    yield Finding(
        "input-unused",
        "warning",
        f"Of {found.length} entries of {found.name} along its {_ORDINALS[found.dim]} dimension, {found.start} to "
        f"{found.stop - 1} have no effect",
        where="data",
        evidence="with those of other samples, all outputs are the same to the last bit, also where zero parameters "
        "get other values; the others have an effect (exact)",
        cause="The model reads the wrong position or column: the first state of a recurrence in place of the last, one "
        "column for all, lengths that are too short.",
        advice="Look at which indices the forward pass takes of it; do not pass what is not used.",
    )


def order(context: Context) -> Iterator[Finding]:
    """Tell of a model of sequences or patches to which their order is nothing; a warning where labels depend on it."""
    if not context.probes.ignores_order or context.has_constant_output:
        return
    x = main_input(context.observed.batches[0])
    output, batches = context.observed.output, context.observed.batches
    each = output is not None and output.ndim == 3  # an output for each position
    matters = x.ndim == 2 and are_in_order(context.model, batches) if each else _order_matters(context)
    what = "patches" if x.ndim == 4 else "tokens" if x.ndim == 2 else "positions"
    yield Finding(
        "order-ignored",
        "warning" if matters else "info",
        f"The output{'s change places with the ' + what if each else f' stays the same when the {what} change places'}",
        where="all layers",
        evidence=f"{what} of 16 samples in another order, padding with them, give the same output"
        + ("s in that order" if each else "")
        + " up to rounding"
        + (
            ""
            if not matters
            else "; pairs of neighbors repeat far more than in shuffled rows (6 standard deviations)"
            if each
            else f"; the labels depend on the {what} by their places, and not on what they are"
        ),
        cause=f"Nothing tells the model where one of the {what} stands: no positions are added; attention and means "
        "see a set.",
        advice="Add positions to the embeddings, or use rotary ones in the attention."
        if matters
        else "Where the order counts, add positions to the embeddings.",
    )


def _order_matters(context: Context) -> bool:
    """Whether labels depend on the members of sets by place, and not on which there are."""
    labels = [y for y in context.given_labels if y is not None]
    if not labels or len(labels) != len(context.given_inputs) or any(len(x) != 1 for x in context.given_inputs):
        return False
    inputs = [x[0].detach().cpu() for x in context.given_inputs]
    if any(t.shape[1:] != inputs[0].shape[1:] for t in inputs):
        return False
    members = as_set(context.model, context.observed, torch.cat(inputs)).split([len(t) for t in inputs])
    are_tokens = not inputs[0].is_floating_point()
    by_number = labels_depend([[without_order(one, are_tokens=are_tokens)] for one in members], labels)
    by_position = labels_depend([[one.flatten(1)[:, :4096]] for one in members], labels)
    if by_number is None or by_position is None:
        return False
    return by_number.p_value > WEAKLY and by_position.p_value < CLEARLY


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (
    cut_inside,
    affine,
    summed,
    unbounded,
    plunging,
    without_effect,
    columns,
    idle,
    order,
)
