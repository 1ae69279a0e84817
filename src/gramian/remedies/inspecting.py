"""`gm.inspect`: a diagnosis, and on request its remedies, verified."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gramian.batch import described, mapped
from gramian.calls import as_model
from gramian.errors import InputError, UnsupportedError
from gramian.inspection import inspect as diagnose
from gramian.inspection.trainability import DECADES_LOST, decades_lost
from gramian.loader import Batches, as_batches, first_few, is_in_memory, no_batches, with_samples
from gramian.misuse import known_names
from gramian.objective import Objective, as_objective
from gramian.placement import is_distributed
from gramian.recording.kept_state import keeping
from gramian.remedies.fitting import fitted
from gramian.remedies.performing import Setting
from gramian.remedies.verifying import verified
from gramian.report import Report
from gramian.seeding import kept_random

__all__ = ["inspect"]

# Batches that are kept for rehearsals.
NUM_BATCHES = 16


@contextmanager
def _without_echoes() -> Iterator[None]:
    """Without torch's warning of sizes that are broadcast in a loss, at each of many passes: a finding says it once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using a target size", UserWarning)
        yield


@_without_echoes()
@known_names(
    "inspect", loss="objective", criterion="objective", loader="batches", data="batches", model="model_or_path"
)
def inspect(
    model_or_path: nn.Module | str | os.PathLike[str],
    batches: Batches | None = None,
    objective: Objective | Callable | None = None,
    *,
    optimizer: Optimizer | None = None,
    verify: bool = False,
    quick: bool = False,
    curvature: bool = False,
    layouts: Mapping[str, Any] | None = None,
    input_size: tuple[int, int] = (32, 32),
    title: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Diagnose a network from its matrices: what is wrong, how sure that is, why, and what to do.

    Without data the report has the singular values of every weight matrix and what follows from them. With `batches`
    and an `objective` it also has the size of activations and gradients by depth, the gain χ of each layer with its
    standard error, how much samples still differ at each depth, and the end-to-end Jacobian's singular values.

    A training step is watched in the mode in which the model is trained, without taking it, with gradients whether the
    caller has switched them off or not. Sizes, gains and the
    Jacobian are measured without dropout, and with the statistics of the batch in batch norms. The model is left as it
    was. A file is read one tensor at a time. Under `torchrun` the ranks divide the tensors between them by cost, and
    every rank returns the whole report.

    With `verify` the remedies of errors and warnings are tried on copies of the model and the optimizer, each followed
    by 50 training steps with and without it; those that do not help are not offered, and more kinds of findings get a
    remedy (see docs/inspect.md). The lines that are offered may name `model`, `batches`, `sample` (the first batch),
    `objective` and `optimizer`.

    Args:
        model_or_path: a module; or a `.safetensors` file, a Hugging Face folder, or a `.pt` state dict, of which
            nothing is executed.
        batches: a `DataLoader`, a list or another iterable of batches, of which the first four are read, and up to 16
            with `verify` or where they are in memory: a list, or a loader of tensors without workers. See
            docs/objectives.md. Most is measured on the first.
        objective: `gm.Objective`, or a plain `loss(model, batch) -> scalar mean`.
        optimizer: made for this model. Its settings are judged, and a few of its steps are taken on a copy of both.
        verify: whether to try the remedies.
        quick: compute norms, stable rank and energy ranks with error bounds, from a few products, and not all singular
            values.
        curvature: also compute the five largest eigenvalues of the loss's Hessian, by absolute value, and the largest
            of the Gauss–Newton matrix; needs batches. See docs/curvature.md.
        layouts: the matrices in a tensor, by name pattern, for architectures that are not in the table of layers.
        input_size: height and width of the images for which convolutions' operator norms are computed.
        title: of the report.
        progress: called as `progress(what, done, total)`.

    Returns: a `Report`, with `.findings`, `.layers`, `.save("x.html")` and `.to_json()`.
    Raises:
        InputError: batches without an objective or the reverse, data for a file, `verify` or `curvature` without data,
            or a module that cannot run on what it is given; a model made in `torch.inference_mode()`.
        UnsupportedError: weights without values (on the meta device, or of a lazy layer that has not run); `verify` on
            several ranks.
        CheckpointError: the file is missing, damaged, or would run code.
    Cost: the singular values of each matrix; with data, some 7 to 15 training steps, of small networks 30, and with an
        optimizer four more and a copy of both; with `curvature`, some hundred products with the Hessian, about four
        passes of the batches each, and as many vectors of the parameters in float64. Memory: with data, a copy of
        parameters, buffers and batches in main memory; for a file, one tensor and a few matrices of its smaller side.
        With `verify`, 100 training steps, and 50 to 500 and a second diagnosis for each finding, with two copies of the
        model and of the optimizer for each action that is tried.
    Source: this library's own; each finding names the source of its rule.

    >>> report = inspect(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))
    >>> report.outcome, report.layers[0].shape
    ('No trouble found in 2 layers. Looked at: weights.', (8, 8))
    """
    options: dict[str, Any] = {"optimizer": optimizer, "quick": quick, "layouts": layouts, "input_size": input_size}
    options |= {"curvature": curvature, "title": title, "progress": progress}
    if not isinstance(model_or_path, (str, os.PathLike)):
        model_or_path = as_model(model_or_path, "inspect")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        is_class = isinstance(optimizer, type) and issubclass(optimizer, Optimizer)
        name = optimizer.__name__ if is_class else "AdamW"
        home = "gm.optim" if is_class and optimizer.__module__.startswith("gramian.") else "torch.optim"
        given = f"the class {name}" if is_class else described(optimizer)
        raise InputError(
            f"inspect: optimizer is a torch optimizer made for this model; got {given}. Write "
            f"optimizer={home}.{name}(model{'' if home == 'gm.optim' else '.parameters()'}, lr=0.001)"
        )
    if batches is not None and torch.is_inference_mode_enabled():
        _check_can_train(model_or_path)
        batches = map(_outside_inference, as_batches(batches, "inspect"))
    # In the caller's torch.no_grad() or torch.inference_mode() there would be no training step to watch.
    with torch.inference_mode(False), torch.enable_grad():
        if not verify and (batches is None or objective is None):
            return _with_decades_lost(diagnose(model_or_path, batches, objective, **options))
        if not verify:
            first: list[Any] = []
            batches = as_batches(batches, "inspect")
            if is_in_memory(batches):
                with kept_random():
                    batches = first_few(batches, NUM_BATCHES, "inspect")
            report = diagnose(model_or_path, _noted(batches, first), objective, **options)
            report = _with_decades_lost(report)
            if not first or objective is None or not isinstance(model_or_path, nn.Module):
                return report
            return fitted(report, Setting(model_or_path, first, objective, optimizer))
        if batches is None or objective is None:
            raise InputError(
                "inspect: remedies are verified by training; pass batches and an objective with verify=True"
            )
        if is_distributed():
            raise UnsupportedError("inspect: remedies are verified in one process; run it without torchrun")
        with kept_random():
            few = first_few(as_batches(batches, "inspect"), NUM_BATCHES, "inspect")
        report = _with_decades_lost(diagnose(model_or_path, few, objective, **options))
        model, few = as_model(model_or_path, "inspect"), with_samples(few, "inspect")
        loss, setting = as_objective(objective), Setting(model, few, objective, optimizer)
        with kept_random(), keeping(model, few, loss.predict, loss.criterion):
            report = fitted(report, setting)
        try:
            with keeping(model, few, loss.predict, loss.criterion):
                return verified(report, setting, progress=progress)
        except Exception as error:  # a model or an optimizer that cannot be copied
            report.notes.append(f"Remedies were not verified: {type(error).__name__}: {error}.")
            return report


def _noted(batches: Iterable[Any], first: list[Any]) -> Iterable[Any]:
    """The batches, the first of which is kept."""
    if isinstance(batches, list):
        first += batches[:1]
        return batches
    return _noting(batches, first)


def _noting(batches: Iterable[Any], first: list[Any]) -> Iterator[Any]:
    for batch in batches:
        if not first:
            first.append(batch)
        yield batch
    if not first:
        raise no_batches(batches, "inspect")


def _with_decades_lost(report: Report) -> Report:
    """The report, with what a plain network of some depth loses on the way, among its facts."""
    lost = decades_lost(report)
    if lost is not None:
        report.facts[DECADES_LOST] = lost
    return report


def _check_can_train(model: Any) -> None:
    tensors = (*model.parameters(), *model.buffers()) if isinstance(model, nn.Module) else ()
    if any(t.is_inference() for t in tensors):
        raise InputError(
            "inspect: the model was made in torch.inference_mode(), so that its weights can have no gradient; "
            "make it outside"
        )


def _outside_inference(batch: Any) -> Any:
    """The batch with copies of tensors that no gradient may pass."""
    return mapped(batch, lambda t: t.clone() if t.is_inference() else t)
