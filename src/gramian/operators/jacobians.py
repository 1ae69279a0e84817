"""The Jacobian of each sample from one end of a network to the other, measured without changing the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gramian.calls import as_module
from gramian.linalg.engine.precision import full_precision
from gramian.objective import Objective, as_objective
from gramian.operators.cuts import Use, cut, leaves_of
from gramian.recording import measuring

__all__ = ["end_to_end_jacobian"]

# Where both sides of the end-to-end Jacobian are wider than this, its spectrum is not measured.
MAX_JACOBIAN_SIDE = 512


def end_to_end_jacobian(model: nn.Module, batch: Any, objective: Objective | Callable) -> Tensor | None:
    """The Jacobian of each sample from the first layer's input to the last layer's input.

    Where the input holds indices (an embedding), the first layer's output takes its place.

    Args:
        model: any module; it is left as it was.
        batch: one batch, as `objective` takes it.
        objective: `gm.Objective`, or `loss(model, batch) -> scalar mean`.

    Returns:
        `(samples, m, n)`; `None` where m exceeds 512 or n 32,768, where the rows of both are not samples (a graph's
        nodes mix), where the last layer does not depend on the first or the first is called twice (two towers, a pair
        of inputs), or where there are fewer than two layers.

    Raises: nothing of its own.
    Cost: one forward pass, and m + 1 backward passes of the batch. Accuracy: exact to rounding.
    Source: the definition.

    >>> net = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1))
    >>> j = end_to_end_jacobian(net, (torch.ones(1, 3), torch.zeros(1, 1)), Objective.regression())
    >>> torch.equal(j[0], net[0].weight)
    True
    """
    found = try_jacobian(model, batch, objective)
    return found if isinstance(found, Tensor) else None


@dataclass(frozen=True)
class NoJacobian:
    """Why there is no end-to-end Jacobian; `is_chain` is false where no path leads from the first to the last layer."""

    reason: str
    is_chain: bool = True


def try_jacobian(
    model: nn.Module,
    batch: Any,
    objective: Objective | Callable,
    *,
    copies: int = 1,
    most: int = MAX_JACOBIAN_SIDE,
    few: Any = None,
) -> Tensor | NoJacobian:
    """The Jacobian as `end_to_end_jacobian` gives it, or the reason why there is none.

    Args:
        model, batch, objective: as there.
        copies: each sample stands in the batch this many times, one after the other, so that a backward pass gives as
            many rows of its Jacobian.
        most: rows from which on it counts as too large.
        few: other samples, by which it is asked whether there is one, at a smaller cost than by the batch.
    """
    model, objective = as_module(model, "end_to_end_jacobian"), as_objective(objective)
    with measuring(model), full_precision(), cut(model, only_first=True) as cuts, torch.enable_grad():
        are_separate = False
        if few is not None:
            try:
                objective.predict(model, few)
            except Exception:  # the model's batches have one size
                pass
            else:
                reason = _without(model, cuts.uses, most)
                if reason is not None:
                    return reason
                # Batch norms mix rows by so little that a few may not show it.
                are_separate = not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
            cuts.uses.clear()
        objective.predict(model, batch)
        uses = cuts.uses
        reason = _without(model, uses, most, are_separate=are_separate)
        if reason is not None:
            return reason
        start, end = uses[0].leaving, uses[-1].arriving
        m, n = end[0].numel(), start[0].numel()
        jacobian, copy = [], torch.arange(len(end), device=end.device) % copies
        for k in range(0, m, copies):
            v = torch.zeros(len(end), m + copies, dtype=end.dtype, device=end.device)
            v.scatter_(1, (k + copy)[:, None], 1.0)
            (rows,) = torch.autograd.grad(end, start, v[:, :m].reshape(end.shape), retain_graph=k + copies < m)
            jacobian.append(rows.reshape(-1, copies, n))
        return torch.cat(jacobian, dim=1)[:, :m]


def _without(model: nn.Module, uses: Sequence[Use], most: int, *, are_separate: bool = False) -> NoJacobian | None:
    """Why a forward pass of a model with these uses has no Jacobian of each sample; of `are_separate` none mixes."""
    if len(uses) < 2:
        return NoJacobian("fewer than two layers were called with a tensor")
    first, last = uses[0], uses[-1]
    start, end = first.leaving, last.arriving
    if end is start or not end.requires_grad or id(start) not in leaves_of(end):
        if any(use.name in (first.name, last.name) for use in uses[1:-1]):
            return NoJacobian("the layers are used several times in a forward pass, and not in one chain")
        return NoJacobian(f"the input of {last.name} does not depend on that of {first.name}", is_chain=False)
    if start.shape[0] != end.shape[0]:
        rows = f"{first.name} has {start.shape[0]} rows and {last.name} has {end.shape[0]}"
        return NoJacobian(f"{rows}: no row is one sample's from end to end")
    m, n = end[0].numel(), start[0].numel()
    if m > most or n > 64 * MAX_JACOBIAN_SIDE:
        return NoJacobian(f"it is too large, {m} × {n} for each sample")
    if not are_separate and _mixes(start, end):
        return NoJacobian(
            f"what {first.name} puts out for several rows reaches one row of {last.name}: {_why_mixed(model)}"
        )
    return None


def _why_mixed(model: nn.Module) -> str:
    """Why no row is one sample's from end to end, where the model runs in evaluation mode."""
    kind = nn.modules.batchnorm._BatchNorm
    norms = [n for n, m in model.named_modules() if isinstance(m, kind) and m.running_mean is None]
    if norms:
        return f"batch norms, {norms[0] or 'the model'} first, use the statistics of the batch, as they do in training"
    return "rows are steps of time or nodes of a graph, say, and no samples, or the model mixes samples"


def _mixes(start: Tensor, end: Tensor) -> bool:
    """Whether a row of `end` depends on another row of `start`.

    Some rows must give no gradient at the others. What mixes rows mixes all, or each with those before it, or at some
    distance: those whose number has an odd number of binary ones (the sequence of Thue and Morse) repeat at none.
    """
    if len(start) < 2:
        return False
    ones = torch.tensor([n.bit_count() % 2 == 1 for n in range(len(start))], device=end.device)
    v = torch.empty_like(end).normal_(generator=torch.Generator(end.device).manual_seed(0))
    v[~ones] = 0
    (grad,) = torch.autograd.grad(end, start, v, retain_graph=True)
    return bool((grad[~ones].nan_to_num(0.0, 0.0, 0.0) != 0).any())
