"""Speed on this machine: of whole models beside the dense one, and of each layer as two factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gramian.batch import tensors
from gramian.calls import prepared
from gramian.compression.budget.mixing import Form
from gramian.compression.budget.plan import Plan
from gramian.compression.budget.weighted import WeightedSVD
from gramian.compression.choosing.clock import BUSY, Race, fused_kernels, race
from gramian.compression.choosing.measuring import samples
from gramian.compression.layers.building import built, tied
from gramian.compression.layers.modules import submodule
from gramian.objective import Objective
from gramian.recording.hooks import hooks
from gramian.report.contenders import Ratio

__all__ = ["Speeds", "paced"]

SECONDS = 0.5
"""How long two models take turns; more take longer in proportion."""
LAYER_SECONDS = 0.1
"""How long a layer and its factors take turns."""
STEPS = 4
"""Halvings between rank 1 and break-even, by their ratio."""

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Speeds:
    """Times of models beside the dense one, at batch 1 and at the larger batch.

    Args:
        dense: the model as it came.
        objective: how it is called.
        batch: of which the first sample, and the first `num`, are the two batches.
        num: samples of the larger batch; no more than there are.
    """

    def __init__(self, dense: nn.Module, objective: Objective, batch: Any, num: int) -> None:
        self.dense, self.predict = dense, objective.predict
        self.one, self.many, self.num = samples(prepared(dense, batch), num)
        self.waited = 0.0

    def __call__(self, models: Mapping[str, nn.Module]) -> list[Race]:
        """The models' races at batch 1 and at the larger batch."""
        seconds = SECONDS * max(1.0, len(models) / 2)
        found = [race(models, self.predict, batch, seconds) for batch in (self.one, self.many)]
        self.waited = max(self.waited, *(one.waited for one in found))
        return found

    def ratio(self, model: nn.Module) -> Ratio:
        """How many times as fast as the dense model a model is, at the batch where it gains less."""
        return min(found.ratio("other", "dense") for found in self({"dense": self.dense, "other": model.eval()}))

    @property
    def note(self) -> str:
        """That the machine was busy, where it was."""
        if self.waited < BUSY:
            return ""
        return (
            f"the machine was busy: passes waited for a processor up to {self.waited:.0%} of the time. Times are those "
            "of passes that did not wait or, where these are few, of the processor"
        )

    def unfused(self, small: nn.Module) -> str:
        """How many modules of which class leave torch's fused kernel in the compressed model, where any do."""
        before = fused_kernels(self.dense, self.predict, self.one)
        after = fused_kernels(small.eval(), self.predict, self.one)
        lost = [f"{num - after[name]} of {num} {name}" for name, num in before.items() if after[name] < num]
        if not lost:
            return ""
        return (
            f"{' and '.join(lost)} lose torch's fused inference kernel, which takes dense weights and all heads alone; "
            "the times of the whole model include that"
        )


def paced(plan: Plan, speeds: Speeds, tell: Callable[[float, str], None]) -> Plan:
    """The plan in which each layer has only ranks at which its two factors are measured to be faster than the layer.

    Faster means that the interval excludes 1 at one of the two batches, and that neither is seen to be slower. Layers
    of one shape with inputs of one shape are measured once.

    Args:
        plan: at any share.
        speeds: the batches.
        tell: called with the share done and a remark.

    Returns:
        A plan, maybe without any layer left; the others stand in its reasons.

    Raises: what a layer raises.
    Cost: up to twelve races of a tenth of a second for each shape.
    """
    names = [name for s in plan.spectra for name in (s.name, *s.tied)]
    layers = {name: submodule(plan.model, name) for name in names}
    seen = [_inputs(plan.model, layers, speeds.predict, batch) for batch in (speeds.one, speeds.many)]
    most: dict[Any, int] = {}
    kept, reasons = [], dict(plan.reasons)
    for place, s in enumerate(plan.spectra):
        tell(place / len(plan.spectra), s.name)
        uses = [name for name in (s.name, *s.tied) if all(name in inputs for inputs in seen)]
        if not uses:
            reasons[s.name] = "its module multiplies the factors out in each pass, which saves no time"
            continue
        key = tuple(_shape(layers[name], [inputs[name] for inputs in seen]) for name in uses)
        if key not in most:
            most[key] = _fastest(s, layers, uses, seen)
        if most[key]:
            kept.append(replace(s, most=most[key]))
        else:
            reasons[s.name] = "its factors are not measured to be faster than it on this machine"
    return replace(plan, spectra=tuple(kept), reasons=reasons, forms={s.name: Form() for s in kept})


@torch.no_grad()
def _inputs(model: nn.Module, layers: Mapping[str, nn.Module], call: Any, batch: Any) -> dict[str, Inputs]:
    """What each layer is first called with."""
    seen: dict[str, Inputs] = {}
    with hooks(
        [
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: seen.setdefault(name, (args, kwargs)) and None, with_kwargs=True
            )
            for name, layer in layers.items()
        ]
    ):
        call(model, batch)
    return seen


def _shape(layer: nn.Module, inputs: list[Inputs]) -> tuple[Any, ...]:
    told = tuple((tuple(t.shape), t.dtype) for args, kwargs in inputs for t in tensors([*args, *kwargs.values()]))
    sizes = tuple((tuple(p.shape), p.dtype) for p in layer.parameters())
    return type(layer).__name__, layer.extra_repr(), sizes, told


def _fastest(s: WeightedSVD, layers: Mapping[str, nn.Module], uses: list[str], seen: list[dict[str, Inputs]]) -> int:
    """The largest rank that is measured to be faster than the dense layer, in all its uses; 0 where none is."""

    def call(made: Any, inputs: dict[str, Inputs]) -> None:
        for name, layer in zip(uses, made, strict=True):
            args, kwargs = inputs[name]
            layer(*args, **kwargs)

    dense = nn.ModuleList(layers[name] for name in uses)

    def faster(rank: int) -> bool:
        made = built(layers[s.name], s, Form(rank))
        factored = nn.ModuleList(made if name == s.name else tied(layers[name], made) for name in uses)
        models = {"dense": dense, "factored": factored.eval()}
        ratios = [race(models, call, inputs, LAYER_SECONDS).ratio("factored", "dense") for inputs in seen]
        return any(ratio.low > 1 for ratio in ratios) and not any(ratio.high < 1 for ratio in ratios)

    top = min(s.candidates.top, len(s.values))
    if not faster(1):
        return 0
    low, high = 1, top + 1
    for step in range(STEPS + 1):
        rank = top if step == 0 else round((low * high) ** 0.5)
        if low < rank < high:
            low, high = (rank, high) if faster(rank) else (low, rank)
    return low
