"""`inspect`: from a model or a file to a report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gramian import linalg
from gramian.errors import InputError
from gramian.gram import Gram
from gramian.inspection.measured import Measured
from gramian.inspection.rules import find
from gramian.inspection.weights import measure_file, measure_model
from gramian.objective import Objective, as_objective
from gramian.operators import end_to_end_jacobian, layer_gains
from gramian.recording import capture
from gramian.report import Layer, Report

__all__ = ["inspect"]

# Samples whose end-to-end Jacobians are taken; the report shows the median of each singular value over them.
NUM_JACOBIANS = 8


def inspect(
    model_or_path: nn.Module | str | os.PathLike[str],
    batches: Iterable[Any] | None = None,
    objective: Objective | Callable | None = None,
    *,
    quick: bool = False,
    layouts: Mapping[str, Any] | None = None,
    input_size: tuple[int, int] = (32, 32),
    title: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Reads a network's matrices and says what is wrong with it, with numbers, causes and remedies.

    Without data: the singular values of every weight matrix, and what follows from them. With `batches` and an
    `objective`: also the size of activations and gradients by depth, the gain χ of each layer with its standard error,
    whether samples can still be told apart at each depth, and the end-to-end Jacobian's singular values.

    Args:
        model_or_path: a module; or a `.safetensors` file, a Hugging Face folder, or a `.pt` state dict, read tensor by
            tensor, nothing in it executed.
        batches: any iterable of batches; the first also serves for the gains and the Jacobian.
        objective: `gm.Objective`, or a plain `loss(model, batch) -> scalar mean`.
        quick: norms, stable rank and energy ranks with their stated error, from a few products, in place of all
            singular values.
        layouts: which matrices a tensor holds, by name pattern, where the table of architectures does not know it.
        input_size: height and width of the images at which convolutions' operator norms are taken.
        title: of the report.
        progress: called as `progress(what, done, total)`.

    Returns:
        A `Report`: `.findings`, `.layers`, `.save("x.html")`, `.to_json()`.

    Raises:
        InputError: batches without an objective or the reverse, or data for a file.
        CheckpointError: the file is missing, damaged, or would run code.

    The model is measured in evaluation mode and left as it was found. A file is streamed: memory holds one tensor, and
    under `torchrun` the tensors are shared out over the ranks by cost; every rank returns the whole report.
    """
    tell = progress or (lambda what, done, total: None)
    if not isinstance(model_or_path, nn.Module):
        if batches is not None or objective is not None:
            raise InputError("inspect: a file has weights but no forward pass; pass the model to use batches")
        return _report(
            title or os.path.basename(os.path.abspath(model_or_path)),
            measure_file(model_or_path, tell, quick=quick, layouts=layouts, input_size=input_size),
        )
    if (batches is None) != (objective is None):
        raise InputError("inspect: batches and objective go together; give both, or neither for the weights alone")
    measured = measure_model(model_or_path, tell, quick=quick, layouts=layouts, input_size=input_size)
    if batches is not None and objective is not None:
        _measure_signal(measured, model_or_path, batches, as_objective(objective), tell)
    return _report(title or type(model_or_path).__name__, measured)


def _report(title: str, measured: Measured) -> Report:
    return Report(
        title, find(measured), measured.layers, measured.facts, measured.jacobian, measured.notes, measured.directions
    )


def _measure_signal(
    measured: Measured,
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective,
    tell: Callable[[str, int, int], None],
) -> None:
    batches = list(batches)
    if not batches:
        raise InputError(
            "inspect: there were no batches; pass any non-empty iterable (a generator may be spent already)"
        )
    stats = capture(
        model,
        batches,
        objective,
        fisher="empirical",
        non_finite="keep",
        progress=lambda done: tell("signal", done, len(batches)),
    )
    measured.stats = stats
    tell("gains", 0, 1)
    measured.gains = layer_gains(model, batches[0], objective)
    tell("gains", 1, 1)
    tell("jacobian", 0, 1)
    jacobian = end_to_end_jacobian(model, _first(batches[0], NUM_JACOBIANS), objective)
    if jacobian is None:
        measured.notes.append("The end-to-end Jacobian was not measured: it is too large, or rows are not samples.")
    elif torch.isfinite(jacobian).all():
        values, _ = linalg.svdvals_ex(jacobian)
        measured.jacobian = tuple(values.double().median(0).values.tolist())
    tell("jacobian", 1, 1)
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
    measured.notes.append("Measured in evaluation mode: dropout off, batch statistics as stored.")


def _parameter(name: str) -> str:
    """The block's name of a row: without the index of a matrix in a fused parameter."""
    return name.partition("[")[0]


def _first(batch: Any, num: int) -> Any:
    """The first samples of a batch of tensors, in whatever tuple, list or dict they come."""
    if isinstance(batch, Tensor):
        return batch[:num] if batch.ndim else batch
    if isinstance(batch, dict):
        return {key: _first(value, num) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [_first(value, num) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
