"""The modules in the order of the forward pass, with what was measured at each: the report's picture by depth."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gramian.inspection.measurements import Measured
from gramian.inspection.passes.records import Call
from gramian.inspection.passes.step_records import Observed
from gramian.report import Layer, Place

__all__ = ["places"]


def places(observed: Observed, measured: Measured, updates: Mapping[str, float]) -> list[Place]:
    """Return the calls of modules that apply parameters or have no children, each with its numbers.

    Args:
        observed: the watched training step.
        measured: with gradients and gains in its layers.
        updates: relative change in the optimizer's first step, by parameter; empty where none was given.

    Returns: one place a call, in forward order. A module with several matrices has the mean of their logarithms.
    Cost: linear.
    """
    of_module: dict[str, list[Layer]] = {}
    for layer in measured.layers:
        of_module.setdefault(_module(layer.name), []).append(layer)
    steps: dict[str, list[float]] = {}
    for name, update in updates.items():
        steps.setdefault(_module(name), []).append(update)
    return [_place(call, of_module.get(call.name, []), steps.get(call.name, [])) for call in observed.calls]


def _place(call: Call, layers: list[Layer], updates: list[float]) -> Place:
    out = call.output
    return Place(
        call.name,
        call.kind,
        out.rms,
        out.between / out.rms if out.is_finite and out.rms > 0 else None,
        _mean([layer.gradient_rms for layer in layers]),
        _mean([layer.gain for layer in layers]),
        _mean(updates),
    )


def _mean(values: list[float | None] | list[float]) -> float | None:
    """The geometric mean; of values that have no logarithm, the largest."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if all(math.isfinite(value) and value > 0 for value in known):
        return math.exp(math.fsum(map(math.log, known)) / len(known))
    return max(known)


def _module(parameter: str) -> str:
    return parameter.partition("[")[0].rpartition(".")[0]
