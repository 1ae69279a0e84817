"""`inspect`: from a model or a file to a report."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import length_hint
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gramian import linalg
from gramian.batch import first_samples
from gramian.calls import as_model
from gramian.errors import InputError
from gramian.gram import Gram
from gramian.inspection.causes import CAUSES, Context, ordered
from gramian.inspection.causes.data import labels_in_range
from gramian.inspection.measured import Measured
from gramian.inspection.observing import NUM_BATCHES, observe
from gramian.inspection.rules import find
from gramian.inspection.stepping import take_steps
from gramian.inspection.weights import measure_file, measure_model
from gramian.loader import Batches, as_batches, first_few
from gramian.objective import Objective, as_objective
from gramian.operators import NoJacobian, layer_gains, try_jacobian
from gramian.recording import capture
from gramian.recording.measuring import batch_statistics
from gramian.report import Finding, Layer, Report
from gramian.report.model import COVERAGE, HALF

__all__ = ["inspect"]

# Samples at which the end-to-end Jacobian is computed; the report shows the median of each singular value over them.
NUM_JACOBIANS = 8


def inspect(
    model_or_path: nn.Module | str | os.PathLike[str],
    batches: Batches | None = None,
    objective: Objective | Callable | None = None,
    *,
    optimizer: Optimizer | None = None,
    quick: bool = False,
    layouts: Mapping[str, Any] | None = None,
    input_size: tuple[int, int] = (32, 32),
    title: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Diagnose a network from its matrices: what is wrong, how sure that is, why, and what to do.

    Without data the report has the singular values of every weight matrix and what follows from them. With `batches`
    and an `objective` it also has the size of activations and gradients by depth, the gain χ of each layer with its
    standard error, how much samples still differ at each depth, and the end-to-end Jacobian's singular values.

    A few training steps are watched in the mode in which the model is trained, without taking them. Second moments,
    gains and the Jacobian are measured without dropout, and with the statistics of the batch in batch norms. The model
    is left as it was. A file is read one tensor at a time. Under `torchrun`
    the ranks divide the tensors between them by cost, and every rank returns the whole report.

    Args:
        model_or_path: a module; or a `.safetensors` file, a Hugging Face folder, or a `.pt` state dict, of which
            nothing is executed.
        batches: a `DataLoader`, a list or another iterable of batches, which is read once; see docs/objectives.md. The
            first batch also serves for the gains and the Jacobian.
        objective: `gm.Objective`, or a plain `loss(model, batch) -> scalar mean`.
        optimizer: made for this model. Its settings are judged, and a few of its steps are taken on a copy of both.
        quick: compute norms, stable rank and energy ranks with error bounds, from a few products, and not all singular
            values.
        layouts: the matrices in a tensor, by name pattern, for architectures that are not in the table of layers.
        input_size: height and width of the images for which convolutions' operator norms are computed.
        title: of the report.
        progress: called as `progress(what, done, total)`.
    Returns: a `Report`, with `.findings`, `.layers`, `.save("x.html")` and `.to_json()`.
    Raises:
        InputError: batches without an objective or the reverse, or data for a file.
        UnsupportedError: weights without values (on the meta device, or of a lazy layer that has not run).
        CheckpointError: the file is missing, damaged, or would run code.
    Cost: that of `describe` for each matrix; with data, four training steps, a pass of `capture`, one backward pass,
        and a Jacobian of 8 samples; with an optimizer, seven steps and a copy of both. Memory: for a file, one tensor
        and a few matrices of its smaller side.
    Source: this library's own; each finding names the source of its rule.

    >>> report = inspect(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))
    >>> report.verdict, report.layers[0].shape
    ('No trouble found in 2 layers.', (8, 8))
    """
    progress = progress or (lambda what, done, total: None)
    if not isinstance(model_or_path, (str, os.PathLike)):
        model_or_path = as_model(model_or_path, "inspect")
    if not isinstance(model_or_path, nn.Module):
        if batches is not None or objective is not None:
            raise InputError("inspect: a file has weights but no forward pass; pass the model to use batches")
        return _report(
            title or os.path.basename(os.path.abspath(model_or_path)),
            measure_file(model_or_path, progress, quick=quick, layouts=layouts, input_size=input_size),
        )
    if (batches is None) != (objective is None):
        raise InputError("inspect: batches and objective go together; give both, or neither for the weights alone")
    data = None
    if batches is not None and objective is not None:
        data = as_batches(batches, "inspect"), as_objective(objective)
    measured = measure_model(model_or_path, progress, quick=quick, layouts=layouts, input_size=input_size)
    if data is not None:
        found = _measure_signal(measured, model_or_path, *data, optimizer, layouts, progress)
        return _report(title or type(model_or_path).__name__, measured, found)
    if optimizer is not None:
        raise InputError("inspect: an optimizer is judged by its steps; pass batches and an objective with it")
    return _report(title or type(model_or_path).__name__, measured)


def _report(title: str, measured: Measured, causes: Sequence[Finding] | None = None) -> Report:
    found = find(measured) if causes is None else ordered((*causes, *find(measured)))
    return Report(title, found, measured.layers, measured.facts, measured.jacobian, measured.notes, measured.directions)


def _measure_signal(
    measured: Measured,
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective,
    optimizer: Optimizer | None,
    layouts: Mapping[str, Any] | None,
    progress: Callable[[str, int, int], None],
) -> list[Finding]:
    """Measures the signal, and returns the causes that were found."""
    total = length_hint(batches)
    few, batches = first_few(batches, NUM_BATCHES, "inspect")
    progress("steps", 0, 1)
    try:
        observed = observe(model, few, objective)
    except Exception as error:  # batch norm of one sample, say, which only evaluation mode can run
        measured.notes.append(f"No training step was watched: {_in_words(error)}. So causes were not looked for.")
        _measure_moments(measured, model, few[0], batches, objective, layouts, progress, total)
        return []
    context = Context(model, observed, optimizer, layers=measured.layers)
    measured.gated = context.has_zero_gates
    if observed.error is not None:
        measured.notes.append(f"The signal was not measured, since the loss fails: {_in_words(observed.error)}.")
        return list(labels_in_range(context))
    if optimizer is not None and math.isfinite(observed.loss):
        try:
            context.steps = take_steps(model, optimizer, few, objective)
        except Exception as error:  # an optimizer that cannot be copied, or a step that fails
            measured.notes.append(f"The optimizer's steps were not measured: {_in_words(error)}.")
    found: list[Finding] = []
    for rule in CAUSES:
        try:
            found += rule(context)
        except Exception as error:  # what one rule does not understand must not hide what the others found
            measured.notes.append(f"The rule for {rule.__name__.replace('_', ' ')} failed: {_in_words(error)}.")
    progress("steps", 1, 1)
    with batch_statistics(model):
        _measure_moments(measured, model, few[0], batches, objective, layouts, progress, total)
    measured.facts |= {"loss in training mode": observed.loss}
    return found


def _measure_moments(
    measured: Measured,
    model: nn.Module,
    first: Any,
    batches: Iterable[Any],
    objective: Objective,
    layouts: Mapping[str, Any] | None,
    progress: Callable[[str, int, int], None],
    total: int,
) -> None:
    stats = capture(
        model,
        batches,
        objective,
        layouts=layouts,
        fisher="empirical",
        non_finite="keep",
        progress=lambda done: progress("signal", done, max(done, total)),
    )
    measured.stats = stats
    measured.notes += stats.summary()
    progress("gains", 0, 1)
    _measure_gains(measured, model, first, objective)
    progress("gains", 1, 1)
    progress("jacobian", 0, 1)
    _measure_jacobian(measured, model, first, objective)
    progress("jacobian", 1, 1)
    order = {name: i for i, name in enumerate(stats)}
    last = len(order)

    def key(layer: Layer) -> tuple[int, int]:
        return order.get(_parameter(layer.name), last), layer.depth

    rows = sorted(zip(measured.layers, measured.spectra, strict=True), key=lambda row: key(row[0]))
    measured.spectra = [spectrum for _, spectrum in rows]
    measured.layers = []
    for depth, (layer, _) in enumerate(rows):
        sites = stats.get(_parameter(layer.name))
        site = sites[0] if sites else None
        gain = measured.gains.get(_parameter(layer.name))
        measured.layers.append(
            replace(
                layer,
                depth=depth,
                gain=gain.chi if gain else None,
                activation_rms=site.A.rms if site and isinstance(site.A, Gram) else None,
                gradient_rms=site.G.rms if site and site.G is not None else None,
                note="; ".join(part for part in (layer.note, site.reason if site else "") if part),
            )
        )
    measured.facts |= {"loss per unit": stats.loss, "units": int(stats.units)}
    if stats.coverage < HALF:
        measured.facts[COVERAGE] = stats.coverage
    measured.notes.append("Measured without dropout, and with the batch's statistics in batch norms.")


def _measure_gains(measured: Measured, model: nn.Module, batch: Any, objective: Objective) -> None:
    try:
        measured.gains = layer_gains(model, batch, objective)
    except Exception as error:  # a model that runs may still not be differentiated layer by layer
        measured.notes.append(f"The gains were not measured: {_in_words(error)}.")
        return
    known = sum(gain is not None for gain in measured.gains.values())
    if known < len(measured.gains):
        measured.notes.append(
            f"The gain was measured for {known} of {len(measured.gains)} layers. It is not defined where a layer is "
            "used several times, or where the next layer's input depends on more than this layer (a skip, attention)."
        )


def _measure_jacobian(measured: Measured, model: nn.Module, batch: Any, objective: Objective) -> None:
    what = "The end-to-end Jacobian was not measured"
    try:
        try:
            found = try_jacobian(model, first_samples(batch, NUM_JACOBIANS), objective)
        except Exception:  # a part of a batch may be none: the nodes of a graph without the other ends of its edges
            found = try_jacobian(model, batch, objective)
    except Exception as error:
        measured.notes.append(f"{what}: {_in_words(error)}.")
        return
    if isinstance(found, NoJacobian):
        measured.notes.append(f"{what}: {found.reason}.")
        measured.is_chain = found.is_chain
        if not found.is_chain:
            measured.notes.append("So the gradients of the first and the last layer were not compared either.")
    elif torch.isfinite(found).all():
        values, _ = linalg.svdvals_ex(found)
        measured.jacobian = tuple(values.double().median(0).values.tolist())
    else:
        measured.notes.append(f"{what}: it is not finite.")


def _in_words(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.') if lines else 'no message'}"


def _parameter(name: str) -> str:
    """Return a row's block: its name without the index of a matrix in a fused parameter."""
    return name.partition("[")[0]
