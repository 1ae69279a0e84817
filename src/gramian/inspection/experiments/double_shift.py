"""Whether next tokens, which a batch has at their place already, are shifted once more by the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from gramian.batch import main_input
from gramian.inspection.experiments.replay import Asked
from gramian.inspection.passes.batch_roles import given_of

__all__ = ["shifted_twice"]

# Labels that are the next tokens from which on that is no chance.
FEW = 16


def shifted_twice(asked: Asked) -> str | None:
    """The labels that are the next token of each input, where the scores of the last place have no gradient.

    A loss that takes labels as they stand has a gradient at the last place, whose label is given; one that shifts them
    has none, and compares each place with the token after the next.

    Args:
        asked: the model, left as it was, and its loss.

    Returns: their name, as Python reads it off a batch; `None` where there are no such labels.
    Cost: a comparison of two tensors of tokens.
    """
    x, replay = main_input(asked.batch), asked.replay
    if x.ndim != 2 or x.is_floating_point() or not replay.is_known:
        return None
    for given in given_of([asked.batch], set(), set()):
        y = given.values[0]
        if y is x or y.shape != x.shape or y.is_floating_point() or torch.equal(y, x) or not _are_next(x, y):
            continue
        for slope in replay.slopes:
            if slope.ndim == 3 and slope.shape[:2] == y.shape and bool(slope[:, :-1].any()):
                return given.name if bool((y[:, -1] >= 0).any()) and not bool(slope[:, -1].any()) else None
    return None


def _are_next(x: Tensor, y: Tensor) -> bool:
    """Whether labels that are no negative numbers, which losses leave out, are the tokens one place on."""
    counted = y[:, :-1] >= 0
    return int(counted.sum()) >= FEW and bool((y[:, :-1] == x[:, 1:])[counted].all())
