"""Causes in norms: weights of zero, statistics that are not the data's, and a mode that is not the model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from gramian.errors import some
from gramian.inspection.causes.context import SHOWN, Context
from gramian.report import Finding

__all__ = ["RULES"]

# From this number on the weight of a norm is told, where all its entries are the same.
LARGE = 8.0

# Stored statistics of a batch norm: distance of the means in standard deviations, and ratio of the variances.
SHIFT, RATIO = 3.0, 8.0

# A loss in evaluation mode is told that is more than this many times that in training mode, and this much more, once
# the statistics of batch norms have seen this many batches.
TIMES, MORE, SETTLED = 2.0, 1.0, 30
# Share of the initial statistics that is left after so many batches from which on the momentum is told.
HELD = 0.5

# Batches after which that share is looked at before training, and how far the initial statistics then are from those of
# a batch: means in standard deviations, and ratio of the variances.
BATCHES, FAR_MEAN, FAR_VARIANCE = 1000, 0.5, 2.0


def norm_gain(context: Context) -> Iterator[Finding]:
    """Find norms that pass nothing, where the output then depends on nothing. Exact."""
    zero = [
        name
        for name, module in context.modules.items()
        if "Norm" in type(module).__name__ and name in context.first_calls and _is_zero(getattr(module, "weight", None))
    ]
    blocking = [name for name in zero if name not in context.observed.branch_ends]
    if blocking and context.is_blocked:
        yield Finding(
            "norm-zero-gain",
            "error",
            f"The norm {context.told(blocking[0])} multiplies by zero",
            where=some(blocking, SHOWN),
            evidence="every entry of its weight γ is zero, and it is not the end of a residual branch (exact)",
            cause="γ was initialized to zero, or decayed to it; nothing passes.",
            advice=f"Set its weight to one: torch.nn.init.ones_ of {blocking[0]}.weight.",
        )


def norm_scale(context: Context) -> Iterator[Finding]:
    """Find norms that multiply all they normalize by the same large number, as no training leaves it. Exact."""
    gains = {
        name: getattr(module, "weight", None)
        for name, module in context.modules.items()
        if "Norm" in type(module).__name__ and name in context.first_calls
    }
    large = {name: gain for name, w in gains.items() if (gain := _one_number(w)) and LARGE <= abs(gain) < math.inf}
    if large and not context.has_learned:
        name = max(large, key=lambda n: abs(large[n]))
        yield Finding(
            "parameter-scale-large",
            "error",
            f"The norm {context.told(name)} multiplies by {large[name]:.3g}",
            where=some(large, SHOWN),
            evidence="all entries of its weight γ are this number (exact); 1 is usual",
            cause="Nothing else in a sum counts beside it, and it saturates what follows.",
            advice=f"Set its weight to one: torch.nn.init.ones_ of {name}.weight.",
        )


def _one_number(w: Tensor | None) -> float | None:
    """The number that all of several entries of a parameter are."""
    if not isinstance(w, nn.Parameter) or w.numel() < 2:
        return None
    first = w.detach().flatten()[0]
    return float(first) if bool((w == first).all()) else None


def norm_statistics(context: Context) -> Iterator[Finding]:
    """Find batch norms whose stored statistics are not those of the data, or never will be."""
    found = context.observed.statistics
    others = {name: far for name, far in found.items() if far[0] > SHIFT or far[1] > RATIO}
    held = [
        name
        for name, module in context.modules.items()
        if isinstance(module, _BATCH_NORM) and module.track_running_stats and module.momentum == 0.0
    ]
    if others:
        name, (shift, ratio) = max(others.items(), key=lambda one: max(one[1][0] / SHIFT, one[1][1] / RATIO))
        yield Finding(
            "norm-statistics",
            "error",
            f"The stored statistics of {context.told(name)} are not those of the data",
            where=some(others, SHOWN),
            evidence=f"{_distance(shift, ratio)}; so in {len(others)} batch norms",
            cause="Evaluation mode uses the stored statistics: they were averaged over other data, too few batches, or "
            "before the last large change of the weights.",
            advice="Run some batches in training mode after module.reset_running_stats(), and check the momentum.",
        )
    elif slow := _slow(context):
        name, momentum, seen = slow
        yield Finding(
            "norm-statistics",
            "error",
            f"The stored statistics of {context.told(name)} hardly change: its momentum is {momentum:g}",
            where=some([n for n, m in context.modules.items() if _is_slow(m)], SHOWN),
            evidence=f"after {seen} batches {(1 - momentum) ** seen:.0%} of them are the initial ones, 0 and 1 (exact)",
            cause="torch's momentum is the share of the new statistics, and not that of the old; evaluation mode uses "
            "statistics that are not those of the data.",
            advice="Use 0.1, or None for the average over all batches.",
        )
    elif held and any(context.model.get_submodule(name).training for name in held):
        yield Finding(
            "norm-statistics",
            "error",
            f"The stored statistics of {context.told(held[0])} never change",
            where=some(held, SHOWN),
            evidence="its momentum is 0 (exact)",
            cause="torch's momentum is the share of the new statistics, and not that of the old: with 0, evaluation "
            "mode uses the initial ones, 0 and 1.",
            advice="Use 0.1, or None for the average over all batches.",
        )


def norm_momentum(context: Context) -> Iterator[Finding]:
    """Find batch norms before training whose statistics will stay the initial ones, which are not the data's. Exact."""
    trains = context.model.training or context.optimizer is not None
    slow: dict[str, tuple[float, float]] = {}
    for name, module in context.modules.items():
        far = context.observed.initial_statistics.get(name)
        if far is None or not isinstance(module, _BATCH_NORM) or not (module.training and trains and module.momentum):
            continue
        will_hold = (1 - module.momentum) ** BATCHES > HELD
        if will_hold and _is_initial(module) and (far[0] > FAR_MEAN or far[1] > FAR_VARIANCE):
            slow[name] = far
    if slow:
        name, (shift, ratio) = max(slow.items(), key=lambda one: max(one[1][0] / FAR_MEAN, one[1][1] / FAR_VARIANCE))
        momentum = float(getattr(context.model.get_submodule(name), "momentum", 0.0))
        yield Finding(
            "norm-statistics",
            "warning",
            f"The stored statistics of {context.told(name)} will hardly change: its momentum is {momentum:g}",
            where=some(slow, SHOWN),
            evidence=f"after {BATCHES:,} batches {(1 - momentum) ** BATCHES:.0%} of them are the initial ones, 0 and "
            f"1, and half after {math.log(0.5) / math.log1p(-momentum):,.0f} (exact); {_distance(shift, ratio)}",
            cause="torch's momentum is the share of the new statistics, and not that of the old; evaluation mode uses "
            "statistics that are not those of the data.",
            advice="Use 0.1, or None for the average over all batches.",
        )


def _is_initial(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether the stored statistics are 0 and 1, up to what the batches so far have added."""
    if norm.running_mean is None or norm.running_var is None:
        return False
    if not bool(norm.running_mean.any()) and bool((norm.running_var == 1).all()):
        return True
    seen = int(norm.num_batches_tracked) if norm.num_batches_tracked is not None else 0
    return seen > 0 and (1 - float(norm.momentum or 0.0)) ** seen > HELD


def _slow(context: Context) -> tuple[str, float, int] | None:
    """The first batch norm whose statistics still are the initial ones, where the loss in evaluation mode shows it."""
    if not _disagree(context):
        return None
    for name, module in context.modules.items():
        if isinstance(module, _BATCH_NORM) and _is_slow(module):
            return name, float(module.momentum or 0.0), int(module.num_batches_tracked or 0)
    return None


def _is_slow(module: nn.Module) -> bool:
    if not isinstance(module, _BATCH_NORM) or not module.track_running_stats or not module.momentum:
        return False
    seen = int(module.num_batches_tracked if module.num_batches_tracked is not None else 0)
    return seen >= SETTLED and (1 - module.momentum) ** seen > HELD


def _disagree(context: Context) -> bool:
    trained, evaluated = context.observed.first_loss, context.evaluated.loss if context.evaluated is not None else 0.0
    return math.isfinite(trained) and evaluated > TIMES * abs(trained) + MORE


def norm_mode(context: Context) -> Iterator[Finding]:
    """Find batch norms that use stored statistics while the model is trained. Exact."""
    trains = context.model.training or context.optimizer is not None
    fixed = [
        name
        for name, module in context.modules.items()
        if isinstance(module, _BATCH_NORM)
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


def modes(context: Context) -> Iterator[Finding]:
    """Find a loss that is far larger in evaluation mode than in training mode, on the same batch."""
    trained, evaluated = context.observed.first_loss, context.evaluated.loss if context.evaluated is not None else 0.0
    norms = [m for m in context.modules.values() if isinstance(m, _BATCH_NORM) and m.track_running_stats]
    settled = all(int(m.num_batches_tracked if m.num_batches_tracked is not None else 0) >= SETTLED for m in norms)
    if settled and _disagree(context):
        yield Finding(
            "modes-disagree",
            "warning",
            f"The loss of a batch is {trained:.3g} in training mode and {evaluated:.3g} in evaluation mode",
            where="loss",
            evidence="the same batch and weights",
            cause="Evaluation mode computes something else: statistics that are not those of the data, or a branch on "
            "self.training.",
            advice="Look at what depends on module.training.",
        )


_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def _is_zero(weight: object) -> bool:
    return isinstance(weight, nn.Parameter) and not bool(weight.detach().any())


def _distance(shift: float, ratio: float) -> str:
    if math.isinf(shift):
        return "the statistics are the initial ones, 0 and 1, and weight and bias are trained"
    return (
        f"between what is stored and a batch, the means differ by {shift:.3g} standard deviations, "
        f"the variances by a factor {ratio:.3g}"
    )


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (
    norm_gain,
    norm_scale,
    norm_statistics,
    norm_momentum,
    norm_mode,
    modes,
)
