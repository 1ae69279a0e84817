"""A plan for a command: read from a file, or made of batches, by one process or by all of torchrun's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gramian import placement
from gramian.block import blocks
from gramian.calls import prepared
from gramian.compression.budget.plan import Plan
from gramian.compression.budget.planning import compress
from gramian.compression.choosing.contending import line
from gramian.compression.storage.plans import AnyPlan, load_plan, save_plan
from gramian.compression.units.narrow_plan import NarrowPlan
from gramian.compression.units.narrowing import narrow
from gramian.errors import CheckpointError, GramianError, InputError
from gramian.objective import Objective, as_objective
from gramian.recording import evaluating
from gramian.samples import first_samples

__all__ = ["plan_for"]

MOST_OUTPUTS = 32


def plan_for(
    model: nn.Module,
    batches: Sequence[Any],
    objective: Objective | Callable,
    *,
    narrower: bool = False,
    plan_file: str | Path | None = None,
    trained_on: int | None = None,
    progress: Callable[[str, float, str], None] | None = None,
) -> AnyPlan:
    """A plan of `gm.compress` or `gm.narrow`, with the exact G where the model has few outputs.

    Collective: under a process group all ranks call it with the same model and batches. Each calibrates with its share
    of the batches, they share out the decompositions, and have one plan.

    Args:
        model: left untouched; not wrapped.
        batches: all of them, on every rank.
        objective: as in `gm.capture`.
        narrower: whether heads, units and channels are removed, as by `gm.narrow`.
        plan_file: a plan that is read in place of a calibration; where there is no such file, the first rank writes it.
        trained_on: as in `gm.compress`.
        progress: called as `progress(stage, share done, remark)`.

    Raises:
        CheckpointError: the file is another plan.
        InputError: as `gm.compress`, on every rank.
    Cost: that of `gm.compress`; with n ranks, about an n-th of it, and a sum of all Grams.
    """
    tell = progress or (lambda stage, share, remark: None)
    if plan_file is not None and placement.any_rank(Path(plan_file).exists()):
        tell("Plan", 1.0, f"read from {Path(plan_file).name}")
        with placement.agreed("compress"):
            return _read(model, plan_file, narrower)
    rank, size = placement.world()
    shared = f", by {size} processes" if size > 1 else ""
    tell("Calibrate", 0.0, f"{len(batches)} batches{shared}")
    layers = max(1, len(blocks(model).blocks))
    verb, done_as = (narrow, "narrowed") if narrower else (partial(compress, trained_on=trained_on), "factored")
    with evaluating(model), placement.agreed("compress"):
        exact = _exact(as_objective(objective), model, batches[0])
    with _together(model) as called:
        plan = verb(
            called,
            batches=batches[rank::size],
            objective=exact,
            progress=lambda done: tell("Calibrate", min(0.99, done * size / layers), f"{done * size} layers {done_as}"),
        )
    num = len(plan.layers if isinstance(plan, NarrowPlan) else plan.spectra)
    tell("Calibrate", 1.0, f"{num} layers can be {done_as}")
    if plan_file is not None:
        with placement.agreed("compress"):
            if rank == 0:
                save_plan(plan, plan_file)
    return plan


def _read(model: nn.Module, plan_file: str | Path, narrower: bool) -> AnyPlan:
    plan = load_plan(model, plan_file)
    if not isinstance(plan, NarrowPlan if narrower else Plan):
        raise CheckpointError(
            f"{plan_file} is a plan of {'ranks' if narrower else 'gm.narrow'}. "
            f"{'Leave out' if narrower else 'Add'} --narrow, or give another path"
        )
    return plan


@contextmanager
def _together(model: nn.Module) -> Iterator[nn.Module]:
    """The model under DDP where there are several ranks: `compress` and `narrow` are then collective.

    DDP refuses a model that is frozen as a whole, so such a one is not while it is wrapped.
    """
    if not placement.is_distributed():
        yield model
        return
    whole = not any(p.requires_grad for p in model.parameters())
    frozen = [p for p in model.parameters() if whole and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        wrapped = DistributedDataParallel(model)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    yield wrapped


def _exact(objective: Objective, model: nn.Module, batch: Any) -> Objective:
    """The objective with Gauss–Newton's G where that costs few backward passes, one for each output; else as it is."""
    try:
        with torch.no_grad():
            output = objective.predict(model, first_samples(prepared(model, batch), 1))
    except GramianError:
        raise
    except Exception as error:
        raise InputError(f"compress: {type(model).__name__} fails on the first batch: {line(error)}") from error
    if objective.gauss_newton is None or objective.fisher == "gauss_newton":
        return objective
    few = isinstance(output, Tensor) and output.shape[-1] <= MOST_OUTPUTS
    return replace(objective, fisher="gauss_newton") if few else objective
