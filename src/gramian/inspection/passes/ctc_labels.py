"""What a connectionist temporal classification is given: its blank among the labels, and labels that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Sequences", "sequences_of"]

_NAMES = ("log_probs", "targets", "input_lengths", "target_lengths", "blank", "reduction", "zero_infinity")


@dataclass(frozen=True)
class Sequences:
    """What the first `ctc_loss` is given.

    Attributes:
        blank: the class that stands for no label.
        num, num_labels: how many sequences of labels there are, and labels in them.
        blanks, inside: how many of the labels are the blank, and how many of these have another label after them.
        unfit: how many sequences need more steps than their inputs have.
        are_zeroed: whether the loss of such is made zero.
    """

    blank: int
    num: int
    num_labels: int
    blanks: int
    inside: int
    unfit: int
    are_zeroed: bool


def sequences_of(args: tuple, kwargs: Mapping[str, Any]) -> Sequences | None:
    """Counts what a call of `ctc_loss` is given.

    Args:
        args, kwargs: the call.

    Returns: a `Sequences`; `None` where shapes and lengths do not go together, which torch refuses.
    """
    given = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
    targets, blank = given["targets"].detach().cpu(), int(given.get("blank", 0))
    steps, lengths = (_numbers(given.get(name)) for name in _NAMES[2:4])
    if len(steps) != len(lengths) or not lengths or min(lengths) < 0:
        return None
    if targets.ndim == 2 and len(targets) == len(lengths) and max(lengths) <= targets.shape[1]:
        rows = [row[:length] for row, length in zip(targets, lengths, strict=True)]
    elif targets.ndim == 1 and sum(lengths) == len(targets):
        rows = list(targets.split(lengths))
    else:
        return None
    blanks, inside, unfit = 0, 0, 0
    for row, available in zip(rows, steps, strict=True):
        is_blank = row == blank
        blanks += int(is_blank.sum())
        inside += int((is_blank & (~is_blank).flip(0).cummax(0).values.flip(0)).sum()) if len(row) else 0
        unfit += len(row) + int((row[1:] == row[:-1]).sum()) > available  # a blank parts two equal labels
    return Sequences(blank, len(rows), sum(lengths), blanks, inside, unfit, bool(given.get("zero_infinity", False)))


def _numbers(lengths: Any) -> list[int]:
    return torch.as_tensor(lengths).flatten().tolist() if isinstance(lengths, (Tensor, tuple, list, int)) else []
