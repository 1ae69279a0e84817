"""Causes in functions with two ends: units that are saturated, and gates that let nothing through."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import fmean

from torch import nn

from gramian.errors import some
from gramian.inspection.causes.context import SHOWN, Context
from gramian.inspection.passes.records import Activation, Gate, Source
from gramian.report import Action, Finding

__all__ = ["RULES"]

# Share of the units of a layer: told from here on, and as an error from there.
SATURATED, MOSTLY_SATURATED = 0.7, 0.9
# So many sigmoids, and more than half of all functions between layers, are told: two train.
SEVERAL = 3
# A gate is shut if it passes less than this on average, and hardly any of its entries is above a half: one that is
# open at few places may select them.
SHUT, OPENED = 0.05, 0.01
# From here on it is an error; at once where it multiplies a recurrent state, of which each step loses the rest.
TIGHT = 0.01
# Share of the pre-activation from which on its bias is what shuts a gate.
MOSTLY = 0.5


def saturated_units(context: Context) -> Iterator[Finding]:
    """Find layers most of whose outputs are at an end of their range."""
    bounded = [a for a in context.activations if a.function in ("tanh", "sigmoid") and not _is_gate(context, a)]
    ends = [a for a in _steps_together(context, bounded) if a.saturated > SATURATED]
    if ends:
        worst, first = max(ends, key=lambda a: a.saturated), ends[0]
        source = first.name if _is_cell(context, first) else context.source_of(first)
        yield Finding(
            "saturated-units",
            "info" if context.has_learned else "error" if worst.saturated > MOSTLY_SATURATED else "warning",
            f"{worst.saturated:.0%} of the {worst.function} outputs "
            f"{'in' if source == first.name else 'after'} {context.told(source)} are saturated"
            if len(ends) == 1
            else f"The {worst.function} outputs of {len(ends)} layers are saturated, up to {worst.saturated:.0%}",
            where="all layers" if len(ends) > 2 or not source else source,
            evidence="within 1 % of an end of the range, where the derivative is near zero",
            cause="Pre-activations are large: weights, biases or inputs of a wrong scale.",
            action=Action("isometric_"),
        )


def sigmoids(context: Context) -> Iterator[Finding]:
    """Find networks whose layers have sigmoids between them, which are no gates. Exact."""
    seen = context.observed
    last = max(seen.used.values(), default=0)
    between = [a for a in seen.activations if a.order < last and a.order not in seen.weighing]
    hidden = [a for a in between if not _is_cell(context, a)]
    found = [a for a in hidden if a.function == "sigmoid"]
    if len(found) < SEVERAL or 2 * len(found) <= len(hidden) or context.has_learned:
        return
    names = tuple(dict.fromkeys(a.name for a in found if type(context.modules.get(a.name)) is nn.Sigmoid))
    yield Finding(
        "gain-below-one",
        "warning",
        f"Sigmoids stand between the layers, {len(found)} in all",
        where="all layers",
        evidence="each passes at most a quarter of a change (exact); the mean of what they put out is "
        f"{fmean(a.mean for a in found):.2g}",
        cause="What layers behind them see is mostly one number for all samples, and the gradient shrinks at each: "
        "norms bring back its size, and not what it says. A sigmoid is for gates and probabilities.",
        action=Action("rectify", {"names": names}) if names else None,
        advice="" if names else "Use ReLU or GELU between layers.",
        source="Glorot and Bengio 2010, §3",
    )


def gates(context: Context) -> Iterator[Finding]:
    """Find gates that let nothing through: of recurrent cells, gated units, channels and branches."""
    groups = _groups(context.observed.gates)
    shut = [group for group in groups if _is_shut(group) and not _is_meant(context, group, groups)]
    if not shut:
        return
    biases = {name: None for group in shut for name in _biases_that_shut(context, group)}
    group = min(shut, key=_passed)
    gate, passed, own = group[0], _passed(group), _biases_that_shut(context, group)
    is_recurrent = any(g.carries for g in group)
    told = f"A gate of {context.told(_place(context, gate))} is" if len(shut) == 1 else f"{len(shut)} gates are"
    yield Finding(
        "gate-shut",
        "info" if context.has_learned else "error" if is_recurrent or (passed < TIGHT and not own) else "warning",
        f"{told} {'' if passed < TIGHT else 'nearly '}shut",
        where=some(list(dict.fromkeys(_place(context, g[0]) or "all layers" for g in shut)), SHOWN),
        evidence=f"{'1 − ' if gate.is_flipped else ''}{gate.function} in {context.told(gate.name)} passes {passed:.2g} "
        "on average, and as much of the gradient"
        + (f"; {passed * (1 - passed):.2g} of it reaches its pre-activations" if gate.function == "sigmoid" else "")
        + f"; these are {_level(group):.3g} on average"
        + "".join(f", {bias:.3g} of it by {name}" for name, bias in own.items()),
        cause=f"{some(own, SHOWN)} shuts it, so that what it multiplies "
        + ("is not kept from step to step." if is_recurrent else "neither acts nor learns.")
        if own
        else "No bias shuts it, but the weights before it, what they multiply, or a constant that is added.",
        action=Action("reset", {"names": tuple(biases)}) if biases else None,
        advice=_advice(gate, is_recurrent=is_recurrent, by_bias=bool(own)),
        source="Jozefowicz et al. 2015 (forget gate bias)" if is_recurrent else "",
    )


def _groups(found: Sequence[Gate]) -> list[list[Gate]]:
    """Gates that are one: the same in all steps of a recurrent cell."""
    groups: dict[tuple, list[Gate]] = {}
    for gate in found:
        key = (gate.sources or gate.order, gate.function, gate.is_flipped)
        groups.setdefault(key, []).append(gate)
    return list(groups.values())


def _passed(group: Sequence[Gate]) -> float:
    return fmean(gate.mean * gate.times for gate in group)


def _level(group: Sequence[Gate]) -> float:
    return fmean(gate.level for gate in group)


def _is_shut(group: Sequence[Gate]) -> bool:
    return _passed(group) < SHUT and fmean(gate.opened for gate in group) < OPENED


def _is_meant(context: Context, group: Sequence[Gate], groups: Sequence[Sequence[Gate]]) -> bool:
    """Whether what a gate shuts off is of no need: 1 − it passes something else, or it is a small number by design."""
    gate = group[0]
    if all(g.is_partnered for g in group) and not any(g.carries for g in group):
        partner = next((o for o in groups if _is_partner(gate, o[0])), None)
        if partner is not None and _size(partner) >= SHUT * _size(group):
            return True
    if all(g.has_skip for g in group) and not gate.depends:
        return True  # a branch that a learned number lets begin small, as LayerScale does
    # Products of probabilities behind all layers, as of an object and its class, are no gates.
    return all(g.weighs for g in group) and gate.at > max(context.observed.used.values(), default=0)


def _is_partner(gate: Gate, other: Gate) -> bool:
    return (gate.sources or gate.order, gate.function, not gate.is_flipped) == (
        other.sources or other.order,
        other.function,
        other.is_flipped,
    )


def _size(group: Sequence[Gate]) -> float:
    """Root mean square of what a gate multiplies, over all steps."""
    return math.sqrt(fmean(gate.size**2 for gate in group))


def _biases_that_shut(context: Context, group: Sequence[Gate]) -> dict[str, float]:
    """The biases, with their means, that make the larger part of a gate's pre-activations."""
    level = _level(group)
    found = {source.name: _mean(context, source, level) for source in group[0].sources if source.is_bias}
    found = {name: mean for name, mean in found.items() if mean * level > 0}
    return found if sum(found.values()) / level >= MOSTLY else {}


def _mean(context: Context, source: Source, level: float) -> float:
    """The mean of a bias over its rows; where these are not known, its entry that is the farthest towards the level."""
    values = context.parameters[source.name].detach().float().flatten()
    if source.stop is not None:
        return float(values[source.start : source.stop : source.step].mean())
    return float(values.mean() if abs(level) < 1 else values.min() if level < 0 else values.max())


def _place(context: Context, gate: Gate) -> str:
    """The module that shuts a gate: the one that owns its bias or weights, else the one in which it multiplies."""
    named = sorted(gate.sources, key=lambda source: not source.is_bias)
    return (context.module_of(named[0].name) or named[0].name) if named else gate.name


def _advice(gate: Gate, *, is_recurrent: bool, by_bias: bool) -> str:
    if by_bias:
        return "A forget gate begins best at a bias of 1." if is_recurrent else "A bias of 0 leaves a gate half open."
    weights = [source.name for source in gate.sources if not source.is_bias]
    first = f"Initialize {some(weights, SHOWN)} smaller, or normalize what it multiplies" if weights else "Raise it"
    return f"{first}; if forward adds a constant, move it. Between −2 and 2 a pre-activation keeps a gate open."


def _is_gate(context: Context, activation: Activation) -> bool:
    """Whether an activation is a gate that is shut or open, which `gates` judges."""
    made = [gate for gate in context.observed.gates if gate.order == activation.order]
    return any(min(gate.mean, 1 - gate.mean) < SHUT for gate in made)


def _steps_together(context: Context, found: Sequence[Activation]) -> list[Activation]:
    """Activations in their order; of torch's own cells, all gates and states of all steps are one."""
    together: dict[str, list[Activation]] = {}
    for i, one in enumerate(found):
        together.setdefault(one.name if _is_cell(context, one) else str(i), []).append(one)
    return [replace(of[0], saturated=fmean(a.saturated for a in of)) for of in together.values()]


def _is_cell(context: Context, activation: Activation) -> bool:
    try:
        module = context.model.get_submodule(activation.name)
    except AttributeError:
        return False
    return isinstance(module, (nn.RNNBase, nn.RNNCellBase))


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (saturated_units, sigmoids, gates)
