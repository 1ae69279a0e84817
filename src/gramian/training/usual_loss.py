"""The loss of a usual batch, for which a step of a small network has little time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from gramian.arguments import arguments_of
from gramian.batch import is_pair
from gramian.errors import InputError
from gramian.misuse import instead_of_inputs
from gramian.objective import Objective, is_observed

__all__ = ["usual"]


def usual(model: nn.Module, objective: Objective) -> Callable[[Any], tuple[Tensor, float]]:
    """`objective.summed` with the model, for the batches of a run: what is the same for all of them is asked once.

    That is how the model is called, where it is, and that the loss counts its units. A batch that is not a pair of
    tensors in the processor's memory is left to `summed`, as all are where one of these is not so.
    """
    summed = partial(objective.summed, model)
    counted = getattr(objective.criterion, "counted", None)
    is_call = getattr(objective.predict, "is_call", False) and len(arguments_of(model).required) < 2
    if counted is None or not is_call or not all(p.is_cpu for p in model.parameters()):
        return summed

    def of_pair(batch: Any) -> tuple[Tensor, float]:
        if not is_pair(batch) or is_observed(objective):
            return summed(batch)
        x, labels = batch
        if not (x.is_cpu and labels.is_cpu):
            return summed(batch)
        try:
            output = model(x)
        except (RuntimeError, TypeError, AttributeError) as error:
            if hint := instead_of_inputs(error, model, batch, [x]):
                raise InputError(hint) from error
            raise
        found = counted(output, labels)
        if found is None:
            total, units = objective.checked(objective.criterion(output, batch), empty=True)
            return total, float(units)
        return found

    return of_pair
