"""What watching a few training steps gives: a few numbers for each module call and operation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Activation", "Addition", "Attention", "Call", "Cut", "Moments", "Observed", "moments"]


@dataclass(frozen=True)
class Moments:
    """The size of a tensor whose first dimension holds the samples.

    Attributes:
        rms: root mean square of all entries.
        between: root mean square over positions of the standard deviation between samples.
        is_finite: whether all entries are.
    """

    rms: float
    between: float
    is_finite: bool


@dataclass(frozen=True)
class Call:
    """A call of a module that applies parameters or has no children."""

    name: str
    kind: str
    order: int
    input: Moments | None
    output: Moments


@dataclass(frozen=True)
class Activation:
    """An activation function's output: which of its channels never act."""

    name: str
    function: str
    order: int
    channels: int
    dead: int
    saturated: float
    mean: float
    rows: int


@dataclass(frozen=True)
class Attention:
    """Softmax weights over keys: their entropy as a share of ln(number of keys), on average."""

    name: str
    order: int
    entropy: float


@dataclass(frozen=True)
class Addition:
    """A residual addition of two tensors of one shape, neither of them a parameter."""

    name: str
    order: int
    shape: torch.Size
    rms: float


@dataclass(frozen=True)
class Cut:
    """An operation whose input needs a gradient and whose output does not."""

    name: str
    function: str
    order: int
    behind: frozenset[str] = frozenset()  # the parameters whose gradient would come through it


@dataclass
class Observed:
    """What a few training steps showed.

    Attributes:
        calls, activations, attentions, additions, cuts: in the order of the forward pass of the first batch.
        gradients: root mean square of the loss's gradient by parameter; `None` where it does not reach the parameter.
        zero_gradients: share of exact zeros in it.
        used: order of the first operation that takes each parameter; those that are missing take part in nothing.
        called: names of the modules whose forward ran.
        logits: what cross-entropy was applied to, as float32, from the first batch.
        loss: mean over units, in training mode.
        units: number of units.
        batches: the batches themselves, for the rules about data.
        first_non_finite: module and operation that made the first value that is not finite out of finite ones.
        labels: smallest and largest label, and the number of classes, of the first batch.
        error: what the loss raised, where the labels explain it; then nothing else was watched.
        branch_ends: modules whose output is an operand of a residual addition.
        needs_gradient: whether the loss does.
        statistics: of each batch norm whose stored statistics are no longer the initial ones: how far their means are
            from those of the batch, in standard deviations, and the ratio of the variances.
    """

    calls: list[Call] = field(default_factory=list)
    activations: list[Activation] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    additions: list[Addition] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    gradients: dict[str, float | None] = field(default_factory=dict)
    zero_gradients: dict[str, float] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    statistics: dict[str, tuple[float, float]] = field(default_factory=dict)
    logits: Tensor | None = None
    loss: float = float("nan")
    units: float = 0.0
    batches: list[Any] = field(default_factory=list)
    first_non_finite: tuple[str, str] | None = None
    branch_ends: set[str] = field(default_factory=set)
    needs_gradient: bool = True
    labels: tuple[int, int, int] | None = None
    error: Exception | None = None


def moments(t: Tensor) -> Moments:
    """The size of a tensor, from one pass for the moments over samples."""
    wide = t.detach().float()
    if wide.ndim == 0 or wide.shape[0] < 2:
        wide = wide.reshape(-1, 1) if wide.ndim < 2 else wide.reshape(-1, wide.shape[-1])
    if wide.numel() == 0:
        return Moments(0.0, 0.0, is_finite=True)
    largest = float(wide.abs().amax())
    if not math.isfinite(largest):
        return Moments(largest, largest, is_finite=False)
    scale = largest or 1.0  # squares of very large and very small values exist after division
    variance, mean = torch.var_mean(wide / scale, dim=0, correction=0)
    between = float(variance.mean().sqrt()) * scale
    rms = float((variance + mean.square()).mean().sqrt()) * scale
    return Moments(rms, between, is_finite=True)
