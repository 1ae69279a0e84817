"""Causes in modules: units that do not act, norms, dropout, attention, gates, and streams that grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

from torch import nn

from gramian.inspection.causes.context import Context, listed
from gramian.inspection.observing import Activation
from gramian.report import Action, Finding

__all__ = ["RULES"]

# Share of the units of a layer: told from here on, and as an error from there.
DEAD, MOSTLY_DEAD = 0.4, 0.9
SATURATED = 0.7
# A gate is shut if it passes less than this on average.
SHUT = 0.05
DROPOUT = 0.8
ENTROPY = 0.1
# Stored statistics of a batch norm: distance of the means in standard deviations, and ratio of the variances.
SHIFT, RATIO = 3.0, 8.0
# Growth of a residual stream from its first to its last addition, and per addition.
GROWTH, STEP = 6.0, 1.25
# Rows from which on a unit that never acts is told: with N rows it is active on less than 3/N at 95 %.
FEW = 30


def units(context: Context) -> Iterator[Finding]:
    """Find layers most of whose units are zero on all rows, or at an end of their range."""
    dead = [a for a in context.observed.activations if "relu" in a.function or a.function == "hardtanh"]
    dead = [a for a in dead if a.rows >= FEW and a.dead > DEAD * a.channels]
    if dead:
        worst = max(dead, key=lambda a: a.dead / a.channels)
        yield Finding(
            "dead-units",
            "error" if worst.dead > MOSTLY_DEAD * worst.channels else "warning",
            f"{worst.dead} of {worst.channels} units after {_source(context, dead[0])} are never active"
            if len(dead) == 1
            else f"In {len(dead)} layers most units are never active, up to {worst.dead} of {worst.channels}",
            where=_source(context, dead[0]),
            evidence=f"first after {_source(context, dead[0])}, in {len(dead)} in all; "
            f"zero on all {worst.rows:,} rows: active on at most {3 / worst.rows:.2%} (95 %)",
            cause="Their pre-activations are negative for all samples: a bias or an offset of the inputs, or a rate "
            "that was too large.",
            action=Action("isometric_"),
            advice="That is for a fresh model. Otherwise lower the learning rate, or replace ReLU by LeakyReLU.",
        )
    gates = [a for a in context.observed.activations if a.function == "sigmoid" and _is_recurrent(context, a)]
    by_module: dict[str, list[Activation]] = {}
    for a in gates:
        by_module.setdefault(a.name, []).append(a)
    for name, found in by_module.items():
        kinds = 3 if isinstance(context.model.get_submodule(name), (nn.LSTM, nn.LSTMCell)) else 2
        means = [sum(a.mean for a in found[k::kinds]) / len(found[k::kinds]) for k in range(min(kinds, len(found)))]
        if min(means) < SHUT:
            yield Finding(
                "gate-shut",
                "error",
                f"A gate of {name} is shut",
                where=name,
                evidence=f"one of its gates passes {min(means):.2g} on average",
                cause="The gate's bias is so negative that the cell neither takes nor keeps anything.",
                advice="Set the gate's biases to 0; that of the forget gate to 1.",
                source="Jozefowicz et al. 2015 (forget gate bias)",
            )
    ends = [
        a for a in context.observed.activations if a.function in ("tanh", "sigmoid") and not _is_recurrent(context, a)
    ]
    ends = [a for a in ends if a.saturated > SATURATED]
    if ends:
        worst = max(ends, key=lambda a: a.saturated)
        yield Finding(
            "saturated-units",
            "error" if worst.saturated > 0.9 else "warning",
            f"{worst.saturated:.0%} of the {worst.function} outputs after {_source(context, ends[0])} are saturated"
            if len(ends) == 1
            else f"The {worst.function} outputs of {len(ends)} layers are saturated, up to {worst.saturated:.0%}",
            where=_source(context, ends[0])
            if len(ends) == 1
            else "all layers"
            if len(ends) > 2
            else _source(context, ends[0]),
            evidence="within 1 % of an end of the range, where the derivative is near zero",
            cause="Pre-activations are large: weights, biases or inputs of a wrong scale.",
            action=Action("isometric_"),
        )


def norms(context: Context) -> Iterator[Finding]:
    """Find norms that pass nothing, whose stored statistics are not those of the data, or that do not use batches."""
    observed = context.observed
    zero, others, frozen = [], [], []
    for name, module in context.model.named_modules():
        weight = getattr(module, "weight", None)
        if "Norm" in type(module).__name__ and isinstance(weight, nn.Parameter) and weight.ndim == 1:
            call = context.first_calls.get(name)
            if not bool(weight.detach().abs().amax() > 1e-6) and call is not None:
                zero.append(name)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            trains = context.model.training or context.optimizer is not None
            if trains and not module.training and any(p.requires_grad for p in module.parameters()):
                frozen.append(name)
            shift, ratio = observed.statistics.get(name, (0.0, 1.0))
            if shift > SHIFT or ratio > RATIO:
                others.append((name, shift, ratio))
    blocking = [n for n in zero if n not in observed.branch_ends]
    if blocking and context.has_constant_output:
        yield Finding(
            "norm-zero-gain",
            "error",
            f"The norm {blocking[0]} multiplies by zero",
            where=listed(blocking),
            evidence="every entry of its weight γ is zero, and it is not the end of a residual branch (exact)",
            cause="γ was initialized to zero, or decayed to it; nothing passes.",
            advice="torch.nn.init.ones_(norm.weight)",
        )
    if others:
        name, shift, ratio = max(others, key=lambda one: max(one[1] / SHIFT, one[2] / RATIO))
        yield Finding(
            "norm-statistics",
            "error",
            f"The stored statistics of {name} are not those of the data",
            where=listed([n for n, *_ in others]),
            evidence=_distance(shift, ratio) + f"; so in {len(others)} batch norms",
            cause="Evaluation mode uses the stored statistics: they were averaged over other data, too few batches, or "
            "before the last large change of the weights.",
            advice="Run some batches in training mode after module.reset_running_stats(), and check the momentum.",
        )
    if frozen:
        yield Finding(
            "norm-evaluation-mode",
            "error",
            f"{len(frozen)} batch norms are in evaluation mode while the model trains",
            where=listed(frozen),
            evidence="module.training is False, "
            + ("and that of the model True (exact)" if context.model.training else "and an optimizer is given (exact)"),
            cause="model.eval() was called on a part, or after an evaluation without model.train() for that part.",
            advice="Call model.train() before each epoch, unless the statistics are frozen on purpose.",
        )


def dropout(context: Context) -> Iterator[Finding]:
    """Find dropout that drops nearly all."""
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    high = [(n, m.p) for n, m in context.model.named_modules() if isinstance(m, kinds) and m.p >= DROPOUT]
    for name, module in context.model.named_modules():
        p = getattr(module, "dropout", None)
        if isinstance(p, float) and p >= DROPOUT and isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            high.append((name, p))
    if high:
        worst = max(p for _, p in high)
        yield Finding(
            "dropout-rate",
            "error" if worst >= 0.9 else "warning",
            f"Dropout removes {worst:.0%} of the units",
            where=listed([n for n, _ in high]),
            evidence=f"p = {worst:g}; usual are 0 to 0.5",
            cause="torch's p is the share that is dropped; 1 − p was perhaps meant.",
            advice="Lower p.",
        )


def attention(context: Context) -> Iterator[Finding]:
    """Find attention that sees one key only."""
    low = [a for a in context.observed.attentions if a.entropy < ENTROPY]
    if low:
        worst = min(low, key=lambda a: a.entropy)
        names = list(dict.fromkeys(a.name for a in low))
        yield Finding(
            "attention-saturated",
            "error" if worst.entropy < ENTROPY / 2 else "warning",
            f"The attention of {worst.name or 'the model'} looks at one key only",
            where=listed([n for n in names if n]) or "all layers",
            evidence=f"the entropy of its weights is {worst.entropy:.1%} of that of equal weights, on average",
            cause="The scores q·k are large, so that softmax passes nearly no gradient: a missing 1/√d, or "
            "large weights of q and k.",
            advice="Scale the scores by 1/√d, normalize q and k, or initialize their weights smaller.",
        )


def streams(context: Context) -> Iterator[Finding]:
    """Find a residual stream that grows from addition to addition."""
    additions = [a for a in context.observed.additions if a.rms > 0]
    shapes = [a.shape for a in additions]
    stream = max(set(shapes), key=shapes.count, default=None)
    sizes = [a.rms for a in additions if a.shape == stream]
    if len(sizes) < 3 or any(after < 0.9 * before for before, after in pairwise(sizes)):
        return  # too few, or a norm divides the stream
    ratios = sorted(after / before for before, after in pairwise(sizes))
    growth = sizes[-1] / sizes[0]
    # Without the largest ratio: the first branch may be much larger than a small embedding, and is not growth.
    if growth / max(ratios[-1], 1.0) > GROWTH and ratios[len(ratios) // 2] > STEP:
        first = context.observed.additions[0].name
        yield Finding(
            "residual-growth",
            "error",
            f"The residual stream grows {growth:.2g} times over {len(sizes)} additions",
            where="all layers",
            evidence=f"root mean square {sizes[0]:.3g} after {first or 'the first'}, {sizes[-1]:.3g} after the last: "
            f"{growth ** (1 / len(ratios)):.2f} times for each",
            cause="Each branch adds as much as the stream holds or more, and no norm divides it.",
            advice="Normalize the input of each branch, and begin with branches whose last layer is zero or scaled by "
            "1 over the root of their number.",
            source="Zhang et al. 1901.09321; De & Smith 2002.10444",
        )


def _distance(shift: float, ratio: float) -> str:
    if math.isinf(shift):
        return "the statistics are the initial ones, 0 and 1, and weight and bias are trained"
    return (
        f"between what is stored and a batch, the means differ by {shift:.3g} standard deviations, "
        f"the variances by a factor {ratio:.3g}"
    )


def _is_recurrent(context: Context, activation: Activation) -> bool:
    try:
        module = context.model.get_submodule(activation.name)
    except AttributeError:
        return False
    return isinstance(module, (nn.RNNBase, nn.RNNCellBase))


def _source(context: Context, activation: Activation) -> str:
    """The module with parameters before an activation, to which its pre-activations are due."""
    before = [c for c in context.observed.calls if c.order < activation.order and c.name != activation.name]
    owned = [c.name for c in before if any(True for _ in context.model.get_submodule(c.name).parameters(recurse=False))]
    return owned[-1] if owned else activation.name


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (units, norms, dropout, attention, streams)
