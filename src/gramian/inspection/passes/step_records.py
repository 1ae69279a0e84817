"""What watching a few training steps gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gramian.inspection.passes.ctc_labels import Sequences
from gramian.inspection.passes.records import (
    Activation,
    Addition,
    Attention,
    Broadcast,
    Call,
    Cosines,
    Criterion,
    Cut,
    Draw,
    Ends,
    FirstStep,
    Gate,
    Raw,
    Reduction,
    Routing,
    Visible,
)

__all__ = ["Observed"]


@dataclass
class Observed:
    """What a few training steps showed.

    Attributes:
        calls, activations, attentions, additions, gates, cuts: in the order of the forward pass of the first batch.
        weighing: order of the functions with two ends whose values multiply others, as gates do, or their own argument.
        draws: what is drawn without a gradient.
        drawn_target: the function that drew what the loss compares an output with, where nothing else was made of it.
        stopped: where a parameter's gradient is exactly zero, module and operation whose derivative is zero everywhere.
        routings: softmaxes over what a matrix gives, and choices by it.
        added: names of parameters that are added to something.
        multiplied, by_entry: names of parameters whose values a product takes as a matrix, and of those that meet
            other values entry by entry.
        scaling: names of parameters of a shape that multiply each other entry by entry, before a product takes them.
        visible: keys that attention sees, where it has a mask.
        gradients: root mean square of the loss's gradient by parameter; `None` where it does not reach the parameter.
        zero_gradients: share of exact zeros in it.
        first_step: gradients of the first batch, where they are asked for and the pass changed nothing on which the
            next one depends.
        used: order of the first operation that takes each parameter; those that are missing take part in nothing.
        called: names of the modules whose forward ran.
        logits: what cross-entropy was applied to, as float32, from the first batch.
        criteria: torch's losses, each with what it was first applied to.
        sequences: what the first `ctc_loss` is given.
        pulls: by torch's losses, the smallest and largest gradient of the whole loss by their values; NaN where none
            arrives.
        broadcast: where a loss took an output and a target of other shapes.
        softmax_over_rows: shape of a matrix that had a softmax over its first dimension outside all modules but the
            whole model.
        mixture_over_samples: shape of weights that sum to one over its first dimension, of what is summed up over the
            second.
        bootstrapped: whether a loss compares an output with data plus another one, and both have a gradient.
        canceled: what the loss makes of two equal sides of which no gradient is left: a difference, a quotient, a loss.
        num_taught: how many losses compare probabilities with others of the same parameters that have a gradient.
        single_softmax: by module, the shape of scores of one matrix over one of which a softmax is taken.
        over_queries: by module in which weights that sum to one over the queries are those of keys, their shape.
        output: the model's, the first tensor of it.
        changed: the tensors of the first batch that a pass writes into, as Python reads them off a batch.
        passes: how often the loss calls the model.
        fed: keys of the tensors with which the model was called.
        raw: the data that layers take as they are.
        ends: of the function that made it.
        output_ends: those of each tensor of numbers that the model gave, `None` where there are none.
        dropouts: by module in which `F.dropout` drops values, the largest share.
        scores_end: of the function, in the model or outside, that made what a binary cross-entropy of scores is given.
        cosines: where the loss's scores are cosines.
        has_cosines: whether the loss's scores have as many entries as a product of vectors of length one.
        reductions: means and sums that cancel.
        ungraded: modules that run under `torch.no_grad`.
        first_loss: mean over units of the first batch, in training mode.
        loss: the same, where those of the other batches are finite too; else NaN.
        batches: the batches themselves, for the rules about data.
        left: those of them that an optimizer's steps are to run, which tell too whether their loss is finite.
        first_non_finite: module and operation that made the first value that is not finite out of finite ones.
        first_infinite_derivative: module and operation that made the first gradient that is not finite.
        labels: smallest and largest label, and the number of classes, of the first batch.
        error: what the loss raised, where the labels explain it; then nothing else was watched.
        leading: in a pass of the user's own, parameters on which the input of a module with parameters depends; else
            `None`.
        branch_ends: modules whose output is an operand of a residual addition.
        needs_gradient: whether the loss does.
        ungraded_labels: classes of the first cross-entropy's targets no unit of which has a gradient: how many units
            there are, how many dimensions the targets have, and the units' mean loss.
        zero_derivatives: which of the derivatives that the loss takes on its way are zero everywhere, of one of its own
            outputs or of another derivative, counted from 1.
        strangers: by id, the module and shape of each parameter that is used in the model and is not one of its own.
        is_narrow: whether a module computed in float16 or bfloat16.
        image_sizes: height and width of the input of each module that takes images, where it is called first.
        statistics: of each batch norm whose stored statistics are no longer the initial ones: how far their means are
            from those of the batch, in standard deviations, and the ratio of the variances.
        initial_statistics: of each batch norm, how far 0 and 1 are from the statistics of the batch, likewise.
    """

    calls: list[Call] = field(default_factory=list)
    activations: list[Activation] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    visible: list[Visible] = field(default_factory=list)
    additions: list[Addition] = field(default_factory=list)
    added: set[str] = field(default_factory=set)
    multiplied: set[str] = field(default_factory=set)
    by_entry: set[str] = field(default_factory=set)
    scaling: set[str] = field(default_factory=set)
    gates: list[Gate] = field(default_factory=list)
    weighing: set[int] = field(default_factory=set)
    draws: list[Draw] = field(default_factory=list)
    drawn_target: str = ""
    stopped: tuple[str, str] | None = None
    routings: list[Routing] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    gradients: dict[str, float | None] = field(default_factory=dict)
    zero_gradients: dict[str, float] = field(default_factory=dict)
    first_step: FirstStep | None = None
    used: dict[str, int] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    statistics: dict[str, tuple[float, float]] = field(default_factory=dict)
    initial_statistics: dict[str, tuple[float, float]] = field(default_factory=dict)
    logits: Tensor | None = None
    criteria: list[Criterion] = field(default_factory=list)
    sequences: Sequences | None = None
    pulls: dict[str, tuple[float, float]] = field(default_factory=dict)
    broadcast: Broadcast | None = None
    softmax_over_rows: torch.Size | None = None
    mixture_over_samples: torch.Size | None = None
    bootstrapped: bool = False
    canceled: str = ""
    num_taught: int = 0
    single_softmax: dict[str, tuple[int, ...]] = field(default_factory=dict)
    over_queries: dict[str, tuple[int, ...]] = field(default_factory=dict)
    output: Tensor | None = None
    changed: tuple[str, ...] = ()
    passes: int = 0
    fed: set[tuple[int, int]] = field(default_factory=set)
    raw: list[Raw] = field(default_factory=list)
    ends: Ends | None = None
    output_ends: tuple[Ends | None, ...] = ()
    dropouts: dict[str, float] = field(default_factory=dict)
    scores_end: Ends | None = None
    cosines: Cosines | None = None
    has_cosines: bool = False
    reductions: list[Reduction] = field(default_factory=list)
    ungraded: set[str] = field(default_factory=set)
    loss: float = float("nan")
    first_loss: float = float("nan")
    batches: list[Any] = field(default_factory=list)
    left: list[Any] = field(default_factory=list)
    first_non_finite: tuple[str, str] | None = None
    first_infinite_derivative: tuple[str, str] | None = None
    branch_ends: set[str] = field(default_factory=set)
    leading: set[str] | None = None
    needs_gradient: bool = True
    ungraded_labels: dict[int, tuple[int, int, float]] = field(default_factory=dict)
    zero_derivatives: tuple[int, ...] = ()
    strangers: dict[int, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    is_narrow: bool = False
    image_sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    labels: tuple[int, int, int] | None = None
    error: Exception | None = None

    @property
    def entries(self) -> frozenset[str]:
        """Parameters that meet other values entry by entry, and that no product takes as a matrix as they are."""
        return frozenset((self.by_entry - self.multiplied) | self.scaling)
