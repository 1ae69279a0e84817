"""The records of a watched pass: a few numbers for each module call and operation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gramian.inspection.passes.moments import Moments

__all__ = [
    "Activation",
    "Addition",
    "Attention",
    "Broadcast",
    "Call",
    "Cosines",
    "Criterion",
    "Cut",
    "Draw",
    "Ends",
    "FirstStep",
    "Gate",
    "Raw",
    "Reduction",
    "Routing",
    "Source",
    "Visible",
]


@dataclass(frozen=True)
class Call:
    """A call of a module that applies parameters or has no children, with the shape of its output."""

    name: str
    kind: str
    order: int
    input: Moments | None
    output: Moments
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Activation:
    """An activation function's output: which of its channels never act.

    `is_outside` tells that no module was running, as in a loss.
    """

    name: str
    function: str
    order: int
    channels: int
    dead: int
    saturated: float
    mean: float
    rows: int
    is_outside: bool = False


@dataclass(frozen=True)
class Attention:
    """Softmax weights over keys.

    Attributes:
        entropy: as a share of ln(number of keys that are not masked), on average.
        masked: share of the queries whose keys are all masked.
    """

    name: str
    order: int
    entropy: float
    masked: float = 0.0


@dataclass(frozen=True)
class Visible:
    """Which keys attention sees: `seen` (B, T, S) is true where a score is not masked, of the first samples.

    `rows` is the length of the first dimension, samples or samples times heads; `is_lost` tells that some row of scores
    is −∞ everywhere, of which a softmax is NaN.
    """

    name: str
    order: int
    seen: Tensor
    rows: int
    is_lost: bool = False


@dataclass(frozen=True)
class Addition:
    """A residual addition of two tensors of one shape, neither of them a parameter."""

    name: str
    order: int
    shape: torch.Size
    rms: float


@dataclass(frozen=True)
class Source:
    """A parameter from which values come by one matrix, and the rows of it that do; all, where these are not known.

    Attributes:
        name: of the parameter.
        is_bias: whether it is added.
        start, stop, step: of the rows.
    """

    name: str
    is_bias: bool
    start: int = 0
    stop: int | None = None
    step: int = 1


@dataclass
class Gate:
    """A value between 0 and an end that multiplies another: what passes it, as shares of that end.

    Attributes:
        name: the module in which it multiplies.
        order, at: of the function that made it, and of the product.
        function: sigmoid, say.
        sources: the parameters of its pre-activations.
        is_flipped: whether it is 1 − the function.
        depends: whether its pre-activations are made of more than parameters.
        mean, opened: its mean, and the share of its entries above a half; those that a mask set to zero do not count.
        level: mean of the pre-activations.
        size: root mean square of what it multiplies.
        is_partnered: whether 1 − it multiplies what is added.
        carries: whether it multiplies what it took part in before, as a recurrent cell's gate does its state.
        has_skip: whether another value is added to what passes.
        times: number of gated values that are added up, where the gate is one number for each.
        weighs: whether what it multiplies lies between 0 and an end too, as a probability does.
    """

    name: str
    order: int
    at: int
    function: str
    sources: tuple[Source, ...]
    is_flipped: bool
    depends: bool
    mean: float = math.nan
    opened: float = math.nan
    level: float = math.nan
    size: float = math.nan
    is_partnered: bool = False
    carries: bool = False
    has_skip: bool = False
    times: int = 1
    weighs: bool = False


@dataclass(frozen=True)
class Routing:
    """A softmax over what a matrix gives, or the largest of that, which may choose among modules.

    Attributes:
        name, order: the module in which it is, and its place.
        sources: the parameters of the scores.
        largest: of each choice, its largest weight of all rows; of the largest scores, 1 where one of them is its own.
        rows: how many there are.
        is_choice: whether the largest scores are taken.
    """

    name: str
    order: int
    sources: tuple[Source, ...]
    largest: tuple[float, ...]
    rows: int
    is_choice: bool = False


@dataclass(frozen=True)
class Reduction:
    """A mean or sum of n values that is less than a rounding of theirs: `share` of their size over √n."""

    name: str
    function: str
    order: int
    share: float


@dataclass(frozen=True)
class Ends:
    """A function, and the ends between which its values are."""

    function: str
    low: float
    high: float
    size: int = 0  # of a softmax: over how many values


@dataclass(frozen=True)
class FirstStep:
    """A training step up to its gradients, copies of them by parameter; `set_random` makes the random states what they
    were then.
    """

    gradients: Mapping[str, Tensor]
    set_random: Callable[[], None]


@dataclass(frozen=True)
class Criterion:
    """A loss of torch, by its function's name, and what it was applied to first.

    Attributes:
        ends: of the function that made what it is given, where that has some.
        weight: of the classes.
    """

    function: str
    given: Tensor
    target: Tensor
    ends: Ends | None = None
    weight: Tensor | None = None


@dataclass(frozen=True)
class Broadcast:
    """A difference or loss of two tensors that became a matrix of all pairs."""

    function: str
    left: torch.Size
    right: torch.Size


@dataclass(frozen=True)
class Cosines:
    """Scores that are the cosines of angles, times a number.

    Attributes:
        scale: that number.
        num_classes: how many scores of a row are not masked.
        learned: the parameter that is in that number, if one is.
    """

    scale: float
    num_classes: int
    learned: str = ""


@dataclass(frozen=True)
class Raw:
    """Data that a layer with weights takes as they are: made of the inputs and of constants alone.

    `values` is (rows, features); `key` tells which tensor of the batch it is, where it is one, whole.
    """

    name: str
    values: Tensor
    key: tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """An operation whose input needs a gradient and whose output does not."""

    name: str
    function: str
    order: int
    behind: frozenset[str] = frozenset()  # the parameters whose gradient would come through it


@dataclass
class Draw:
    """Numbers drawn under `torch.no_grad` by values that have a gradient.

    Attributes:
        name, function, order: the module in which that is, the function, and its place.
        passed_to: the module whose matrix takes them; empty where none does.
        is_scored: whether their differences from values with a gradient were taken, as for a log-probability.
    """

    name: str
    function: str
    order: int
    passed_to: str = ""
    is_scored: bool = False
