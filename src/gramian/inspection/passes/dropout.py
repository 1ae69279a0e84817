"""Functions that drop values, and how many of them a call drops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F

__all__ = ["DROPOUTS", "share_dropped"]

DROPOUTS: dict[Callable, bool] = {
    F.dropout: True, F.dropout1d: True, F.dropout2d: True, F.dropout3d: True,
    F.alpha_dropout: False, F.feature_alpha_dropout: False,
}  # fmt: skip
"""Whether they drop where nobody says whether it is training."""


def share_dropped(func: Callable, args: tuple, kwargs: Mapping[str, Any]) -> float:
    """The share of the values that a call drops: zero where it is not training.

    Args:
        func: one of `DROPOUTS`.
        args, kwargs: of the call.
    """
    p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    acts = args[2] if len(args) > 2 else kwargs.get("training", DROPOUTS[func])
    return float(p) if acts else 0.0
