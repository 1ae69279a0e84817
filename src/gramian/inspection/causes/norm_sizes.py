"""Causes in what norms average over: too few values, or one sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

from torch import nn

from gramian.batch import num_samples
from gramian.errors import GramianError, some
from gramian.inspection.causes.context import SHOWN, Context
from gramian.report import Finding

__all__ = ["RULES"]

_BATCH_NORM = nn.modules.batchnorm._BatchNorm

# Values per channel up to which a batch norm leaves little but their signs: of two, ±1.
FEW_VALUES = 3


def norm_size(context: Context) -> Iterator[Finding]:
    """Find norms over one value, which erase it, and batch norms over two or three. Exact."""
    counts = {name: _values(context, name, module) for name, module in context.modules.items()}
    single = [name for name, count in counts.items() if count == 1]
    if single:
        yield Finding(
            "norm-single-value",
            "error",
            f"The norm {context.told(single[0])} divides each value by itself",
            where=some(single, SHOWN),
            evidence="it normalizes over one value (exact), so that its output is the same whatever comes in, or ±1",
            cause="The dimension over which it normalizes has one entry: a wrong normalized_shape, or as many groups "
            "as channels where there are no positions.",
            advice="Normalize over the features: LayerNorm(features), or fewer groups.",
        )
    few = {
        name: count
        for name, count in counts.items()
        if count and 1 < count <= FEW_VALUES and isinstance(context.model.get_submodule(name), _BATCH_NORM)
    }
    if few:
        name, count = next(iter(few.items()))
        yield Finding(
            "norm-few-values",
            "warning",
            f"The batch norm {context.told(name)} averages over {count} values",
            where=some(few, SHOWN),
            evidence=f"{count} values for each channel in a batch (exact); so in {len(few)} batch norms",
            cause="Normalized, two values are ±1 whatever they were, and three keep one number; the stored statistics "
            "are as noisy.",
            advice="Use larger batches, or GroupNorm or LayerNorm.",
        )
    alone = [] if few else _alone(context)
    if alone:
        yield Finding(
            "norm-few-values",
            "info" if context.has_learned else "warning",
            f"The batch norm {context.told(alone[0])} averages over one sample",
            where=some(alone, SHOWN),
            evidence=f"all {len(context.observed.batches)} batches hold one sample (exact); so in {len(alone)} batch "
            "norms",
            cause="In training each sample is normalized by its own statistics, so that what its averages over "
            "positions tell is lost, and in evaluation mode by those of all: two different functions.",
            advice="Use larger batches, or GroupNorm, which takes one sample's statistics in both modes.",
            source="Wu & He 1803.08494, figure 1",
        )


def _alone(context: Context) -> list[str]:
    """The batch norms that take one sample at a time, at several positions, and store statistics of all."""
    sizes = [_num_samples(batch) for batch in context.observed.batches]
    if len(sizes) < 2 or set(sizes) != {1}:
        return []
    return [
        name
        for name, call in context.first_calls.items()
        if isinstance(norm := context.modules[name], _BATCH_NORM)
        and norm.training
        and norm.track_running_stats
        and len(call.shape) > 2
        and call.shape[0] == 1
    ]


def _num_samples(batch: Any) -> int:
    """How many samples a batch has; 0 where that is not known."""
    try:
        return num_samples(batch)
    except (GramianError, TypeError, ValueError, KeyError, IndexError):
        return 0


def _values(context: Context, name: str, module: nn.Module) -> int | None:
    """Over how many values a norm averages; `None` where it is not called, or no norm."""
    call = context.first_calls.get(name)
    if call is None:
        return None
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return prod(module.normalized_shape)
    shape = call.shape
    if isinstance(module, nn.GroupNorm):
        return module.num_channels // module.num_groups * prod(shape[2:])
    if isinstance(module, _BATCH_NORM) and module.training and len(shape) > 1:
        return shape[0] * prod(shape[2:])
    return None


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (norm_size,)
