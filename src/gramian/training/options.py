"""The options of a run beside its optimizer: schedule, regularization, clipping, accumulation, averaging, stopping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from gramian.errors import InputError
from gramian.prox import L1, L2, ElasticNet, Nuclear, Orthogonal, Penalty, SpectralNorm
from gramian.training.argument_errors import check, is_whole, one_of
from gramian.training.augmentation import check as check_augmentation
from gramian.training.schedule import SCHEDULES, WARMUP_STEPS

__all__ = ["PENALTIES", "PRECISIONS", "Options", "best_row", "penalty"]

PENALTIES: dict[str, Callable[[float], Penalty]] = {
    "l1": L1,
    "l2": L2,
    "nuclear": Nuclear,
    "spectral": SpectralNorm,
    "orthogonal": Orthogonal,
}

# Of the forward pass: what autocast is to use, if anything.
PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


# Batches in a step: more of them are a mistake, and the run would say nothing for days.
MOST_BATCHES = 10**6
MOST_SLICES = 10**4


@dataclass(frozen=True)
class Options:
    """The options of `train` by the same names, checked."""

    schedule: str = "linear"
    warmup: int = WARMUP_STEPS
    weight_decay: float | None = None
    regularize: Mapping[str, float] = field(default_factory=dict)
    clip: float | None = None
    accumulate: int = 1
    precision: str = "float32"
    ema: float | None = None
    augment: Mapping[str, float] = field(default_factory=dict)
    best: str | None = None
    patience: int | None = None
    slices: int | None = None

    def __post_init__(self) -> None:
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("precision", self.precision, PRECISIONS)
        check("warmup", self.warmup, lambda n: n >= 0, "a number of steps, zero or more")
        told = f"a number of batches, from 1 to {MOST_BATCHES:,}"
        check("accumulate", self.accumulate, lambda n: is_whole(n) and 1 <= n <= MOST_BATCHES, told)
        told = f"a number of passes over a batch, from 1 to {MOST_SLICES:,}"
        check("slices", self.slices, lambda n: n is None or (is_whole(n) and 1 <= n <= MOST_SLICES), told)
        for name, value in (("clip", self.clip), ("patience", self.patience)):
            check(name, value, lambda x: x is None or 0 < x < math.inf, "a positive number")
        told = "zero or a positive number"
        check("weight_decay", self.weight_decay, lambda x: x is None or 0 <= x < math.inf, told)
        check("ema", self.ema, lambda x: x is None or 0 < x < 1, "between 0 and 1, as 0.999")
        for name, value in (("regularize", self.regularize), ("augment", self.augment)):
            check(name, value, lambda x: isinstance(x, Mapping), "strengths by name, as {'l2': 1e-4} or {'noise': 0.1}")
        for name, strength in self.regularize.items():
            one_of("regularize", name, PENALTIES)
            check(f"regularize {name}", strength, lambda x: 0 <= x < math.inf, told)
        penalty(self.regularize)
        check_augmentation(self.augment)
        if self.best is not None and str(self.best).partition(":")[0] not in ("max", "min"):
            raise InputError(f"train: best must be max:NAME or min:NAME, as in max:accuracy; got {self.best!r}")
        if self.patience is not None and self.best is None:
            raise InputError("train: patience needs best=, the number that is to improve, as in best='max:accuracy'")

    def identity(self) -> dict[str, str]:
        """Return what differs from the defaults, as text by name, for a run's identity."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: _text(value) for name, value in found.items() if value != getattr(Options(), name)}


def penalty(strengths: Mapping[str, float]) -> Penalty | None:
    """Return the one penalty that these strengths stand for: L1 and L2 together are an elastic net."""
    names = set(strengths)
    if names == {"l1", "l2"}:
        return ElasticNet(strengths["l1"], strengths["l2"])
    if len(names) > 1:
        raise InputError(
            f"train: regularize takes one penalty, or l1 and l2 together; got {', '.join(strengths)}. Their joint "
            "proximal map is not known in closed form"
        )
    return next((PENALTIES[name](strength) for name, strength in strengths.items()), None)


def best_row(best: str, history: list[dict[str, float]]) -> tuple[int, int]:
    """Return the index of the best row of a history, and how many rows have come since.

    Raises `InputError` where the rows lack the number.
    """
    direction, _, name = best.partition(":")
    if history and name not in history[-1]:
        known = ", ".join(key for key in history[-1] if key not in ("step", "seconds"))
        raise InputError(f"train: best is {best!r}, but an evaluation has no {name!r}; it has {known}")
    sign = 1 if direction == "max" else -1
    values = [sign * row[name] if math.isfinite(row[name]) else -math.inf for row in history]
    index = max(range(len(values)), key=lambda i: (values[i], -i))  # the first of equals
    return index, len(values) - 1 - index


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{name}={float(strength):g}" for name, strength in value.items())
    return f"{value}"
