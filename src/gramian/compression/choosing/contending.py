"""The compressed model beside its alternatives, and what was decided about each layer, as a report shows them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gramian.compression.budget.mixing import Form
from gramian.compression.budget.plan import Plan
from gramian.compression.choosing.measuring import FORMS, num_bytes
from gramian.compression.choosing.searching import Tried
from gramian.compression.choosing.speeds import Speeds
from gramian.compression.layers.quantized import Quantized
from gramian.compression.storage.plans import AnyPlan
from gramian.compression.units.narrow_plan import NarrowPlan
from gramian.errors import InputError
from gramian.report.contenders import AS_CUT, FOUR_BITS, Contender, PlannedLayer

__all__ = ["contenders", "line", "planned_layers"]


@torch.no_grad()
def contenders(
    plan: AnyPlan,
    dense: nn.Module,
    small: nn.Module,
    tried: Tried,
    speeds: Speeds,
    tell: Callable[[str, float, str], None],
    cut: nn.Module | None = None,
) -> tuple[Contender, ...]:
    """The dense model, the compressed one, and both in the forms that need no plan; and the plan's 4 bits.

    Args:
        plan: that was chosen.
        dense: the model as it came.
        small: `plan.apply()`, refit or not.
        tried: what is evaluated.
        speeds: the batches whose passes are timed.
        tell: called as `tell(stage, share done, remark)`.
        cut: `plan.apply()` where the compressed model is refit; as fast, so that its passes are not timed.
    """
    models: dict[str, nn.Module] = {"dense": dense, "compressed": small.eval()}
    failed: dict[str, str] = {}
    ranks_only = isinstance(plan, NarrowPlan) or not any(form.bits for form in plan.forms.values())
    made: list[tuple[str, Callable[[], nn.Module]]] = [(name, lambda f=form: f(dense)) for name, form in FORMS.items()]
    if isinstance(plan, Plan):
        made.append((FOUR_BITS, lambda: plan.at(bits=4).apply()))
    if ranks_only:
        made += [(f"compressed, {name}", lambda f=form: f(small)) for name, form in FORMS.items()]
    for name, make in made:
        try:
            models[name] = make().eval()
            speeds.predict(models[name], speeds.one)
        except Exception as error:  # whatever keeps a model from this form stands in its row
            models.pop(name, None)
            failed[name] = line(error)
    tell("Measure", 0.1, "latency")
    one, many = speeds(models)
    rows = []
    for place, (name, model) in enumerate(models.items()):
        tell("Measure", 0.5 + place / (2 * len(models)), name)
        note, others = _left_dense(name, model), {}
        try:
            others = tried.quality.all_of(model)
            quality: float | None = others.pop(tried.quality.measure)
        except InputError:
            raise
        except Exception as error:
            quality, note = None, line(error)
        parameters = sum(p.numel() for p in (small if "compressed" in name else dense).parameters())
        times = {"latency_one": one.milliseconds(name), "latency_many": many.milliseconds(name)}
        speed = {"speed_one": one.ratio(name, "dense"), "speed_many": many.ratio(name, "dense")}
        beside = {"beside_one": one.ratio(name, "compressed"), "beside_many": many.ratio(name, "compressed")}
        held: Any = times | speed | beside
        rows.append(Contender(name, parameters, num_bytes(model), quality, note=note, others=others, **held))
    if cut is not None:
        others = tried.quality.all_of(cut)
        quality = others.pop(tried.quality.measure)
        rows.insert(2, Contender(AS_CUT, rows[1].parameters, num_bytes(cut), quality, others=others))
    tell("Measure", 1.0, "")
    rows += [Contender(name, None, None, note=why) for name, why in failed.items()]
    return tuple(rows)


def _left_dense(name: str, model: nn.Module) -> str:
    """What a form in integers leaves as it is, where that is more than a tenth of the weights."""
    integers = sum(math.prod(m.about["shape"]) for m in model.modules() if isinstance(m, Quantized))
    left = sum(p.numel() for p in model.parameters() if p.is_floating_point() and p.ndim > 1)
    if "int8" in name and not integers:
        return "the same model: int8 is for linear layers, and it has none"
    if not integers or left < 0.1 * (integers + left):
        return ""
    return f"{integers / (integers + left):.1%} of the weights are integers, the other layers as they were"


def planned_layers(plan: AnyPlan) -> tuple[PlannedLayer, ...]:
    """What becomes of each layer, and why.

    Args:
        plan: that was chosen.
    """
    rows = _narrowed(plan) if isinstance(plan, NarrowPlan) else _factored(plan)
    kept = "all units stay" if isinstance(plan, NarrowPlan) else "dense"
    return (*rows, *(PlannedLayer(name, (), None, 0, f"{kept}: {why}") for name, why in plan.reasons.items()))


def _narrowed(plan: NarrowPlan) -> list[PlannedLayer]:
    rows = []
    for layer in plan.layers:
        name, num, kept = layer.units.name, layer.units.num, plan.kept[layer.units.name]
        energy = None if kept == num else _energy(layer.losses[0] - layer.losses[kept], layer.losses[0])
        why = (
            "all units stay: worth their parameters"
            if energy is None
            else f"{energy:.1%} of what they mean to the loss"
        )
        shape = (len(layer.spectrum.left), len(layer.spectrum.values))
        rows.append(PlannedLayer(name, shape, None, plan.saved(name), why, energy, (kept, num)))
    return rows


def _factored(plan: Plan) -> list[PlannedLayer]:
    rows = []
    for (name, form), s in zip(plan.forms.items(), plan.spectra, strict=True):
        (m, n), rank = s.shape, form.rank
        if form != Form(rank):
            saved = 0 if rank is None else s.dense - rank * (m + n)
            rows.append(PlannedLayer(name, (m, n), rank, saved, str(form)))
            continue
        if rank is None:
            rows.append(PlannedLayer(name, (m, n), None, 0, "dense: worth its parameters, or factors are no smaller"))
            continue
        energy = _energy(float(s.values[:rank].square().sum()), float(s.values.square().sum()))
        saved, why = s.dense - rank * (m + n), f"{energy:.1%} of its weighted energy"
        rows.append(PlannedLayer(name, (m, n), rank, saved, why, energy))
    return rows


def _energy(kept: float, whole: float) -> float:
    return kept / whole if whole > 0 else 1.0  # the loss does not depend on it


def line(error: Exception) -> str:
    """An error of someone else's code in a few words.

    Args:
        error: any.
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
