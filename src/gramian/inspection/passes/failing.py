"""Whether training steps run at all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from gramian.inspection.passes.derivatives import gradients_of
from gramian.objective import Objective
from gramian.recording.measuring import training

__all__ = ["steps_run"]


def steps_run(model: nn.Module, batches: Iterable[Any], objective: Objective) -> bool:
    """Whether training steps run where nothing watches them.

    Args:
        model: left as it was.
        batches: each of them is tried.
        objective: gives the loss.

    Returns: whether no loss and no gradient raises.
    Raises: nothing of its own.
    Cost: a training step for each batch.
    Source: this library's own.
    """
    try:
        with training(model), torch.enable_grad():
            for batch in batches:
                total, units = objective.loss(model, batch)
                if total.requires_grad:
                    gradients_of(total / units, [p for p in model.parameters() if p.requires_grad])
    except Exception:
        return False
    return True
