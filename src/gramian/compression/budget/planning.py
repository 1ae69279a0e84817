"""From a model and data to a plan: what each layer can become, and what that costs the loss."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from gramian import placement
from gramian.batch import described
from gramian.calls import as_model, unwrapped
from gramian.compression.budget.mixing import Form
from gramian.compression.budget.plan import SMALLEST, Plan
from gramian.compression.budget.predicting import Rises
from gramian.compression.budget.weighted import WeightedSVD, decompose
from gramian.compression.calibration.calibrating import Calibration, calibrate
from gramian.compression.calibration.correcting import corrected
from gramian.compression.calibration.exchanging import exchanged
from gramian.compression.calibration.measure import Measure
from gramian.compression.calibration.targets import Target, targets
from gramian.compression.calibration.weighting import Uncaptured, weighting
from gramian.compression.layers.lowrank import LowRank, matrix_of
from gramian.compression.layers.modules import copied, submodule
from gramian.compression.layers.multiplying import factored, multiply_out_
from gramian.compression.layers.opening import open_
from gramian.compression.storage.plans import packed, unpacked
from gramian.errors import GramianWarning, InputError
from gramian.loader import Batches, as_batches
from gramian.objective import Objective, as_objective
from gramian.recording.forward_failures import naming_the_layer
from gramian.statistics import Statistics

__all__ = ["by_default", "compress", "judged", "nothing"]

DEFAULT_KEEP = 0.5
VARIED = 1e-6
"""The least share of variance in the second moment of inputs; below it there is little but float32's rounding."""
FEW_UNITS = 16
"""Below so many distinct units of the loss, G says nothing of which layers matter, and every layer loses one share."""


def compress(
    model: nn.Module | str | os.PathLike[str],
    stats: Statistics | Batches | None = None,
    objective: Objective | Callable | None = None,
    *,
    batches: Batches | None = None,
    held_out: Batches | None = None,
    trained_on: int | None = None,
    keep: float | None = None,
    of: Literal["all", "factorable"] = "all",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    memory: int | float | str | None = None,
    scratch: str | os.PathLike[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """Plans how to factor, round or prune linear layers and convolutions so that the loss grows least.

    Each layer is cut where its output error, weighted by the loss's curvature, is least: the SVD of `G^½ W A^½`, with A
    the covariance of the layer's inputs (its bias takes up what the mean input loses) and G the second moment of its
    output gradients, both shrunk as far as their number of rows asks for. So weighted, the squared singular values of
    all layers are in one unit, the loss, and one budget is filled from one list. Where labels can be drawn from the
    model's output, each layer's estimate is scaled to what the gradients of its weight say on the batches kept apart.

    What the calibration lacks is warned of and stands in `plan.notes`: too few or constant samples to tell which layers
    matter (then each loses the same share), a loss whose gradient vanishes.

    Args:
        model: left untouched; the plan has a copy. Layers that are factored already are cut further. Under DDP all
            ranks call this together, each with its own batches; they share the work, and have the same plan. Or the
            folder of a model of transformers, which is then read part by part, a block at a time: for one that does
            not fit into memory, see docs/compress.md.
        stats: from `gm.capture`, best with `fisher="gauss_newton"`; or batches, as `batches`:
            `compress(model, batches, objective)`.
        batches: as in `gm.capture`, in place of `stats`; they are read once, and an eighth is kept to measure the rise
            of the loss on. With `stats`, all of them (a list) are for measuring.
        held_out: a list of batches that the model was not trained on, to measure on in place of these. On new data the
            rise may be another than on training data: without them, `plan.predicted` has a wide interval, and a number
            as if `batches` were all that the model was trained on.
        trained_on: where nothing was held out, the number of samples that the model was trained on, of which `batches`
            are all or some: then `plan.predicted` of ranks tells of new data, from how far the gradients of different
            batches agree.
        objective: how they are turned into a loss; `gm.Objective.self_distillation()` where there are no labels.
        keep: share of the parameters to keep. By default 0.5, or where rank 1 everywhere needs more than that, the
            smallest possible share, which the plan's text says.
        of: what `keep` is a share of: "all" parameters of the model, or those of the "factorable" layers' weights.
        include: name patterns (`"encoder.*"`): only layers that match one are factored.
        exclude: name patterns of layers that stay as they are.
        memory: of a folder: what the process may have, as `"6GB"`; batches are cut to fit.
        scratch: of a folder: where what waits on the disk is put; by default where temporary files are.
        progress: called with the number of layers done.

    Returns:
        A plan; `plan.at(keep=0.3).apply()`, `plan.at(size=0.2).apply()`, see `Plan.at`. A wrapper around the whole
        model (`torch.compile`, `DataParallel`) is left out of it.

    Raises:
        InputError: there are no statistics, they are not finite, a pattern matches no layer, no layer can be
            factored, or `trained_on` is no number of samples, or is given with `held_out`.

    Cost: three eigendecompositions in float64 for each layer, and 48 backward passes. What is told by `plan.predicted`
    is measured when it is first asked for: eight evaluations of up to 32 batches, or of so many of them or of
    `held_out` that a rise is known to 5 %.
    Source: whitening by A: SVD-LLM (2403.07378), §3.1; by both sides: Fisher-weighted SVD (2207.00112) with Kronecker
    factors; shrinkage: Ledoit & Wolf (Bernoulli 28, 2022).

    >>> import torch
    >>> net, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2)), torch.cat([torch.eye(16), -torch.eye(16)])
    >>> plan = compress(net, batches=[(x, x[:, :2])], objective=Objective.regression(), keep=0.6)
    >>> plan.ranks["0"] < 8, plan.parameters <= 0.6 * plan.parameters_dense
    (True, True)
    """
    if isinstance(include, str) or isinstance(exclude, str):
        raise InputError("compress: include and exclude are lists of patterns: exclude=['lm_head']")
    if trained_on is not None and (isinstance(trained_on, bool) or not isinstance(trained_on, int) or trained_on < 1):
        raise InputError(f"compress: trained_on must be a number of samples, got {trained_on!r}")
    if trained_on is not None and held_out is not None:
        raise InputError("compress: give held_out or trained_on; batches that were held out tell more")
    if isinstance(model, (str, os.PathLike)):
        from gramian.compression.sharded.streaming import compress_shards  # which plans by what stands here

        given = batches if stats is None else stats
        if given is None or isinstance(given, Statistics) or objective is None:
            raise InputError("compress: a folder needs batches and an objective: compress(folder, batches, objective)")
        if trained_on is not None:
            raise InputError("compress: trained_on is for plan.predicted, which needs the model in memory")
        options: dict[str, Any] = {"held_out": held_out, "keep": keep, "of": of, "include": include, "exclude": exclude}
        options |= {"memory": memory, "scratch": scratch, "progress": progress}
        return compress_shards(model, given, objective, **options)
    if memory is not None or scratch is not None:
        raise InputError("compress: memory and scratch are for the folder of a model, in place of the model")
    model = as_model(model, "compress")
    if stats is not None and not isinstance(stats, Statistics):
        if batches is not None:
            raise InputError(
                f"compress: expected Statistics from gm.capture before batches=, got {described(stats)}. Write "
                "compress(model, batches, objective)"
            )
        stats, batches = None, stats
    plain = unwrapped(model)
    low = factored(plain) if stats is None else {}  # statistics of a factored model are of its factors
    dense = plain
    if low:
        multiply_out_(dense := copied(plain))
    found, reasons = targets(dense, include, exclude)  # before any data is read
    found = [_cut_further(target, low, reasons) for target in found]
    found = [target for target in found if target.name not in reasons]
    if not found:
        raise nothing(plain, reasons)
    if stats is not None:
        calibration = Calibration(stats, samples=stats.units)
        judges = batches if held_out is None else held_out
        if judges is not None and objective is not None:
            calibration.measure = Measure(
                list(as_batches(judges, "compress")),
                as_objective(objective),
                new=held_out is not None,
                trained_on=trained_on,
            )
    elif batches is None or objective is None:
        given = "" if batches is None else f"; got {described(batches)} alone"
        raise InputError(
            "compress: give statistics from gm.capture, or batches and an objective: "
            f"compress(model, batches, objective){given}"
        )
    else:
        asked = {name for target in found for name in (target.inputs, target.outputs)}
        put_back = multiply_out_(model) if low else None
        try:
            calibration = calibrate(model, batches, objective, asked, held_out, trained_on)
        finally:
            if put_back is not None:
                put_back()
    notes, ranked, blind = judged(calibration)
    own = copied(plain)
    whole = copied(dense) if low else own
    for one in (own, whole):
        open_(one, [target.name for target in found])
    found = [target._replace(module=submodule(whole, target.name)) for target in found]
    spectra, uncaptured = _decomposed(found, calibration, blind, progress)
    calibration.stats, calibration.latest = stats or Statistics(), {}  # whose memory the correction needs
    reasons |= uncaptured
    if not spectra:
        raise nothing(plain, reasons)
    if ranked and calibration.objective is not None and calibration.measure is not None:
        judges = calibration.measure.batches
        with ExitStack() as stack:
            for batch in judges:  # of which any may be the one that the model cannot run on
                stack.enter_context(naming_the_layer("compress", batch, calibration.objective, whole))
            spectra = list(corrected(whole, spectra, judges, calibration.objective))
    for note in notes:
        warnings.warn(f"compress: {note}", GramianWarning, stacklevel=2)
    empty = {s.name: Form() for s in spectra}
    plan = Plan(own, tuple(spectra), 1.0, empty, reasons, of, tuple(notes), ranked)
    if calibration.measure is not None:
        measure = calibration.measure.assuming(calibration.samples)
        plan = replace(plan, rises=Rises(None, None, measure.against(own)))
    if calibration.measure is not None and calibration.measure.seen:
        few = "the rise of the loss was measured on the calibration batch itself, which flatters it"
        plan = replace(plan, notes=(*plan.notes, few))
    if keep is not None:
        return plan.at(keep=keep)
    return by_default(plan)


def _cut_further(target: Target, low: Mapping[str, LowRank], reasons: dict[str, str]) -> Target:
    """A target with the rank and the price of the factored layer that it was multiplied out of."""
    for name in (target.name, *target.tied):
        layer = low.get(name)
        if layer is not None:
            if layer.rank == 1:
                reasons[target.name] = "its factors have rank 1"
            return target._replace(rank=layer.rank, dense=sum(side.weight.numel() for side in layer.sides))
    return target


def _decomposed(
    found: Sequence[Target], calibration: Calibration, blind: bool, progress: Callable[[int], None] | None
) -> tuple[list[WeightedSVD], dict[str, str]]:
    """The layers' decompositions, and why others have none. Ranks that calibrated together share the work by cost."""
    ranks = calibration.ranks
    together = ranks is not None and ranks.together
    sides = [matrix_of(target.module).shape for target in found]
    costs = [float(m**3 + n**3) for m, n in sides]
    mine = placement.share_out(costs, ranks.group) if together else range(len(found))  # type: ignore[union-attr]
    made: dict[int, WeightedSVD | str] = {}
    with placement.agreed("compress", ranks.group) if together else nullcontext():  # type: ignore[union-attr]
        for i in mine:
            try:
                made[i] = decompose(found[i], weighting(found[i], calibration, blind=blind))
            except Uncaptured as error:
                made[i] = str(error)
            if progress is not None:
                progress(len(made))
    if together:
        each = exchanged(packed(made), ranks.group)  # type: ignore[union-attr]
        made = {i: one for part in each for i, one in unpacked(part).items()}
    layers = [made[i] for i in range(len(found))]
    reasons = {target.name: one for target, one in zip(found, layers, strict=True) if isinstance(one, str)}
    return [one for one in layers if not isinstance(one, str)], reasons


def nothing(model: nn.Module, reasons: dict[str, str]) -> InputError:
    """The error where no layer can be factored, with the reasons by layer."""
    why = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:20])
    return InputError(f"compress: no layer of {type(model).__name__} can be factored ({why or 'it has no matrices'})")


def judged(calibration: Calibration) -> tuple[list[str], bool, bool]:
    """What is wrong with the data; whether it tells which layers matter; whether G is to be left out."""
    notes, stats = list(calibration.notes), calibration.stats
    units = stats.units * calibration.distinct or math.inf  # Grams from elsewhere have no units
    sites = [site for site in stats.sites() if site.A is not None and site.G is not None]
    flat = not any(bool(site.G.diagonal.any()) for site in sites if site.G is not None)
    moments = [site.A for site in sites if site.A is not None and site.op != "embedding"]
    varied = [float((a.diagonal - a.mean.square()).sum()) > VARIED * float(a.diagonal.sum()) for a in moments]
    same = bool(moments) and not any(varied)
    poor = flat or same or units < FEW_UNITS
    shared = "layers are weighted by their inputs alone, and each loses the same share"
    if flat:
        notes.append(
            f"the gradient of the loss is zero at every layer, so nothing tells which outputs matter: {shared}"
        )
    if same:
        notes.append(f"the inputs of every layer are zero, or the same for all samples: {shared}")
    elif units < FEW_UNITS:
        what = "unit" if round(units) == 1 else "units"
        notes.append(
            f"{units:.0f} distinct {what} of the loss cannot tell which layers matter, which takes {FEW_UNITS}: "
            f"{shared}"
        )
    elif calibration.distinct < 0.5:
        notes.append(f"only {calibration.samples:.0f} samples are distinct: the others count as none")
    return notes, not poor, poor


def by_default(plan: Plan) -> Plan:
    """The plan at one half, or at the smallest possible share, and why."""
    smallest = plan.smallest
    if smallest <= DEFAULT_KEEP:
        return plan.at(keep=DEFAULT_KEEP)
    note = f"{smallest:.3f} {SMALLEST}; {DEFAULT_KEEP} is not possible{plan.left_dense()}"
    made = plan.at(keep=smallest)
    return replace(made, notes=(*made.notes, note))
