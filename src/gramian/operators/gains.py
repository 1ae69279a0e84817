"""The gain of each layer, measured with the graph cut at every layer's input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gramian.calls import as_module
from gramian.layers import operation_of
from gramian.linalg.engine.precision import full_precision
from gramian.objective import Objective, as_objective
from gramian.operators.cuts import cut, leaves_of
from gramian.recording import measuring

__all__ = ["Gain", "layer_gains"]


REPEATED = "used several times"
MIXED = "with a skip, attention or a branch before the next"
OF_NO_KIND = "recurrent or of a kind without one"
"""Why a layer has no gain."""


@dataclass(frozen=True)
class Gain:
    """The gain χ of one layer: the mean squared singular value of the Jacobian to the next layer.

    Args:
        chi: χ; 1 keeps the size of a gradient.
        standard_error: of χ, over samples and probes.
    """

    chi: float
    standard_error: float


def layer_gains(
    model: nn.Module,
    batch: Any,
    objective: Objective | Callable,
    *,
    num_probes: int = 4,
    generator: torch.Generator | None = None,
) -> dict[str, Gain | None]:
    """The gain χ of each layer: the mean squared singular value of the Jacobian from its input to the next's input.

    `χ = E‖Jᵀv‖² / min(m, n)` over standard normal `v` and the samples of the batch; critical at 1. The graph is cut at
    every layer's input, so that one backward pass measures all layers and nothing vanishes on the way.

    Args:
        model: any module; it is left as it was.
        batch: one batch, as `objective` takes it.
        objective: `gm.Objective`, or `loss(model, batch) -> scalar mean`.
        num_probes: random vectors v for each sample.
        generator: draws them; seeded with 0 by default.

    Returns:
        Gains by block name in forward order. `None` where the next layer's input does not depend on this layer alone
        (skip connections, attention, recurrence): there the gradient's size by depth says what the product does.
        The last layer's gain is to its own output.

    Raises:
        InputError: it is no model.
    Cost: one forward and `num_probes` backward passes. Accuracy: the standard error, over samples and probes.
    Source: χ of Schoenholz et al. (1611.01232), eq. 5; the estimator is Hutchinson's.

    >>> net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    >>> for layer in net:
    ...     _ = layer.weight.data.copy_(2 * torch.eye(4))
    >>> gains = layer_gains(net, (torch.ones(8, 4), torch.zeros(8, 4)), Objective.regression(), num_probes=64)
    >>> 3.5 < gains["0.weight"].chi < 4.5
    True
    """
    return try_gains(model, batch, objective, num_probes=num_probes, generator=generator)[0]


def try_gains(
    model: nn.Module,
    batch: Any,
    objective: Objective | Callable,
    *,
    num_probes: int = 4,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Gain | None], dict[str, str]]:
    """The gains as `layer_gains` gives them, and for each that is `None` one of the reasons above."""
    model, objective = as_module(model, "layer_gains"), as_objective(objective)
    device = next(model.parameters()).device
    generator = generator or torch.Generator(device).manual_seed(0)
    with measuring(model), full_precision(), torch.enable_grad():
        with cut(model) as cuts:
            objective.predict(model, batch)
        uses = cuts.uses
        ends = [*(use.arriving for use in uses[1:]), cuts.output]
        names = [use.name for use in uses]
        gains: dict[str, Gain | None] = {}
        reasons: dict[str, str] = {}
        pairs: list[tuple[str, Tensor, Tensor]] = []
        leaves = {id(use.leaving) for use in uses}
        for use, end in zip(uses, ends, strict=False):
            gains[use.name] = None
            if names.count(use.name) > 1:
                reasons[use.name] = REPEATED
            elif not operation_of(use.module).gain:
                reasons[use.name] = OF_NO_KIND
            elif end is not None and leaves_of(end) & leaves == {id(use.leaving)}:
                pairs.append((use.name, use.leaving, end))
            else:
                reasons[use.name] = MIXED
        for name, start, end in pairs:  # one at a time: the vectors of all would be as large as all activations
            side = min(start.numel(), end.numel()) / len(start)  # of one sample's Jacobian
            values = []
            for probe in range(num_probes):
                v = torch.empty_like(end).normal_(generator=generator)
                keep = probe + 1 < num_probes
                (grad,) = torch.autograd.grad(end, start, v, retain_graph=keep, allow_unused=True)
                if grad is not None:
                    # And not a sum with a dtype of its own, which takes ten times as long on a processor.
                    values.append(grad.reshape(len(grad), -1).double().square_().sum(1) / side)
            if not values:
                reasons[name] = MIXED
                continue
            chi = torch.cat(values)
            error = chi.std() / len(chi) ** 0.5 if len(chi) > 1 else torch.tensor(float("nan"))
            gains[name] = Gain(float(chi.mean()), float(error))
    return gains, reasons
