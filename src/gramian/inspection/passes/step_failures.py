"""Whether training steps run at all, and what lets them run on numbers that are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution

from gramian.batch import tensors
from gramian.inspection.passes.moments import all_finite
from gramian.inspection.passes.nonfinite_derivatives import gradients_of
from gramian.objective import Objective
from gramian.recording.measuring import training

__all__ = ["steps_run", "taking_what_is_not_finite"]


def steps_run(model: nn.Module, batches: Iterable[Any], objective: Objective) -> bool:
    """Whether training steps run where nothing watches them.

    Args:
        model: left as it was.
        batches: each of them is tried.
        objective: gives the loss.

    Returns: whether no loss and no gradient raises.
    Cost: a training step for each batch.
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


@contextmanager
def taking_what_is_not_finite(model: nn.Module, batches: Iterable[Any]) -> Iterator[None]:
    """A context in which torch's distributions take NaN and infinity, where the batches or parameters have some.

    They would raise an error about what came of them, and the cause would not be told.

    Args:
        model, batches: looked at once.
    """
    given = [t for batch in batches for t in tensors(batch)] + list(model.parameters())
    checked = Distribution._validate_args
    if not all(all_finite(t) for t in given if t.is_floating_point() and not t.is_meta):
        Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(checked)
