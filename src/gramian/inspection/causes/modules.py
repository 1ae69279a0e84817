"""Causes in modules: units that do not act, norms, dropout, attention, gates, and streams that grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import fmean

from torch import nn

from gramian.errors import some
from gramian.inspection.causes.context import SHOWN, Context
from gramian.inspection.observed import Activation
from gramian.report import Action, Finding

__all__ = ["RULES"]

ISOMETRIC = Action("isometric_")

# Share of the units of a layer: told from here on, and as an error from there.
DEAD, MOSTLY_DEAD = 0.4, 0.9
SATURATED, MOSTLY_SATURATED = 0.7, 0.9
# A gate is shut if it passes less than this on average.
SHUT = 0.05
# Dropout's p: told from here on, and as an error from there.
DROPOUT, NEARLY_ALL = 0.8, 0.9
# Entropy of attention as a share of that of equal weights: told below, and as an error below half of it.
ENTROPY = 0.1
# Stored statistics of a batch norm: distance of the means in standard deviations, and ratio of the variances.
SHIFT, RATIO = 3.0, 8.0
# Growth of a residual stream from its first to its last addition, and per addition.
GROWTH, STEP = 6.0, 1.25
# A stream that falls below this share of itself is divided by a norm.
KEPT = 0.9
# Rows from which on a unit that never acts is told: with N rows it is active on less than 3/N at 95 %.
FEW = 30


def dead_units(context: Context) -> Iterator[Finding]:
    """Find layers most of whose units are zero on all rows."""
    rectified = [a for a in context.observed.activations if a.function in ("relu", "relu6", "hardtanh")]
    dead = [a for a in rectified if a.rows >= FEW and a.dead > DEAD * a.channels]
    if dead:
        worst, source = max(dead, key=lambda a: a.dead / a.channels), _source(context, dead[0])
        yield Finding(
            "dead-units",
            "error" if worst.dead > MOSTLY_DEAD * worst.channels else "warning",
            f"{worst.dead} of {worst.channels} units after {source} are never active"
            if len(dead) == 1
            else f"In {len(dead)} layers most units are never active, up to {worst.dead} of {worst.channels}",
            where=source,
            evidence=f"first after {source}, in {len(dead)} in all; "
            f"zero on all {worst.rows:,} rows: active on at most {3 / worst.rows:.2%} (95 %)",
            cause="Their pre-activations are negative for all samples: a bias or an offset of the inputs, or a rate "
            "that was too large.",
            action=ISOMETRIC,
            advice="That is for a fresh model. Otherwise lower the learning rate, or replace ReLU by LeakyReLU.",
        )


def saturated_units(context: Context) -> Iterator[Finding]:
    """Find layers most of whose outputs are at an end of their range."""
    bounded = [a for a in context.observed.activations if a.function in ("tanh", "sigmoid")]
    ends = [a for a in bounded if a.saturated > SATURATED and not _is_recurrent(context, a)]
    if ends:
        worst, source = max(ends, key=lambda a: a.saturated), _source(context, ends[0])
        yield Finding(
            "saturated-units",
            "error" if worst.saturated > MOSTLY_SATURATED else "warning",
            f"{worst.saturated:.0%} of the {worst.function} outputs after {source} are saturated"
            if len(ends) == 1
            else f"The {worst.function} outputs of {len(ends)} layers are saturated, up to {worst.saturated:.0%}",
            where="all layers" if len(ends) > 2 else source,
            evidence="within 1 % of an end of the range, where the derivative is near zero",
            cause="Pre-activations are large: weights, biases or inputs of a wrong scale.",
            action=ISOMETRIC,
        )


def gates(context: Context) -> Iterator[Finding]:
    """Find recurrent gates that let nothing through."""
    by_module: dict[str, list[float]] = {}
    for a in context.observed.activations:
        if a.function == "sigmoid" and _is_recurrent(context, a):
            by_module.setdefault(a.name, []).append(a.mean)
    lowest = {name: min(_gate_means(context.model.get_submodule(name), means)) for name, means in by_module.items()}
    shut = {name: mean for name, mean in lowest.items() if mean < SHUT}
    if shut:
        yield Finding(
            "gate-shut",
            "error",
            f"A gate of {next(iter(shut))} is shut",
            where=some(shut, SHOWN),
            evidence=f"one of its gates passes {min(shut.values()):.2g} on average over the steps",
            cause="The gate's bias is so negative that the cell neither takes nor keeps anything.",
            advice="Set the gate's biases to 0; that of the forget gate to 1.",
            source="Jozefowicz et al. 2015 (forget gate bias)",
        )


def _gate_means(module: nn.Module, means: list[float]) -> list[float]:
    """The mean over the steps of each gate of each layer, from those of all steps as they are computed.

    Layers and directions come one after the other, and in each the gates of a step together: three in an LSTM, two in
    a GRU.
    """
    gates = 3 if isinstance(module, (nn.LSTM, nn.LSTMCell)) else 2
    runs = module.num_layers * (2 if module.bidirectional else 1) if isinstance(module, nn.RNNBase) else 1
    each = max(gates, len(means) // runs)
    return [fmean(means[i : i + each][k::gates]) for i in range(0, len(means), each) for k in range(gates)]


def norm_gain(context: Context) -> Iterator[Finding]:
    """Find norms that pass nothing, where the output then depends on nothing. Exact."""
    zero = [
        name
        for name, module in context.model.named_modules()
        if "Norm" in type(module).__name__ and name in context.first_calls and _is_zero(getattr(module, "weight", None))
    ]
    blocking = [name for name in zero if name not in context.observed.branch_ends]
    if blocking and context.has_constant_output:
        yield Finding(
            "norm-zero-gain",
            "error",
            f"The norm {blocking[0]} multiplies by zero",
            where=some(blocking, SHOWN),
            evidence="every entry of its weight γ is zero, and it is not the end of a residual branch (exact)",
            cause="γ was initialized to zero, or decayed to it; nothing passes.",
            advice="torch.nn.init.ones_(norm.weight)",
        )


def norm_statistics(context: Context) -> Iterator[Finding]:
    """Find batch norms whose stored statistics are not those of the data."""
    found = context.observed.statistics
    others = {name: far for name, far in found.items() if far[0] > SHIFT or far[1] > RATIO}
    if others:
        name, (shift, ratio) = max(others.items(), key=lambda one: max(one[1][0] / SHIFT, one[1][1] / RATIO))
        yield Finding(
            "norm-statistics",
            "error",
            f"The stored statistics of {name} are not those of the data",
            where=some(others, SHOWN),
            evidence=f"{_distance(shift, ratio)}; so in {len(others)} batch norms",
            cause="Evaluation mode uses the stored statistics: they were averaged over other data, too few batches, or "
            "before the last large change of the weights.",
            advice="Run some batches in training mode after module.reset_running_stats(), and check the momentum.",
        )


def norm_mode(context: Context) -> Iterator[Finding]:
    """Find batch norms that use stored statistics while the model is trained. Exact."""
    trains = context.model.training or context.optimizer is not None
    fixed = [
        name
        for name, module in context.model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.track_running_stats
        and trains
        and not module.training
        and any(p.requires_grad for p in module.parameters())
    ]
    if fixed:
        yield Finding(
            "norm-evaluation-mode",
            "error",
            f"{len(fixed)} batch norms are in evaluation mode while the model trains",
            where=some(fixed, SHOWN),
            evidence="module.training is False, "
            + ("and that of the model True (exact)" if context.model.training else "and an optimizer is given (exact)"),
            cause="model.eval() was called on a part, or after an evaluation without model.train() for that part.",
            advice="Call model.train() before each epoch, unless the statistics are frozen on purpose.",
        )


def _is_zero(weight: object) -> bool:
    return isinstance(weight, nn.Parameter) and not bool(weight.detach().any())


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
            "error" if worst >= NEARLY_ALL else "warning",
            f"Dropout removes {worst:.0%} of the units",
            where=some([n for n, _ in high], SHOWN),
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
            where=some([n for n in names if n], SHOWN) or "all layers",
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
    if len(sizes) < 3 or any(after < KEPT * before for before, after in pairwise(sizes)):
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


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (
    dead_units,
    saturated_units,
    gates,
    norm_gain,
    norm_statistics,
    norm_mode,
    dropout,
    attention,
    streams,
)
