"""`inspect`: from a model or a file to a report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gramian import linalg
from gramian.block import blocks
from gramian.checkpoint import open_checkpoint
from gramian.errors import InputError
from gramian.gram import Gram
from gramian.inspection.rules import find
from gramian.inspection.spectra import Spectrum, describe
from gramian.objective import Objective, as_objective
from gramian.operators import Gain, end_to_end_jacobian, layer_gains
from gramian.recording import capture
from gramian.report import Layer, Report
from gramian.statistics import Statistics

__all__ = ["Measured", "inspect"]

# Samples whose end-to-end Jacobians are taken; the report shows the median of each singular value over them.
NUM_JACOBIANS = 8


@dataclass
class Measured:
    """Everything that was measured of one model, for the rules to read."""

    layers: list[Layer]
    spectra: list[Spectrum]
    dtype: torch.dtype = torch.float32
    stats: Statistics | None = None
    gains: dict[str, Gain | None] = field(default_factory=dict)
    jacobian: tuple[float, ...] = ()
    facts: dict[str, float | int | str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def inspect(
    model_or_path: nn.Module | str | os.PathLike[str],
    batches: Iterable[Any] | None = None,
    objective: Objective | Callable | None = None,
    *,
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
        title: of the report.
        progress: called as `progress(what, done, total)`.

    Returns:
        A `Report`: `.findings`, `.layers`, `.save("x.html")`, `.to_json()`.

    Raises:
        InputError: batches without an objective or the reverse, or data for a file.
        CheckpointError: the file is missing, damaged, or would run code.

    The model is measured in evaluation mode and left as it was found.
    """
    tell = progress or (lambda what, done, total: None)
    if not isinstance(model_or_path, nn.Module):
        if batches is not None or objective is not None:
            raise InputError("inspect: a file has weights but no forward pass; pass the model to use batches")
        return _report(title or os.path.basename(os.path.abspath(model_or_path)), _read_file(model_or_path, tell))
    if (batches is None) != (objective is None):
        raise InputError("inspect: batches and objective go together; give both, or neither for the weights alone")
    measured = _read_model(model_or_path, tell)
    if batches is not None and objective is not None:
        _measure_signal(measured, model_or_path, batches, as_objective(objective), tell)
    return _report(title or type(model_or_path).__name__, measured)


def _report(title: str, measured: Measured) -> Report:
    return Report(
        title, find(measured), measured.layers, measured.facts, jacobian=measured.jacobian, notes=measured.notes
    )


def _read_file(path: str | os.PathLike[str], tell: Callable[[str, int, int], None]) -> Measured:
    checkpoint = open_checkpoint(path)
    measured = Measured([], [], notes=list(checkpoint.notes))
    skipped: dict[str, list[str]] = {}
    parameters = 0
    for i, (name, entry) in enumerate(checkpoint.entries.items()):
        tell("spectra", i, len(checkpoint))
        tied = bool(entry.tied_to)
        if entry.kind != "float" or tied:
            reason = f"the same memory as {entry.tied_to}" if tied else f"{entry.kind} ({entry.dtype})"
            skipped.setdefault(reason, []).append(name)
            continue
        tensor = checkpoint.load(name)
        parameters += tensor.numel()
        if tensor.ndim < 2:
            if not torch.isfinite(tensor).all():
                _add_vector(measured, name, tensor)
            continue
        kind = f"{tensor.ndim}-D tensor, rows × the rest" if tensor.ndim > 2 else "matrix"
        _add(measured, name, kind, tensor.flatten(1), tensor)
    tell("spectra", len(checkpoint), len(checkpoint))
    for reason, names in skipped.items():
        measured.notes.append(f"Left out, {reason}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}")
    measured.facts |= {"parameters": parameters, "matrices": len(measured.layers)}
    return measured


def _read_model(model: nn.Module, tell: Callable[[str, int, int], None]) -> Measured:
    found, rest = blocks(model)
    measured = Measured([], [])
    if found:
        measured.dtype = found[0].parameter.dtype
    for i, block in enumerate(found):
        tell("spectra", i, len(found))
        matrices = block.split().flatten(0, -3) if len(block.shape) > 2 else block.split()[None]
        for k, matrix in enumerate(matrices):
            name = block.name if len(matrices) == 1 else f"{block.name}[{k}]"
            _add(measured, name, block.kind, matrix, matrix)
    tell("spectra", len(found), len(found))
    for r in rest:
        if not torch.isfinite(r.parameter).all():
            _add_vector(measured, r.name, r.parameter.detach())
    measured.facts |= {
        "parameters": sum(b.parameter.numel() for b in found) + sum(r.parameter.numel() for r in rest),
        "matrices": len(measured.layers),
    }
    return measured


def _add(measured: Measured, name: str, kind: str, matrix: Tensor, whole: Tensor) -> None:
    spectrum = describe(matrix)
    measured.spectra.append(spectrum)
    measured.layers.append(
        Layer(
            name=name,
            kind=kind,
            shape=tuple(matrix.shape),
            depth=len(measured.layers),
            dtype=spectrum.dtype,
            parameters=whole.numel(),
            singular_values=spectrum.singular_values,
            frobenius_norm=spectrum.frobenius_norm,
            spectral_norm=spectrum.spectral_norm,
            condition=spectrum.condition,
            stable_rank=spectrum.stable_rank,
            effective_rank=spectrum.effective_rank,
            numerical_rank=spectrum.numerical_rank,
            note="; ".join(spectrum.notes),
        )
    )


def _add_vector(measured: Measured, name: str, vector: Tensor) -> None:
    """A vector has no spectrum; it is only listed where it holds what is not finite."""
    bad = int((~torch.isfinite(vector)).sum())
    shape = tuple(vector.shape) or (1,)
    dtype = str(vector.dtype).removeprefix("torch.")
    measured.spectra.append(Spectrum((shape[0], 1), dtype, num_nonfinite=bad))
    measured.layers.append(Layer(name, "vector", shape, len(measured.layers), dtype, vector.numel()))


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
