"""A few training steps, watched: what every module gives, and which parameters the loss reaches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from gramian.alignment import labels_of
from gramian.inspection.passes.batch_roles import given_of
from gramian.inspection.passes.loss_inputs import labels_range
from gramian.inspection.passes.moments import version
from gramian.inspection.passes.nonfinite_derivatives import (
    first_infinite_derivative,
    first_zero_derivative,
    gradients_of,
)
from gramian.inspection.passes.records import FirstStep
from gramian.inspection.passes.step_records import Observed
from gramian.inspection.passes.watched_pass import Watcher
from gramian.objective import Objective
from gramian.recording.measuring import batch_statistics, evaluating, training
from gramian.seeding import noted_random

__all__ = ["NUM_BATCHES", "observe", "observe_left"]

# Batches that are read for a diagnosis of the signal; the first is watched.
NUM_BATCHES = 4


def observe(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective,
    *,
    num_steps: int = 0,
) -> Observed:
    """Run a few training steps without the step, and say what every module gave and got back.

    Args:
        model: left as it was: parameters, their `.grad`, buffers, modes, random state.
        batches: the first `NUM_BATCHES` are read.
        objective: its loss is differentiated.
        num_steps: that an optimizer will take on these batches in turn: the gradients of the first are kept for it,
            and other batches that it runs are left to it, in `left`, if the first can be.

    Returns: an `Observed`.
    Raises: what the model raises.
    Cost: a training step without the optimizer, a few passes over each activation, and a forward pass of each other
        batch that is not left, without a graph and without dropout; a training step of these as long as parameters get
        no gradient.
    """
    seen = Observed()
    seen.batches = list(islice(batches, NUM_BATCHES))
    with training(model):
        for i, batch in enumerate(seen.batches):
            if 0 < i < num_steps and seen.first_step is not None and None not in seen.gradients.values():
                seen.left.append(batch)
                continue
            _look_at(model, batch, objective, seen, is_first=i == 0, keeps_gradients=num_steps > 0)
            if seen.error is not None:
                return seen
        _explain(model, objective, seen)
    return seen


def observe_left(model: nn.Module, objective: Objective, seen: Observed) -> None:
    """Run the batches that were left to steps, where these did not show that all is finite.

    Args:
        model, objective: as in `observe`.
        seen: what it returned, to which is added.

    Raises: what the model raises.
    Cost: as in `observe`.
    Source: this library's own.
    """
    left, seen.left = seen.left, []
    with training(model):
        for batch in left:
            _look_at(model, batch, objective, seen)
            if seen.error is not None:
                return
        if left:
            _explain(model, objective, seen)


def _look_at(
    model: nn.Module,
    batch: Any,
    objective: Objective,
    seen: Observed,
    *,
    is_first: bool = False,
    keeps_gradients: bool = False,
) -> None:
    """Runs one batch; the first is watched, and those that follow are differentiated until all get a gradient."""
    reaches = is_first or None in seen.gradients.values()  # experts that the first batch did not use, say
    if not reaches and (loss := _quickly(model, batch, objective)) is not None:
        seen.loss += loss - loss  # 0 or NaN
        return
    written = _versions(batch) if is_first else {}
    states = [version(t) for t in _state(model)]
    try:
        with Watcher(model, seen).installed() if is_first else nullcontext(), torch.enable_grad():
            total, units = objective.loss(model, batch)
    except Exception as error:
        seen.labels = seen.labels or _labels_of(model, batch, objective)
        if seen.labels is None or 0 <= seen.labels[0] <= seen.labels[1] < seen.labels[2]:
            raise
        seen.error = error
        return
    if reaches:
        is_kept = keeps_gradients and is_first and states == [version(t) for t in _state(model)]
        parameters = dict(model.named_parameters())
        _differentiate(total / units, parameters, seen, keeps_gradients=is_kept)
    loss = float(total.detach()) / float(units)
    if is_first:
        seen.changed = tuple(name for name, now in _versions(batch).items() if now != written.get(name, now))
        seen.loss = seen.first_loss = loss
    seen.loss += loss - loss


def _explain(model: nn.Module, objective: Objective, seen: Observed) -> None:
    """Looks for the operation that made something NaN, infinite or zero, where something is."""
    shapes = {name: p.ndim for name, p in model.named_parameters()}
    if seen.batches and not (math.isfinite(seen.loss) and all(call.output.is_finite for call in seen.calls)):
        for batch in seen.batches:
            watcher = Watcher(model, Observed(), careful=True)
            with watcher.installed(), torch.enable_grad():
                objective.loss(model, batch)
            seen.first_non_finite = watcher.first_non_finite
            if seen.first_non_finite is not None:
                break
    elif any(g is not None and not math.isfinite(g) for g in seen.gradients.values()):
        seen.first_infinite_derivative = first_infinite_derivative(
            model, lambda: torch.stack([objective.loss(model, batch)[0] for batch in seen.batches]).sum()
        )
    elif any(g == 0.0 and shapes[n] > 1 for n, g in seen.gradients.items()):
        seen.stopped = first_zero_derivative(model, lambda: objective.loss(model, seen.batches[0])[0])


def _quickly(model: nn.Module, batch: Any, objective: Objective) -> float | None:
    """The loss without a graph and without dropout, which tells whether it is finite; `None` where it cannot be run so.

    So are losses that differentiate on their way, and models that give something else in evaluation mode.
    """
    try:
        with batch_statistics(model), evaluating(model), torch.no_grad():
            total, units = objective.loss(model, batch)
            return float(total) / float(units)
    except Exception:
        return None


def _state(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers on which a pass in training mode depends: not the running statistics of batch norms."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training)
    averages = {id(b) for m in norms for b in m.buffers(recurse=False)}
    return [*model.parameters(), *(b for b in model.buffers() if id(b) not in averages)]


def _versions(batch: Any) -> dict[str, int]:
    """How often each tensor of a batch was written into."""
    tensors = {given.name: given.values[0] for given in given_of([batch], set(), set())}
    return {name: version(t) for name, t in tensors.items()}


def _labels_of(model: nn.Module, batch: Any, objective: Objective) -> tuple[int, int, int] | None:
    """The range of the labels where the criterion refused them before it called a loss of torch."""
    try:
        with torch.enable_grad():
            output, target = objective.predict(model, batch), labels_of(batch)
    except Exception:
        return None
    if not isinstance(output, Tensor) or output.ndim < 2 or target.is_floating_point():
        return None
    return labels_range(output, target)


def _differentiate(
    loss: Tensor, parameters: Mapping[str, Tensor], seen: Observed, *, keeps_gradients: bool = False
) -> None:
    """Keeps the size of each parameter's gradient, from the first batch whose loss reaches it."""
    wanted = {name: p for name, p in parameters.items() if p.requires_grad}
    if not (loss.requires_grad or any(p.grad is not None for p in wanted.values())) or not wanted:
        seen.needs_gradient = bool(loss.requires_grad)
        seen.gradients |= dict.fromkeys(wanted)
        return
    keeps_gradients = keeps_gradients and all(p.grad is None for p in wanted.values())  # the loss took no steps itself
    found = gradients_of(loss, list(wanted.values()))
    if keeps_gradients:
        gradients = {n: g.clone() for n, g in zip(wanted, found, strict=True) if g is not None}
        seen.first_step = FirstStep(gradients, noted_random())
    for (name, _), grad in zip(wanted.items(), found, strict=True):
        if grad is None:
            seen.gradients.setdefault(name, None)
        elif seen.gradients.get(name) is None:
            grad = grad.coalesce().values() if grad.is_sparse else grad
            num = grad.numel()
            seen.gradients[name] = float(grad.detach().double().square_().mean().sqrt()) if num else 0.0
            seen.zero_gradients[name] = 1 - int(torch.count_nonzero(grad)) / num if num else 0.0
