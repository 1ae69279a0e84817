"""`capturing`: the statistics of `capture` from a training loop's own forward and backward passes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gramian.block import blocks
from gramian.calls import as_model
from gramian.errors import GramianWarning, InputError
from gramian.objective import Fisher, Objective, as_objective
from gramian.recording.measuring import eager
from gramian.recording.onepass import differentiate
from gramian.recording.recorder import MAX_DIM, Recorder
from gramian.recording.taps import Pass, running_task
from gramian.statistics import Statistics

__all__ = ["capturing"]


@contextmanager
def capturing(
    model: nn.Module,
    objective: Objective | Callable,
    *,
    layouts: Mapping[str, Any] | None = None,
    fisher: Fisher | None = None,
    generator: torch.Generator | None = None,
    max_dim: int = MAX_DIM,
    precision: Literal["float32", "bfloat16"] = "float32",
) -> Iterator[Statistics]:
    """A context that captures the statistics of a training loop's own passes, which it does not change.

    Evaluate the loss inside through the objective, so that its sum and units are known, and use it in any way::

        with gm.capturing(model, objective) as stats:
            for batch in batches:
                total, units = objective.loss(model, batch)
                scaler.scale(total / units / accumulation).backward()
                ...

    G is right whatever the loss is multiplied by (a mean, a GradScaler, accumulation), since the gradient that arrives
    at `total` is that factor. A backward pass whose scaled gradients overflow adds nothing, as the scaler skips its
    step. Recomputed activations count once. Forward passes without autograd (an evaluation) are not seen, and compiled
    models run uncompiled inside. On several ranks the statistics are this rank's until `stats.all_reduce()`.

    Args:
        model: as in `capture`, but in the mode that the loop sets.
        objective: as in `capture`; where it is a plain function, call it as `stats.objective.loss(model, batch)`.
        layouts, max_dim, precision: as in `capture`.
        fisher: which second moment G is. "empirical", the default, needs no further backward pass; the others take one
            more for each batch, when the criterion is evaluated.
        generator: draws the labels of `fisher="sampled"`; by default one seeded with 0.

    Returns: the context manager, which gives the `Statistics`; complete after the context.
    Raises:
        InputError: a criterion's result is not a sum and units; or the objective leaves rows out (`Objective.rows`),
            but its criterion was called alone: call `objective.loss(model, batch)`.
    Cost: `rows·d²` for each Gram. Memory: the Grams, and one layer's rows.
    Source: as `capture`; `fisher` as in Kunstner et al. 1905.12558.

    >>> model, objective = nn.Linear(3, 2), Objective.regression()
    >>> with capturing(model, objective) as stats:
    ...     total, units = objective.loss(model, (torch.ones(4, 3), torch.zeros(4, 2)))
    ...     (total / units).backward()
    >>> stats["weight"].G
    Gram(dim=2, count=4)
    """
    model, objective = as_model(model, "capturing"), as_objective(objective)
    kind: Fisher = fisher or "empirical"
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    stats = Statistics(fisher=kind, objective=objective)
    recorder = Recorder(blocks(model, layouts), stats, max_dim=max_dim, precision=precision, record_without_grad=False)
    loop = _Loop(recorder, objective, kind, generator or torch.Generator(device).manual_seed(0))
    with eager(), recorder.installed(), objective.observed_by(loop):
        loop.begin()
        yield stats
    stats.loss = loop.loss / stats.units if stats.units else float("nan")
    if not stats.units:
        warnings.warn(
            "capturing: no loss of the very objective that it was given was differentiated inside, so there is no G; "
            "that of an equal one does not count. Call loss(model, batch) of that one, or stats.objective.loss",
            GramianWarning,
            stacklevel=3,
        )
    recorder.finish()


class _Loop:
    """Observes the objective: each evaluation ends a forward pass, and gives the units and factor of its gradients."""

    def __init__(self, recorder: Recorder, objective: Objective, fisher: Fisher, generator: torch.Generator) -> None:
        self.recorder, self.objective, self.generator = recorder, objective, generator
        self.fisher: Fisher = fisher
        self.loss = 0.0
        self.masked = False

    def begin(self, mask: Tensor | None = None) -> None:
        """Starts the next forward pass."""
        self.recorder.begin(Pass(skip_non_finite=True), mask)
        self.masked = mask is not None

    def before_forward(self, batch: Any) -> None:
        self.begin(self.objective.mask(batch))

    def after_criterion(self, output: Any, batch: Any, result: Any) -> None:
        current = self.recorder.current
        total, units = self.objective.checked(result)
        if not (torch.is_grad_enabled() and total.requires_grad) or current is None:
            return
        if not self.masked and self.objective.mask(batch) is not None:
            raise InputError(
                "capturing: the objective leaves rows out (padding), and must know them before the forward pass: "
                "call objective.loss(model, batch) in place of its criterion"
            )
        current.units, loss = float(units), float(total.detach())
        if self.fisher == "empirical":
            result[0].register_hook(lambda grad: self._backward_begins(current, grad, loss))
        else:
            self._count(current, loss)
            self.recorder.end()
            current.factor = 1.0
            with torch.random.fork_rng([]):
                differentiate(
                    self.recorder, list(self.objective.losses(output, batch, self.fisher, self.generator)), retain=True
                )
            current.active = False
        self.begin()

    def _backward_begins(self, current: Pass, grad: Tensor, loss: float) -> None:
        """Notes the factor. A loss that is only evaluated has no backward pass, and its units do not count."""
        current.factor = grad.detach().double().reshape(())
        current.task = running_task()
        self._count(current, loss)

    def _count(self, current: Pass, loss: float) -> None:
        self.recorder.stats.units += current.units
        self.loss += loss
