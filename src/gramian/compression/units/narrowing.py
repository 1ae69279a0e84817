"""Narrowing: whole heads, hidden units and channels are removed; what is left are ordinary, smaller layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from gramian.batch import num_samples, tensors
from gramian.block import Block, blocks
from gramian.calls import as_model, prepared, unwrapped
from gramian.compression.budget.planning import judged
from gramian.compression.budget.points import measured_points
from gramian.compression.budget.predicting import REMOVED, Rises
from gramian.compression.budget.weighted import WeightedSVD
from gramian.compression.calibration.calibrating import calibrate
from gramian.compression.calibration.correcting import corrected
from gramian.compression.calibration.measure import Measure
from gramian.compression.calibration.targets import Target, adapted, by_pattern, why_not
from gramian.compression.calibration.weighting import Uncaptured, Weighting, weighting
from gramian.compression.layers.feedback import feedback_of
from gramian.compression.layers.lowrank import matrix_of
from gramian.compression.layers.modules import clean_module_name, copied, module_name, submodule
from gramian.compression.units.attention_heads import find_heads
from gramian.compression.units.cutting import numbers_for
from gramian.compression.units.elimination import Elimination, eliminated
from gramian.compression.units.flow import Units, find_units
from gramian.compression.units.narrow_plan import Narrowed, NarrowPlan
from gramian.compression.units.zeroed_runs import is_elementwise
from gramian.errors import GramianWarning, InputError
from gramian.layers import operation_of
from gramian.loader import Batches
from gramian.objective import Objective, as_objective, differentiates
from gramian.recording import evaluating
from gramian.recording.hooks import hooks
from gramian.recording.measuring import by_modules
from gramian.samples import first_samples

__all__ = ["may_narrow", "narrow"]

SAMPLES = 2
"""Of the first batch, with which units are looked for."""


def narrow(
    model: nn.Module,
    batches: Batches,
    objective: Objective | Callable,
    *,
    held_out: Batches | None = None,
    keep: float | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> NarrowPlan:
    """Plans which attention heads, hidden units and channels to remove so that the loss grows least.

    What can be removed is found by setting outputs of layers to zero and comparing what changes, so it does not depend
    on the classes of modules, but for `nn.MultiheadAttention`: rows of one or several matrices (gate and up; Q, K and
    V) and columns of the one that they feed, with what a norm between them holds. The columns that stay are moved to
    make up for those that go, by least squares on the layer's inputs. The result has the same modules, with fewer rows
    and columns (torch's attention becomes a `NarrowAttention`): it is faster on any hardware, and can be compressed
    further by `gm.compress`.

    Args:
        model: left untouched; the plan has a copy.
        batches: as in `gm.compress`.
        objective: as in `gm.compress`.
        held_out: as in `gm.compress`.
        keep: share of the parameters to keep; by default all, and `plan.at(keep=…)` chooses.
        include: name patterns of layers; only inputs of these are removed.
        exclude: name patterns of layers that stay as they are, rows and columns.
        progress: called with the number of layers done.

    Returns:
        A plan; `plan.at(keep=0.6).apply()`.

    Raises:
        InputError: no units can be removed, with the reasons; or as `gm.compress`.

    Cost: forward passes of two samples, some dozens for each layer; for a layer of n inputs half of `n³`
    multiplications in float64; 48 backward passes and nine evaluations of the batches kept apart.
    Source: optimal brain surgeon (Hassibi & Stork 1992), of whole columns, weighted by both second moments as in
    `gm.compress`.

    >>> net, x = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2)), torch.randn(64, 8)
    >>> plan = narrow(net, batches=[(x, x[:, :2])], objective=Objective.regression(), keep=0.5)
    >>> plan.apply()[2].in_features, plan.parameters <= 0.5 * plan.parameters_dense
    (15, True)
    """
    model = as_model(model, "narrow")
    if isinstance(include, str) or isinstance(exclude, str):
        raise InputError("narrow: include and exclude are lists of patterns: exclude=['lm_head']")
    plain = unwrapped(model)
    own = copied(plain)
    known, reasons = _layers(own, exclude)
    calibration = calibrate(model, batches, objective, held_out=held_out)
    measure = calibration.measure
    assert measure is not None
    notes, ranked, blind = judged(calibration)
    few = [_few(batch) for batch in measure.batches]
    predict_ = _predict(as_objective(objective), own, few[0])

    def call(net: nn.Module, samples: Sequence[Any] = few[:1]) -> Tensor:
        with by_modules():
            outputs = [predict_(net, prepared(net, batch)) for batch in samples]
        made = [t for output in outputs for t in tensors(output) if t.is_floating_point()]
        if not made:
            raise InputError("narrow: the model's output holds no floating-point tensor")
        return torch.cat([t.detach().flatten().float() for t in made])

    def call_all(net: nn.Module) -> Tensor:  # another batch may take another way through the model
        return call(net, few)

    wanted = {name: block for name, block in known.items() if not by_pattern(name, include, ())}
    reasons |= dict.fromkeys(known.keys() - wanted.keys(), "not included")
    consumers = [name for name, block in wanted.items() if not why_not(block)]
    heads, whole = find_heads(own, consumers, exclude)
    apart = [name for name in consumers if name not in whole.keys() | {units.name for units in heads}]
    found, without = find_units(own, apart, known, call)
    reasons |= whole | without
    layers: list[Narrowed] = []
    for units in sorted((*heads, *found), key=lambda units: consumers.index(units.name)):
        numbers = numbers_for(own, units, call_all)
        if isinstance(numbers, str):
            reasons[units.name] = numbers
            continue
        block = known[units.name]
        target = Target(units.name, block.module, block, block.name, block.name, block.parameter.numel())
        try:
            weights = weighting(target, calibration, blind=blind)
        except Uncaptured as error:
            reasons[units.name] = str(error)
            continue
        w = matrix_of(block.module)
        gone = eliminated(w, weights, units.num)
        layers.append(Narrowed(units, gone.order, _spectrum(target, w, gone, weights), numbers, _price(own, units)))
        if progress is not None:
            progress(len(layers))
    if not layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:20])
        raise InputError(f"narrow: nothing of {type(plain).__name__} can be removed ({why or 'it has no matrices'})")
    if ranked and calibration.objective is not None:
        spectra = corrected(own, [layer.spectrum for layer in layers], measure.batches, calibration.objective)
        layers = [replace(layer, spectrum=s) for layer, s in zip(layers, spectra, strict=True)]
    for note in notes:
        warnings.warn(f"narrow: {note}", GramianWarning, stacklevel=2)
    whole = {layer.units.name: layer.units.num for layer in layers}
    plan = NarrowPlan(own, tuple(layers), 1.0, whole, reasons, tuple(notes))
    plan = replace(plan, rises=_measured(plan, measure.against(own)))
    return plan if keep is None else plan.at(keep=keep)


def may_narrow(model: nn.Module) -> bool:
    """Whether there can be units: two layers at least, of which one produces what the other takes, or heads.

    Args:
        model: any module.

    >>> may_narrow(nn.Linear(4, 4)), may_narrow(nn.MultiheadAttention(4, 2)), may_narrow(nn.MultiheadAttention(4, 1))
    (False, True, False)
    """
    known = _layers(model, ())[0]
    return len(known) > 1 or bool(find_heads(model, known, ())[0])


def _layers(model: nn.Module, exclude: Sequence[str]) -> tuple[dict[str, Block], dict[str, str]]:
    """Layers whose rows can be cut, by name, and why others cannot."""
    known: dict[str, Block] = {}
    reasons: dict[str, str] = {}
    adapters = adapted(model)
    for block in blocks(model).blocks:
        name, module = module_name(block), block.module
        if isinstance(module, nn.RNNBase):
            reasons[name] = "the units of recurrent modules are not narrowed"
        if operation_of(module).factors not in ("linear", "convolution"):
            continue
        depthwise = is_elementwise(module)
        reason = (
            by_pattern(name, None, exclude) or adapters.get(id(module), "") or ("" if depthwise else why_not(block))
        )
        if reason:
            reasons[name] = reason
        elif not depthwise:
            known[name] = block
    for raw, module in model.named_modules():
        if is_parametrized(module) and operation_of(module).factors in ("linear", "convolution"):
            reasons[clean_module_name(raw)] = (
                "its weight is computed by a parametrization: remove_parametrizations first"
            )
    return known, reasons


def _predict(objective: Objective, model: nn.Module, batch: Any) -> Callable[[nn.Module, Any], Any]:
    """The objective's `predict`; where that differentiates, what the model returns when it is first called.

    A derivative needs the whole way from the input to the output, of which parts are put in by hand here.
    """
    with evaluating(model):
        if not differentiates(objective, model, batch):
            return objective.predict

    def first(model: nn.Module, batch: Any) -> Any:
        def end(module: nn.Module, args: Any, output: Any) -> None:
            raise _Returned(output)

        with hooks([model.register_forward_hook(end)]):
            try:
                return objective.predict(model, batch)
            except _Returned as returned:
                return returned.args[0]

    return first


class _Returned(BaseException):
    """The model's output; no loss's own `except Exception` keeps it."""


def _few(batch: Any) -> Any:
    return first_samples(batch, min(SAMPLES, num_samples(batch)))


def _spectrum(target: Target, w: Tensor, gone: Elimination, weights: Weighting) -> WeightedSVD:
    """The steps as what a decomposition has: the last to go is the last to lose."""
    m, n = w.shape
    return WeightedSVD(
        target.name,
        (gone.values * weights.matters).flip(0),
        gone.left.flip(1),
        gone.right.flip(0),
        weights.mean,
        n * (m + n) + 1,  # any number of columns may stay
        feedback_of(weights.columns, weights.rows, weights.seen),
        (),
        gone.values.new_ones(n),
    )


def _price(model: nn.Module, units: Units) -> int:
    total = submodule(model, units.name).get_parameter("weight").numel()
    for name in dict.fromkeys(part.name for part in units.parts):
        total += sum(p.numel() for p in submodule(model, name).parameters(recurse=False))
    return max(1, total // units.num)


def _measured(plan: NarrowPlan, measure: Measure) -> Rises:
    """The rise of the loss at a few shares of what can be removed."""
    parts = [plan.at(keep=1 - removed * (1 - plan.smallest)) for removed in REMOVED]
    points = measured_points(plan.model, measure, [(part.predicted_loss, part.apply, True) for part in parts])
    return Rises(points, measure=measure)
