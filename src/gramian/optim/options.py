"""Options of matrix optimizers: their defaults, and the range that each value is checked against."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypedDict

from torch import Tensor, nn

from gramian.errors import InputError
from gramian.optim.route import Direction

__all__ = [
    "FLAG",
    "LR",
    "SHARED",
    "Option",
    "Range",
    "Scale",
    "Shared",
    "check",
    "interval",
    "one_of",
    "whole",
]

Scale = Literal["spectral", "match_rms_adamw"]


class Range(NamedTuple):
    """The values that an option may take: in words, as they follow "must be" in an error, and as a test."""

    words: str
    holds: Callable[[Any], bool]

    def or_none(self) -> Range:
        """The same values, or `None`."""
        return Range(f"{self.words}, or None", lambda value: value is None or self.holds(value))


def interval(text: str) -> Range:
    """The real numbers of an interval, written as usual: a bracket includes its end, a parenthesis does not.

    >>> momentum = interval("[0, 1)")
    >>> momentum.words, momentum.holds(0.0), momentum.holds(1.0)
    ('in [0, 1)', True, False)
    """
    low, high = (float(end.replace("∞", "inf")) for end in text[1:-1].split(","))
    above = operator.ge if text[0] == "[" else operator.gt
    below = operator.le if text[-1] == "]" else operator.lt

    def holds(value: Any) -> bool:
        try:
            return bool(above(value, low) and below(value, high))
        except (TypeError, RuntimeError):  # no number, or a tensor of several
            return False

    return Range(f"in {text}", holds)


def whole(least: int) -> Range:
    """The whole numbers from `least` on."""
    return Range(f"a whole number, at least {least}", lambda value: isinstance(value, int) and value >= least)


def one_of(*words: str) -> Range:
    """One of some words."""
    return Range(" or ".join(map(repr, words)), lambda value: isinstance(value, str) and value in words)


FLAG = Range("True or False", lambda value: isinstance(value, (bool, int)) and value in (0, 1))
LR = NOT_NEGATIVE = interval("[0, ∞)")
ANYTHING = Range("anything", lambda value: True)  # checked where it is used

_BETA = interval("[0, 1)")
BETAS = Range(
    "a pair of numbers in [0, 1)",
    lambda value: isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_BETA.holds, value)),
)


class Option(NamedTuple):
    """The default of an option, and its range."""

    default: Any
    range: Range


class Shared(TypedDict, total=False):
    """The keyword arguments of every matrix optimizer, for type checkers; `MatrixOptimizer` says what they mean."""

    weight_decay: float
    scale: Scale
    rest_lr: float | None
    rest_betas: tuple[float, float]
    rest_eps: float
    rest_weight_decay: float
    part_size: int | None
    refresh: int
    max_overhead: float | None
    approach: Literal["predicted", "measured"]
    model: nn.Module | None
    routes: Mapping[str, Direction] | None
    layouts: Mapping[str, Any] | None
    maximize: bool


SHARED: dict[str, Option] = {
    "weight_decay": Option(0.0, NOT_NEGATIVE),
    "scale": Option("spectral", one_of("spectral", "match_rms_adamw")),
    "rest_lr": Option(None, LR.or_none()),
    "rest_betas": Option((0.9, 0.95), BETAS),
    "rest_eps": Option(1e-8, NOT_NEGATIVE),
    "rest_weight_decay": Option(0.0, NOT_NEGATIVE),
    "part_size": Option(256, whole(1).or_none()),
    "refresh": Option(1, whole(1)),
    "max_overhead": Option(None, interval("(0, 1)").or_none()),
    "approach": Option("predicted", one_of("predicted", "measured")),
    "model": Option(None, Range("the model, an nn.Module, or None", lambda v: v is None or isinstance(v, nn.Module))),
    "routes": Option(None, ANYTHING),
    "layouts": Option(None, ANYTHING),
    "maximize": Option(False, FLAG),
}
"""What every matrix optimizer takes beside `lr` and the options of its own direction."""


RANGES: dict[str, Range] = {"lr": LR, **{key: option.range for key, option in SHARED.items()}}


def check(name: str, options: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Raises `InputError` for the first option that is out of its range; every option must have one."""
    for key, value in options.items():
        if key == "lr" and isinstance(value, Tensor) and (value.numel() != 1 or value.requires_grad):
            raise InputError(
                f"{name}: Tensor lr must be 1-element, and without requires_grad, since no step is differentiated; got "
                f"shape {tuple(value.shape)}, requires_grad={value.requires_grad}"
            )
        if not ranges[key].holds(value):
            raise InputError(f"{name}: {key} must be {ranges[key].words}, got {value!r}")
