"""`inspect`: from a model or a file to a report."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gramian.alignment import labels_of
from gramian.batch import has_arrays, mapped
from gramian.calls import as_model
from gramian.errors import GramianError, InputError
from gramian.inspection.across_depth import ADAMW_EPS
from gramian.inspection.causes import CAUSES, Context
from gramian.inspection.causes.data import labels_in_range, lost_labels
from gramian.inspection.causes.initial_loss import far_above_guessing
from gramian.inspection.causes.loss import training_fails
from gramian.inspection.causes.zero_started import opening_matrices
from gramian.inspection.experiments.adapter_effect import moved_by_steps
from gramian.inspection.experiments.curvature import measure_curvature
from gramian.inspection.experiments.evaluation_mode import evaluate
from gramian.inspection.experiments.opening_zeros import open_zeros
from gramian.inspection.experiments.optimizer_steps import Steps
from gramian.inspection.experiments.small_changes import probe, untried
from gramian.inspection.experiments.target_leaks import find_leak
from gramian.inspection.experiments.zero_products import find_zeroed
from gramian.inspection.first_steps import FAILING, STEPS, observe_steps
from gramian.inspection.measurements import Measured
from gramian.inspection.nonfinite_weights import find_loss_of_weights, lost_in_steps
from gramian.inspection.passes.forward_order import places
from gramian.inspection.passes.signal import SIGNAL, in_words, measure_signal
from gramian.inspection.passes.step_failures import taking_what_is_not_finite
from gramian.inspection.passes.step_records import Observed
from gramian.inspection.passes.watched_steps import NUM_BATCHES
from gramian.inspection.reporting import report_of
from gramian.inspection.rules import find
from gramian.inspection.weights.of_files import measure_file
from gramian.inspection.weights.of_model import measure_model
from gramian.loader import Batches, as_batches, first_few, is_in_memory, with_samples
from gramian.objective import Objective, as_objective
from gramian.recording.kept_batches import KeptBatches
from gramian.recording.kept_state import keeping
from gramian.recording.measuring import batch_statistics
from gramian.recording.own_state import steady
from gramian.report import Finding, Report
from gramian.seeding import kept_random

__all__ = ["inspect"]

# Batches beyond those that are looked at, of which the rows are read where all are in memory.
NUM_FURTHER = 12


def inspect(
    model_or_path: nn.Module | str | os.PathLike[str],
    batches: Batches | None = None,
    objective: Objective | Callable | None = None,
    *,
    optimizer: Optimizer | None = None,
    quick: bool = False,
    curvature: bool = False,
    layouts: Mapping[str, Any] | None = None,
    input_size: tuple[int, int] = (32, 32),
    title: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Diagnose a network without trying its remedies: `gm.inspect`, which adds `verify` and has the documentation.

    Args:
        model_or_path, batches, objective, optimizer, quick, curvature: as in `gm.inspect`.
        layouts, input_size, title, progress: as in `gm.inspect`.

    Returns: a `Report`.
    Raises:
        InputError, UnsupportedError, CheckpointError: as `gm.inspect`.
    Cost: as `gm.inspect` without `verify`.
    Source: this library's own; each finding names the source of its rule.

    >>> report = inspect(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))
    >>> report.verdict.partition(".")[0], report.not_looked_at
    ('No trouble found in 2 layers', {'signal and gradients by layer': 'no batches and objective were given'})
    """
    progress = progress or (lambda what, done, total: None)
    options: dict[str, Any] = {"quick": quick, "layouts": layouts, "input_size": input_size}
    if not isinstance(model_or_path, (str, os.PathLike)):
        model_or_path = as_model(model_or_path, "inspect")
    if curvature and (batches is None or objective is None):
        raise InputError("inspect: curvature is that of the loss; pass batches and an objective with it")
    if not isinstance(model_or_path, nn.Module):
        if batches is not None or objective is not None:
            raise InputError("inspect: a file has weights but no forward pass; pass the model to use batches")
        measured = measure_file(model_or_path, progress, **options)
        measured.skipped |= {SIGNAL: "a file has weights and no forward pass"}
        return report_of(title or os.path.basename(os.path.abspath(model_or_path)), measured, has_model=False)
    if (batches is None) != (objective is None):
        raise InputError("inspect: batches and objective go together; give both, or neither for the weights alone")
    if batches is None or objective is None:
        if optimizer is not None:
            raise InputError("inspect: an optimizer is judged by its steps; pass batches and an objective with it")
        measured = measure_model(model_or_path, progress, **options)
        measured.skipped |= {SIGNAL: "no batches and objective were given"}
        return report_of(title or type(model_or_path).__name__, measured)
    with kept_random():
        batches = as_batches(batches, "inspect")
        most = NUM_FURTHER if is_in_memory(batches) else 0
        few = first_few(batches, NUM_BATCHES + most, "inspect")
    few = [mapped(batch, lambda t: t) if has_arrays(batch) else batch for batch in few]
    few, further = few[:NUM_BATCHES], few[NUM_BATCHES:]
    num_read, few = len(few), with_samples(few, "inspect")
    objective = as_objective(objective)
    kept = KeptBatches(few)
    with keeping(model_or_path, objective.predict, objective.criterion) as state, ExitStack() as after:
        after.callback(kept.put_back)
        objective = steady(model_or_path, _on_kept(objective, kept), few[0], state)
        after.enter_context(taking_what_is_not_finite(model_or_path, few))
        given = model_or_path, few, further, objective, optimizer
        measured, found = _with_data(*given, curvature=curvature, options=options, progress=progress)
    if num_read > len(few):
        measured.notes.append(f"Batches without samples, which were left out: {num_read - len(few)} of {num_read}.")
    return report_of(title or type(model_or_path).__name__, measured, found)


def _on_kept(objective: Objective, kept: KeptBatches) -> Objective:
    """The objective, with each pass on the batches as they were given, whatever passes before it did to them."""
    predict = getattr(objective.predict, "prepares", objective.predict)

    @wraps(predict)
    def on_kept(model: nn.Module, batch: Any) -> Any:
        kept.begin(batch)
        return predict(model, batch)

    return replace(objective, predict=on_kept)


def _with_data(
    model: nn.Module,
    few: list[Any],
    further: list[Any],
    objective: Objective,
    optimizer: Optimizer | None,
    *,
    curvature: bool,
    options: dict[str, Any],
    progress: Callable[[str, int, int], None],
) -> tuple[Measured, list[Finding]]:
    """What the weights and the signal show, and the causes that were found."""
    progress("steps", 0, 1)
    observed, steps, skipped = observe_steps(model, few, objective, optimizer)
    progress("steps", 1, 1)
    sizes = observed.image_sizes if observed is not None else {}
    measured = measure_model(model, progress, image_sizes=sizes, **options)
    measured.skipped |= skipped
    given = model, few, further, objective, optimizer
    found = _measure_signal(measured, *given, observed, steps, options["layouts"], progress)
    if any(spectrum.num_nonfinite for spectrum in measured.spectra):

        def look(fresh: Optimizer | None) -> list[Finding]:
            given = model, few, further, objective, fresh
            again, causes = _with_data(*given, curvature=False, options=options, progress=lambda *_: None)
            return [*causes, *find(again)]

        try:
            causes = find_loss_of_weights(model, few, objective, optimizer, look)
        except Exception as error:
            measured.skipped |= {"what made weights NaN or infinite": in_words(error)}
        else:
            measured.lost_by = causes[0] if causes else None
            found = [*causes, *found]
    if curvature:
        measure_curvature(measured, model, few, objective, optimizer, progress)
    return measured, found


def _labels(few: Sequence[Any]) -> list[Tensor]:
    """The labels of the batches that have some."""
    found = []
    for batch in few:
        with suppress(GramianError, TypeError, ValueError, KeyError, IndexError):
            found.append(labels_of(batch))
    return [y for y in found if isinstance(y, Tensor)]


def _measure_signal(
    measured: Measured,
    model: nn.Module,
    few: list[Any],
    further: list[Any],
    objective: Objective,
    optimizer: Optimizer | None,
    observed: Observed | None,
    steps: Steps | None,
    layouts: Mapping[str, Any] | None,
    progress: Callable[[str, int, int], None],
) -> list[Finding]:
    """Measures the signal, and returns the causes that were found."""
    if observed is None:
        try:
            measure_signal(measured, model, few[0], objective, layouts, progress)
        except Exception as error:  # training steps fail, and so may this
            measured.skipped |= {SIGNAL: in_words(error)}
        lost = lost_labels(_labels(few))
        return lost or (list(training_fails(measured.skipped[FAILING])) if FAILING in measured.skipped else [])
    context = Context(model, observed, optimizer, layers=measured.layers, further=further)
    measured.frozen = frozenset(context.frozen if len(context.frozen) < len(context.parameters) else ())
    if observed.error is not None:
        measured.skipped |= {SIGNAL: f"the loss fails: {in_words(observed.error)}"}
        return list(labels_in_range(context))
    context.steps = steps
    measured.entries = observed.entries
    measured.takes_data = frozenset(raw.name for raw in observed.raw)
    measured.is_recurrent = context.is_recurrent
    measured.looked_at += ["data", "loss", "modules in training steps"]
    try:
        context.evaluated = evaluate(model, few, objective, observed.fed)
        measured.looked_at.append("evaluation mode")
    except Exception as error:  # a model that cannot run in evaluation mode
        measured.skipped |= {"evaluation mode": in_words(error)}
    try:
        context.leak = find_leak(model, observed, objective)
    except Exception as error:
        measured.skipped |= {"whether an output sees its target": in_words(error)}
    if math.isfinite(observed.loss):
        context.probes, failed = probe(model, observed, objective)
        measured.skipped |= untried(failed, objective)
        elsewhere = context.probes.share_of_constant == 0.0 or (context.probes.slope or 0.0) > ADAMW_EPS
        measured.is_satisfied = observed.first_loss == 0.0 and elsewhere
    measured.varies = not context.has_constant_output
    try:
        parts = [layer.name for layer in measured.layers if layer.frobenius_norm == 0.0 and "[" in layer.name]
        context.opening = open_zeros(model, observed, objective, parts)
        measured.waiting = context.opening.waiting
        context.zeroed = find_zeroed(model, observed, objective, context.opening.waiting)
    except Exception as error:  # a model that cannot be trained twice on one batch
        measured.skipped |= {"what starts at zero": in_words(error)}
    try:
        context.moved_by_steps = moved_by_steps(model, observed, objective)
    except Exception as error:
        measured.skipped |= {"how far a step of what is trained moves the outputs": in_words(error)}
    found: list[Finding] = []
    if steps is not None and optimizer is not None:
        try:
            found += lost_in_steps(model, optimizer, few, objective, steps.losses)
        except Exception as error:
            measured.skipped |= {STEPS: in_words(error)}
        else:
            measured.looked_at.append(STEPS)
    measured.has_learned = context.has_learned
    measured.opening = opening_matrices(context)
    for rule in CAUSES:
        try:
            found += rule(context)
        except Exception as error:  # what one rule does not understand must not hide what the others found
            measured.skipped |= {rule.__name__.replace("_", " "): f"the rule failed: {in_words(error)}"}
    measured.unexplained = far_above_guessing(context)
    measured.skipped |= context.skipped
    measured.waiting = measured.waiting if measured.waiting is None else measured.waiting | context.asleep
    try:
        with batch_statistics(model):
            measure_signal(measured, model, few[0], objective, layouts, progress)
    except Exception as error:  # in evaluation mode, in which some models return something else
        measured.skipped |= {SIGNAL: f"evaluation mode: {in_words(error)}"}
    measured.facts |= {"loss in training mode": observed.loss}
    if context.evaluated is not None:
        measured.facts |= {"loss in evaluation mode": context.evaluated.loss}
    measured.notes.append(
        f"Looked at {len(few)} batches, and no more were read: all for the data, the first for the signal."
        if len(few) > 1 and not further
        else f"Looked at {len(few)} batches, all for the data, the first for the signal; of up to {len(further)} more, "
        "which are in memory, at whether rows belong together and values are finite."
        if len(few) > 1
        else "Looked at one batch."
    )
    measured.places = places(observed, measured, context.steps.changes if context.steps else {})
    return found
