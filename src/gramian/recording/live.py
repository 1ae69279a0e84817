"""`capturing`: the same statistics from a training loop's own forward and backward passes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gramian.block import blocks
from gramian.errors import GramianWarning, InputError
from gramian.objective import Fisher, Objective, as_objective
from gramian.recording.measuring import eager
from gramian.recording.onepass import differentiate
from gramian.recording.recorder import MAX_DIM, Pass, Recorder
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
    """Statistics of a training loop's own passes: what `capture` measures, while the loop goes on as it would.

    Inside, evaluate the loss through the objective, so that its sum and units are known, and do with it what you like::

        with gm.capturing(model, objective) as stats:
            for batch in batches:
                total, units = objective.loss(model, batch)
                scaler.scale(total / units / accumulation).backward()
                ...

    G is right whatever the loss is multiplied by (a mean, a GradScaler, accumulation): the gradient that arrives at
    `total` says by how much. A backward pass whose scaled gradients overflow adds nothing, as the scaler skips it.
    Recomputed activations count once. Forward passes without autograd (an evaluation) are not seen, and compiled models
    run uncompiled inside.

    Args:
        model, layouts, max_dim, precision: as in `capture`. The model's mode is its own.
        objective: as in `capture`; a plain function is called as `stats.objective.loss(model, batch)`.
        fisher: "empirical" costs no second backward pass. Others differentiate once more for each batch, when the
            criterion is evaluated. By default "empirical".
        generator: draws the labels of `fisher="sampled"`; by default one seeded with 0.

    Raises:
        InputError: a criterion of the wrong kind; rows to leave out (`Objective.rows`), but the criterion was called
            by itself: call `objective.loss(model, batch)`.

    Cost: `rows·d²` for each Gram. Memory: the Grams, and one layer's rows.
    Source: Martens & Grosse 1503.05671, eq. 1; `fisher` as in Kunstner et al. 1905.12558.
    """
    objective = as_objective(objective)
    kind: Fisher = fisher or "empirical"
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    stats = Statistics(fisher=kind, objective=objective)
    recorder = Recorder(blocks(model, layouts), stats, max_dim=max_dim, precision=precision, record_without_grad=False)
    loop = _Loop(recorder, objective, kind, generator or torch.Generator(device).manual_seed(0))
    with eager(), recorder.installed(), objective.observed_by(loop):
        loop.renew()
        yield stats
    stats.loss = loop.loss / stats.units if stats.units else float("nan")
    if not stats.units:
        warnings.warn(
            "capturing: no loss of the objective was differentiated inside, so there is no G. Take the loss of "
            "objective.loss(model, batch), or stats.objective.loss where you gave a plain function",
            GramianWarning,
            stacklevel=3,
        )
    recorder.finish()


class _Loop:
    """Follows the objective's evaluations: each ends one forward pass and says what its gradients will mean."""

    def __init__(self, recorder: Recorder, objective: Objective, fisher: Fisher, generator: torch.Generator) -> None:
        self.recorder, self.objective, self.generator = recorder, objective, generator
        self.fisher: Fisher = fisher
        self.loss = 0.0
        self.masked = False

    def renew(self, mask: Tensor | None = None) -> None:
        self.recorder.begin(Pass(skip_non_finite=True), mask)
        self.masked = mask is not None

    def begins(self, batch: Any) -> None:
        self.renew(None if self.objective.rows is None else self.objective.rows(batch))

    def ends(self, output: Any, batch: Any, result: Any) -> None:
        current = self.recorder.current
        total, units = self.objective.checked(result)
        if not (torch.is_grad_enabled() and total.requires_grad) or current is None:
            return
        if self.objective.rows is not None and not self.masked and not bool(self.objective.rows(batch).all()):
            raise InputError(
                "capturing: the objective leaves rows out (padding), which must be known before the forward pass: "
                "call objective.loss(model, batch) in place of its criterion"
            )
        current.units, loss = float(units), float(total.detach())
        if self.fisher == "empirical":
            result[0].register_hook(lambda grad: self.arrives(current, grad, loss))
        else:
            self.counts(current, loss)
            self.recorder.end()
            current.factor = 1.0
            with torch.random.fork_rng([]):
                differentiate(
                    self.recorder, list(self.objective.losses(output, batch, self.fisher, self.generator)), retain=True
                )
            current.listening = False
        self.renew()

    def arrives(self, current: Pass, grad: Tensor, loss: float) -> None:
        """A backward pass begins at the loss. One that is only evaluated has no gradients, and no units."""
        current.factor = grad.detach().double().reshape(())
        current.task = torch._C._current_graph_task_id()
        self.counts(current, loss)

    def counts(self, current: Pass, loss: float) -> None:
        self.recorder.stats.units += current.units
        self.loss += loss
