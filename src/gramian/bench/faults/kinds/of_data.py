"""Faults of inputs, labels and the loss. Inputs are harmed in training and held out alike, labels in training alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramian.bench.faults.architectures import Options
from gramian.bench.faults.kinds.table import Planted, kind, network
from gramian.bench.faults.setup import Draw, Setup
from gramian.objective import Objective

DATA, LABELS, LOSS = ("data",), ("labels",), ("loss",)
LARGE_INPUTS = "gradient-explodes saturated-units gate-shut attention-saturated rate-too-high gain-above-one dead-units"


def _inputs(setup: Setup, change: Callable[[Tensor], Tensor]) -> None:
    setup.batches = [(change(x), y) for x, y in setup.batches]
    setup.held_out = [(change(x), y) for x, y in setup.held_out]


def _numbers(setup: Setup) -> bool:
    return setup.batches[0][0].is_floating_point()


@kind(
    "input-nan",
    "input-non-finite",
    consequences="loss-non-finite gradient-explodes gradient-overflow",
    needs="pixels",
    options=Options(tokens=False),
)
def input_nan(setup: Setup, draw: Draw) -> Planted:
    """A few training inputs hold a NaN or an infinity."""
    value, at = draw.choice((math.nan, math.inf)), draw.choice((0, 0, 1))
    x = setup.batches[at][0].clone()
    x.view(len(x), -1)[int(draw.uniform(0, len(x))), :2] = value
    setup.batches[at] = (x, setup.batches[at][1])
    return Planted(DATA, f"{value} in batch {at}")


@kind("input-offset", "input-offset", consequences=LARGE_INPUTS, needs="pixels", options=Options(tokens=False))
def input_offset(setup: Setup, draw: Draw) -> Planted:
    """A large constant is added to all inputs."""
    offset = draw.power(1.3, 2.7) * draw.choice((-1, 1))
    _inputs(setup, lambda x: x + offset)
    return Planted(DATA, f"{offset:+.3g}")


@kind(
    "input-scale-large", "input-scale", consequences=LARGE_INPUTS, needs="pixels", options=Options(tokens=False)
)  # fmt: skip
def input_scale_large(setup: Setup, draw: Draw) -> Planted:
    """Inputs are far too large, as pixels that nobody divided."""
    factor = draw.power(2.2, 3.5)
    _inputs(setup, lambda x: x * factor)
    return Planted(DATA, f"× {factor:.3g}")


@kind(
    "input-scale-small",
    "input-scale",
    consequences="gradient-vanishes gain-below-one rate-too-low",
    needs="pixels",
    options=Options(tokens=False),
)
def input_scale_small(setup: Setup, draw: Draw) -> Planted:
    """Inputs are far too small, as pixels that were divided twice."""
    factor = draw.power(-5, -2.5)
    _inputs(setup, lambda x: x * factor)
    return Planted(DATA, f"× {factor:.3g}")


@kind("input-dominated", "input-dominated", consequences=LARGE_INPUTS + " input-scale", needs="pixels",
      options=Options(tokens=False))  # fmt: skip
def input_dominated(setup: Setup, draw: Draw) -> Planted:
    """One input feature is far larger than the others."""
    factor = draw.power(2.3, 3.5)
    size = setup.batches[0][0][0].numel()
    which = int(draw.uniform(0, size))

    def change(x: Tensor) -> Tensor:
        noise = torch.randn(len(x), generator=torch.Generator().manual_seed(which + len(x)))
        x = x.clone()
        x.view(len(x), -1)[:, which] = factor * noise
        return x

    _inputs(setup, change)
    return Planted(DATA, f"feature {which} × {factor:.3g}")


@kind(
    "input-constant",
    "input-constant",
    consequences="labels-independent input-duplicates input-scale gradient-vanishes dead-units",
)
def input_constant(setup: Setup, draw: Draw) -> Planted:
    """Every input is the same, as by an index that does not move."""
    one = setup.batches[0][0][int(draw.uniform(0, 64))]
    if _numbers(setup) and draw.uniform(0, 1) < 0.5:
        one = torch.zeros_like(one)
    setup.batches = [(one.expand_as(x).clone(), y) for x, y in setup.batches]
    return Planted(DATA, causes=("input-duplicates",) if bool(one.any()) else ())


@kind("input-duplicates", "input-duplicates")
def input_duplicates(setup: Setup, draw: Draw) -> Planted:
    """The training data are a few samples over and over."""
    count = draw.choice((4, 6, 8))
    x, y = setup.batches[0]
    rows = torch.arange(len(x)) % count
    setup.batches = [(x[rows], y[rows])] * len(setup.batches)
    return Planted(DATA, f"{count} samples")


@kind("labels-constant", "labels-constant", consequences="labels-independent")
def labels_constant(setup: Setup, draw: Draw) -> Planted:
    """All training labels are one class."""
    label = int(setup.batches[0][1].flatten()[int(draw.uniform(0, 64))])
    setup.batches = [(x, torch.full_like(y, label)) for x, y in setup.batches]
    return Planted(LABELS, f"class {label}")


def _reorder(setup: Setup, order: Tensor) -> None:
    y = torch.cat([y for _, y in setup.batches])[order]
    setup.batches = [(x, part) for (x, _), part in zip(setup.batches, y.split(64), strict=True)]


@kind("labels-shuffled", "labels-independent")
def labels_shuffled(setup: Setup, draw: Draw) -> Planted:
    """Training labels are shuffled, and so say nothing about the inputs."""
    count = 64 * len(setup.batches)
    _reorder(setup, torch.randperm(count, generator=draw.generator))
    return Planted(LABELS)


@kind("labels-rolled", "labels-independent")
def labels_rolled(setup: Setup, draw: Draw) -> Planted:
    """Each training sample has its neighbor's label."""
    count = 64 * len(setup.batches)
    by = draw.choice((1, -1, 64))
    _reorder(setup, torch.arange(count).roll(by))
    return Planted(LABELS, f"by {by}")


@kind("labels-from-one", "labels-out-of-range", consequences="loss-non-finite")
def labels_from_one(setup: Setup, draw: Draw) -> Planted:
    """Labels count from one, so that the last class has no score."""
    by = draw.choice((1, 1, 2))
    setup.batches = [(x, y + by) for x, y in setup.batches]
    return Planted(LABELS, f"+ {by}")


def _on_scores(setup: Setup, draw: Draw, module: nn.Module) -> Planted:
    """Apply a function of the scores in the model, or in the loss."""
    if draw.uniform(0, 1) < 0.5:
        network(setup).final = module
        return Planted((*LOSS, "final", "head"), "in the model")
    setup.outputs = lambda model, batch: module(model(batch[0]))
    if isinstance(setup.objective, Objective):
        setup.objective = Objective.classification(predict=setup.outputs)
    else:
        setup.objective = lambda model, batch: F.cross_entropy(
            module(model(batch[0])).flatten(0, -2), batch[1].flatten()
        )
    return Planted((*LOSS, "head"), "in the loss")


@kind("softmax-twice", "loss-double-softmax", consequences="gradient-vanishes", options=Options(optimizer="sgd"))
def softmax_twice(setup: Setup, draw: Draw) -> Planted:
    """Softmax is applied to the scores before cross-entropy applies it again."""
    return _on_scores(setup, draw, nn.Softmax(-1))


@kind("relu-on-scores", "loss-rectified", consequences="dead-units gradient-vanishes")
def relu_on_scores(setup: Setup, draw: Draw) -> Planted:
    """ReLU is applied to the scores."""
    return _on_scores(setup, draw, nn.ReLU())


@kind("loss-nan", "loss-non-finite", consequences="gradient-explodes gradient-overflow", options=Options(plain=False))
def loss_nan(setup: Setup, draw: Draw) -> Planted:
    """The loss is 0 / 0 or takes the logarithm of zero."""
    how = draw.choice(("masked", "log"))

    def criterion(output: Any, batch: Any) -> tuple[Tensor, int]:
        scores, labels = output.flatten(0, -2), batch[1].flatten()
        if how == "masked":  # by a padding label that is nowhere
            counted = (labels == -100).float()
            each = F.cross_entropy(scores, labels, reduction="none")
            return (each * counted).sum() / counted.sum() * len(labels), len(labels)
        right = scores.softmax(-1).gather(1, labels[:, None]) - 1  # one is subtracted twice
        return -(right + 0.0).log().sum(), len(labels)

    setup.objective = Objective(lambda model, batch: model(batch[0]), criterion)
    return Planted(LOSS, how)
